"""The fewest parts of a batch with which a compiled step fits into a device.

Memory is what the compiler says. A program that fits is kept, since it is the
one that runs; one that does not costs its compilation, and tells which numbers
of parts are not worth a try.
"""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax

GIB = 2**30

# The part of a device's memory that a step may take. The rest is for what is
# not in its program: holes between arrays, the evaluation, the program itself.
USABLE = 0.9

# Batches of images on a device that the running step does not read: the loop
# starts up to two steps before it waits for the first (`metrics.Window`).
_WAITING_BATCHES = 2

# What helps where nothing fits.
TRAINING_REMEDY = (
  "Set remat to 'block', make data.image_size or batch_size smaller, take more "
  'devices or another model'
)
EVALUATION_REMEDY = (
  'Make eval_batch_size or data.eval_image_size smaller, set eval_dtype to '
  "'bfloat16', take more devices or another model"
)

# A program is not compiled if the one before leaves no doubt that it is too
# large, with this much to spare.
_DOUBT = 1.1


class TooLargeError(ValueError):
  """A step does not fit into a device.

  Attributes:
    reason: the message without the remedy.
    fixed: bytes that stay however many parts there are, as far as is known.
    divided: those that n parts divide by n at best.
  """

  def __init__(
    self, reason: str, remedy: str = '', fixed: int = 0, divided: int = 0
  ):
    """Makes the message of a reason and a remedy.

    Args:
      reason: with the figures.
      remedy: what would help; a sentence.
      fixed: as in the attribute.
      divided: as in the attribute.
    """
    super().__init__(f'{reason}. {remedy}' if remedy else reason)
    self.reason, self.fixed, self.divided = reason, fixed, divided


class Need(NamedTuple):
  """What a program takes of each device, in bytes.

  Attributes:
    arguments: the state and the batch.
    outputs: results that do not take the place of an argument.
    temporaries: the most that all else takes at once.
    code: the program itself, where it lies on the device.
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
    parts: that the batch is computed in.
    compiled: the program.
    total: bytes that it takes of each device, with what lies beside it.
    refused: the numbers of parts that were too few, and their bytes, None if
      the compiler did not say.
    seconds: that tracing, lowering and compiling took.
  """

  parts: int
  compiled: jax.stages.Compiled
  total: int
  refused: dict[int, int | None]
  seconds: float


def need(compiled: jax.stages.Compiled) -> Need:
  """Returns what a compiled program takes of each device.

  Example:
    >>> x = jax.ShapeDtypeStruct((256,), 'float32')
    >>> need(jax.jit(lambda x: x + 1).lower(x).compile()).total
    2048
  """
  found: Any = compiled.memory_analysis()
  parts = (
    found.argument_size_in_bytes,
    found.output_size_in_bytes - found.alias_size_in_bytes,
    found.temp_size_in_bytes,
    found.generated_code_size_in_bytes,
  )
  return Need(*parts, total=sum(parts))


def bytes_beside(batch: chex.ArrayTree) -> int:
  """Returns the bytes on a device of the batches that wait for their step.

  Args:
    batch: arrays `[devices, ...]` or their shapes.
  """
  leaves = jax.tree.leaves(batch)
  return _WAITING_BATCHES * sum(
    x.size // x.shape[0] * x.dtype.itemsize for x in leaves
  )


def valid_micro_batches(share: int) -> list[int]:
  """Returns the numbers of micro-batches that a share can be split into.

  Args:
    share: images per device and step.

  Returns:
    The numbers in ascending order; empty if there is none.

  Example:
    >>> valid_micro_batches(12)
    [1, 2, 3, 4, 6, 12]
  """
  return [count for count in range(1, share + 1) if share % count == 0]


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
  """Compiles a step in ever more parts until it fits.

  Args:
    lower: from a number of parts to the step, not yet compiled.
    counts: the numbers, in ascending order.
    memory: bytes of one device, of which `USABLE` is filled; None takes the
      first that the compiler does not refuse.
    beside: bytes that lie on the device beside the program.
    agree: whether all processes say yes, so that they choose alike.
    options: of the compiler.
    remedy: what the error advises.
    before: of the same step in fewer parts.

  Returns:
    The first program that fits, in all processes.

  Raises:
    TooLargeError: if none does; the message has the figures, and what would
      help.

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
  # Of the step before, as in `TooLargeError`.
  fixed, divided = (before.fixed, before.divided) if before else (0, 0)
  for count in counts:
    hopeless = fixed + divided / count > _DOUBT * usable
    if count != counts[-1] and not agree(not hopeless):
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
      found = need(compiled)
      total = found.total + beside
      fixed, divided = total - found.temporaries, count * found.temporaries
      if agree(total <= usable):
        return Fitting(count, compiled, total, refused, seconds)
      text = (
        f'a step in {count} part(s) needs {total / GIB:.3f} GiB of each '
        f'device: {found.arguments / GIB:.3f} for parameters, averages and '
        f'images, {found.temporaries / GIB:.3f} for activations and the like; '
        f'it has {usable / GIB:.3f}, {USABLE:.0%} of its memory'
      )
    refused[count] = total
  raise TooLargeError(text, remedy, fixed, divided)


def _compile(
  lowered: jax.stages.Lowered, options: Mapping[str, bool] | None
) -> tuple[jax.stages.Compiled | None, str]:
  """Compiles, or returns why the compiler finds no room."""
  try:
    return lowered.compile(compiler_options=dict(options or {}) or None), ''
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return None, ' '.join(str(error).split())[:300]


def refused_bytes(message: str) -> int | None:
  """Returns the bytes that a compiler names when it refuses a program.

  Args:
    message: of the error RESOURCE_EXHAUSTED.

  Example:
    >>> refused_bytes('Used 24.50G of 15.48G hbm. Exceeded hbm capacity')
    26306674688
  """
  found = re.search(r'Used ([\d.]+)([KMGT]?) of', message)
  if found is None:
    return None
  scale = 2 ** (10 * ' KMGT'.index(found[2] or ' '))
  return round(float(found[1]) * scale)
