"""Estimates the work of a compiled program from its HLO text.

    program = read(compiled.as_text())

Instructions are in scheduled order. Loops of constant length count once per
iteration, others once; conditionals count all their branches.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from nfnets_jax.hlo_text import Instruction, called, parse

# Gathers and scatters of fewer elements are negligible.
LARGE = 10_000

_COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'collective-broadcast',
)
# Opcodes that move no data themselves.
_FREE = {
  'after-all',
  'async-update',
  'bitcast',
  'call',
  'conditional',
  'constant',
  'get-tuple-element',
  'opt-barrier',
  'parameter',
  'partition-id',
  'replica-id',
  'tuple',
  'while',
}


class Collective(NamedTuple):
  """A collective operation.

  Attributes:
    opcode: opcode, such as 'all-reduce'.
    bytes: size per device, the larger of input and output.
    times: executions per step.
    asynchronous: whether it has separate start and done instructions.
    work: number of instructions between these that move or compute data.
    cycles: estimated cycles of these instructions.
  """

  opcode: str
  bytes: int
  times: int
  asynchronous: bool
  work: int
  cycles: int


class Program(NamedTuple):
  """The work of a program per step and device.

  Attributes:
    traffic: bytes of operands and results of all instructions.
    traffic_once: the same with each loop run once.
    cycles: sum of the compiler's estimates; 0 if there are none.
    cycles_once: the same with each loop run once.
    large_gathers: number of gathers of more than `LARGE` elements.
    large_scatters: the same for scatters.
    collectives: all collectives.
  """

  traffic: int
  traffic_once: int
  cycles: int
  cycles_once: int
  large_gathers: int
  large_scatters: int
  collectives: list[Collective]


def read(text: str) -> Program:
  """Reads the text of a compiled program.

  Raises:
    ValueError: if it has no entry computation.
  """
  computations, entry = parse(text)
  traffic = traffic_once = cycles = cycles_once = 0
  collectives: list[Collective] = []
  for name, times in _executed(computations, entry):
    instructions = computations[name]
    sizes = {x.name: x.bytes for x in instructions}
    moved = sum(_moved(x, sizes) for x in instructions)
    estimated = sum(map(_cycles, instructions))
    traffic += times * moved
    traffic_once += moved
    cycles += times * estimated
    cycles_once += estimated
    collectives += _collectives(instructions, sizes, times, computations)
  gathers, scatters = _large(computations)
  return Program(
    traffic, traffic_once, cycles, cycles_once, gathers, scatters, collectives
  )


def _executed(
  computations: Mapping[str, list[Instruction]], name: str, times: int = 1
) -> Iterator[tuple[str, int]]:
  """Yields the computations outside kernels, and how often each runs."""
  yield name, times
  for instruction in computations[name]:
    inner: list[str] = []
    trips = 1
    if instruction.opcode == 'while':
      inner = called(instruction, 'body')
      trips = _trips(instruction, computations)
    elif instruction.opcode == 'call':
      inner = called(instruction, 'to_apply')
    elif instruction.opcode == 'conditional':
      inner = [
        name
        for attribute in ('branch', 'true', 'false')
        for name in called(instruction, rf'{attribute}_computations?')
      ]
    for each in inner:
      yield from _executed(computations, each, times * trips)


def _trips(
  loop: Instruction, computations: Mapping[str, list[Instruction]]
) -> int:
  """Returns the trip count of a loop; 1 if unknown."""
  known = re.search(
    r'known_trip_count\D*:\s*\{\s*"?n"?\D*(\d+)', loop.attributes
  )
  if known:
    return int(known[1])
  (condition,) = called(loop, 'condition')
  lines = computations[condition]
  last = lines[-1]
  if last.opcode != 'compare' or 'direction=LT' not in last.attributes:
    return 1
  for line in lines:
    if line.name in last.operands and line.opcode == 'constant':
      return int(line.operands[0])
  return 1


def _moved(instruction: Instruction, sizes: Mapping[str, int]) -> int:
  if instruction.opcode in _FREE or instruction.opcode.endswith('-done'):
    return 0
  return sum(_read_and_written(instruction, sizes))


def _read_and_written(
  instruction: Instruction, sizes: Mapping[str, int]
) -> tuple[int, int]:
  """Returns the bytes of the operands, and of the result without them."""
  opcode, written = instruction.opcode, instruction.bytes
  read = sum(sizes.get(name, 0) for name in instruction.operands)
  # The result of all other starts includes the operands.
  if opcode.endswith('-start') and opcode != 'all-reduce-start':
    written = max(0, written - read)
  return read, written


def _cycles(instruction: Instruction) -> int:
  match = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
  # More than a day means that the compiler has no estimate.
  return int(match[1]) if match and len(match[1]) < 14 else 0


def _collectives(
  instructions: list[Instruction],
  sizes: Mapping[str, int],
  times: int,
  computations: Mapping[str, list[Instruction]],
) -> Iterator[Collective]:
  for start, instruction in enumerate(instructions):
    opcode = instruction.opcode.removesuffix('-start')
    if opcode == 'async':
      (name,) = called(instruction, 'calls')
      opcodes = [x.opcode for x in computations[name]]
      opcode = next((x for x in opcodes if x.startswith(_COLLECTIVES)), 'async')
    if opcode not in _COLLECTIVES:
      continue
    asynchronous = instruction.opcode.endswith('-start')
    later = instructions[start + 1 :] if asynchronous else []
    between = list(_before_done(instruction, later))
    yield Collective(
      opcode,
      max(_read_and_written(instruction, sizes)),
      times,
      asynchronous,
      len(between),
      sum(map(_cycles, between)),
    )


def _before_done(
  start: Instruction, later: Iterable[Instruction]
) -> Iterator[Instruction]:
  """Yields what moves or computes data until the result of `start` is used."""
  for other in later:
    if start.name in other.operands:
      return
    if other.opcode not in _FREE and not other.opcode.endswith(
      ('-start', '-done')
    ):
      yield other


def _large(computations: Mapping[str, list[Instruction]]) -> tuple[int, int]:
  """Counts large gathers and scatters, including those in kernels."""
  gathers = scatters = 0
  for instructions in computations.values():
    elements = {x.name: x.elements for x in instructions}
    for x in instructions:
      if x.opcode == 'gather':
        gathers += x.elements > LARGE
      elif x.opcode == 'scatter':
        # Operands: targets, indices and updates.
        updates = x.operands[2 * len(x.operands) // 3 :]
        scatters += sum(elements.get(name, 0) for name in updates) > LARGE
  return gathers, scatters
