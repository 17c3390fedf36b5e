"""Finds the fewest micro-batches with which a compiled step fits in memory.

Memory is the compiler's estimate. The program that fits is the one to run; the
estimate of one that does not rules out further numbers of micro-batches.
"""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax

from nfnets_jax.topologies import GIB

# Fraction of device memory that a step may use. The rest is for fragmentation,
# the evaluation and the program itself.
USABLE = 0.9

# Batches on a device that wait for their step: the loop dispatches up to two
# steps ahead (`meters.Window`).
_WAITING_BATCHES = 2

# Advice if nothing fits.
TRAINING_REMEDY = (
  "Set remat to 'block', make data.image_size or batch_size smaller, take more "
  'devices or another model'
)
EVALUATION_REMEDY = (
  'Make eval_batch_size or data.eval_image_size smaller, set eval_dtype to '
  "'bfloat16', take more devices or another model"
)

# Do not compile a program predicted to exceed memory by this factor.
_DOUBT = 1.1


class TooLargeError(ValueError):
  """A step does not fit in device memory.

  Attributes:
    reason: the message without the remedy.
    fixed: known bytes independent of the number of micro-batches.
    divided: bytes that n micro-batches divide by at most n.
  """

  def __init__(
    self, reason: str, remedy: str = '', fixed: int = 0, divided: int = 0
  ):
    super().__init__(f'{reason}. {remedy}' if remedy else reason)
    self.reason, self.fixed, self.divided = reason, fixed, divided


class Need(NamedTuple):
  """Memory of a program per device, in bytes.

  Attributes:
    arguments: state and batch.
    outputs: results that do not alias an argument.
    temporaries: peak of everything else.
    code: the program, if it resides on the device.
    total: the sum.
  """

  arguments: int
  outputs: int
  temporaries: int
  code: int
  total: int


class Fitting(NamedTuple):
  """A program that fits.

  Attributes:
    parts: number of micro-batches.
    compiled: the program.
    total: bytes per device, including waiting batches.
    refused: bytes by number of micro-batches that did not fit, None if unknown.
    seconds: time to trace, lower and compile.
  """

  parts: int
  compiled: jax.stages.Compiled
  total: int
  refused: dict[int, int | None]
  seconds: float


def need(compiled: jax.stages.Compiled) -> Need:
  """Returns the memory of a compiled program per device.

  Example:
    >>> x = jax.ShapeDtypeStruct((256,), 'float32')
    >>> need(jax.jit(lambda x: x + 1).lower(x).compile()).total
    2048
  """
  analysis: Any = compiled.memory_analysis()
  parts = (
    analysis.argument_size_in_bytes,
    analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    analysis.temp_size_in_bytes,
    analysis.generated_code_size_in_bytes,
  )
  return Need(*parts, total=sum(parts))


def bytes_beside(batch: chex.ArrayTree) -> int:
  """Returns the bytes per device of waiting batches `[devices, ...]`."""
  leaves = jax.tree.leaves(batch)
  return _WAITING_BATCHES * sum(
    x.size // x.shape[0] * x.dtype.itemsize for x in leaves
  )


def valid_micro_batches(batch_size: int) -> list[int]:
  """Returns the divisors of a per-device batch size, ascending; [] for 0.

  Example:
    >>> valid_micro_batches(12)
    [1, 2, 3, 4, 6, 12]
  """
  return [n for n in range(1, batch_size + 1) if batch_size % n == 0]


def compile_fewest(
  lower: Callable[[int], jax.stages.Lowered],
  counts: Sequence[int],
  memory: int | None,
  beside: int = 0,
  agree: Callable[[bool], bool] = bool,
  options: Mapping[str, bool] | None = None,
  remedy: str = TRAINING_REMEDY,
  before: TooLargeError | None = None,
) -> Fitting:
  """Compiles a step in increasing numbers of micro-batches until it fits.

  Args:
    lower: number of micro-batches → lowered step.
    counts: the numbers to try, ascending.
    memory: bytes per device, of which `USABLE` is used; None is no limit.
    beside: further bytes on the device.
    agree: logical and over all processes, so that they choose alike.
    options: compiler options.
    remedy: advice in the error.
    before: error of the same step in fewer micro-batches.

  Raises:
    TooLargeError: if none fits; the message has the figures and the remedy.

  Example:
    >>> step = jax.jit(lambda x: x + 1)
    >>> def lower(count):
    ...   return step.lower(jax.ShapeDtypeStruct((2**20 // count,), 'float32'))
    >>> compile_fewest(lower, [1, 2, 4], memory=2**24).parts
    1
  """
  usable = math.inf if memory is None else USABLE * memory
  refused: dict[int, int | None] = {}
  text = ''
  # From the previous attempt, as in `TooLargeError`.
  fixed, divided = (before.fixed, before.divided) if before else (0, 0)
  for count in counts:
    too_large = fixed + divided / count > _DOUBT * usable
    if count != counts[-1] and not agree(not too_large):
      continue
    began = time.monotonic()
    compiled, reason = _compile(lower(count), options)
    seconds = time.monotonic() - began
    if compiled is None:
      total = refused_bytes(reason)
      fixed, divided = 0, count * (total or 0)
      agree(False)
      text = f'the compiler refuses a step in {count} part(s): {reason}'
    else:
      use = need(compiled)
      total = use.total + beside
      fixed, divided = total - use.temporaries, count * use.temporaries
      if agree(total <= usable):
        return Fitting(count, compiled, total, refused, seconds)
      text = (
        f'a step in {count} part(s) needs {total / GIB:.3f} GiB per device, '
        f'{use.arguments / GIB:.3f} of them for parameters, averages and '
        f'images, and {use.temporaries / GIB:.3f} for activations; it may use '
        f'{usable / GIB:.3f}, {USABLE:.0%} of the memory'
      )
    refused[count] = total
  raise TooLargeError(text, remedy, fixed, divided)


def _compile(
  lowered: jax.stages.Lowered, options: Mapping[str, bool] | None
) -> tuple[jax.stages.Compiled | None, str]:
  """Compiles, or returns why the program does not fit."""
  try:
    return lowered.compile(compiler_options=dict(options or {}) or None), ''
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return None, ' '.join(str(error).split())[:300]


def refused_bytes(message: str) -> int | None:
  """Parses the bytes in an XLA RESOURCE_EXHAUSTED message.

  Example:
    >>> refused_bytes('Used 24.50G of 15.48G hbm. Exceeded hbm capacity')
    26306674688
  """
  match = re.search(r'Used ([\d.]+)([KMGT]?) of', message)
  if match is None:
    return None
  scale = 2 ** (10 * ' KMGT'.index(match[2] or ' '))
  return round(float(match[1]) * scale)
