"""Parses the HLO text of a compiled program."""

import math
import re
from typing import NamedTuple


class Instruction(NamedTuple):
  """An HLO instruction.

  Names have no percent sign; `bytes` and `elements` are the size of the result;
  `attributes` is the rest of the line.
  """

  name: str
  opcode: str
  bytes: int
  elements: int
  operands: tuple[str, ...]
  attributes: str


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Parses a program to instructions by computation, and the entry's name.

  Raises:
    ValueError: if there is no entry computation.

  Example:
    >>> computations, entry = parse('''
    ... ENTRY %main (x: f32[8]) -> f32[8] {
    ...   %x = f32[8]{0} parameter(0)
    ...   ROOT %y = f32[8]{0} add(%x, %x)
    ... }
    ... ''')
    >>> computations[entry][1].opcode, computations[entry][1].operands
    ('add', ('x', 'x'))
  """
  computations: dict[str, list[Instruction]] = {}
  entry, current = None, None
  for line in text.splitlines():
    if current is None:
      head = re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line)
      if head and not line.startswith('HloModule'):
        current = computations.setdefault(head[2], [])
        entry = head[2] if head[1] else entry
    elif line.startswith('}'):
      current = None
    elif instruction := _instruction(line):
      current.append(instruction)
  if entry is None:
    raise ValueError('the text of the program has no entry computation')
  return computations, entry


def _instruction(line: str) -> Instruction | None:
  head = re.match(r'\s+(?:ROOT )?%?([\w.\-]+) = ', line)
  if head is None:
    return None
  line = re.sub(r'/\*.*?\*/', '', line[head.end() :])
  shape = _until_balanced(line) if line.startswith('(') else line.split(' ')[0]
  rest = line[len(shape) :].lstrip()
  opcode, _, rest = rest.partition('(')
  inside = _until_balanced(f'({rest}')[1:-1]
  operands = re.findall(r'%([\w.\-]+)', inside)
  if opcode == 'constant':
    operands = [inside]  # its value
  size, elements = _size(shape)
  return Instruction(
    head[1], opcode, size, elements, tuple(operands), rest[len(inside) + 1 :]
  )


def _until_balanced(text: str) -> str:
  depth = 0
  for match in re.finditer(r'[()]', text):
    depth += 1 if match[0] == '(' else -1
    if not depth:
      return text[: match.end()]
  return text


def _size(shape: str) -> tuple[int, int]:
  """Returns bytes and elements of an array, or of all arrays of a tuple."""
  size = elements = 0
  arrays = re.findall(r'([a-z]+)(\d*)[a-z\d]*\[([\d,]*)\]', shape)
  for kind, bits, dims in arrays:
    count = math.prod(int(x) for x in dims.split(',') if x)
    width = 1 if kind == 'pred' else int(bits or 0) / 8
    size += math.ceil(count * width)
    elements += count
  return size, elements


def called(instruction: Instruction, attribute: str) -> list[str]:
  """Returns the computations that an attribute of an instruction names."""
  match = re.search(
    rf'{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)', instruction.attributes
  )
  return re.findall(r'[\w.\-]+', match[1]) if match else []
