"""How much of a device's memory a training step needs, and what follows.

The need is read off the traced step, without compiling or computing anything:
every array lives from the operation that makes it to the last one that reads
it, and the largest sum of living arrays is the peak. Not every value of a
traced function becomes an array, because XLA computes elementwise operations
where their results are read. A value is taken to be kept if

  * a kernel (a convolution, a matrix product, a loop ...) or a reduction makes
    it, or a kernel reads it, since kernels read and write memory;
  * it is made of two or more arrays about as large as itself: keeping one is
    cheaper than keeping several;
  * it is an expensive function, such as tanh, that is read more than once.

All else is computed again from the kept arrays that it is made of, which then
live until it is read.

`tests/training/memory_test.py` compares it with `compiled.memory_analysis()` of
the training step on CPU, the one backend where that was measured; `SAFETY` says
what came out. Two things that the trace has do not happen on that backend: XLA
for CPU computes bfloat16 convolutions in float32, and it merges what `remat`
computes again with what was computed first. Neither saves memory there.
"""

import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from jax.extend import core
from ml_collections import config_dict

from nfnets_jax.training import train_step

GIB = 2**30

# The estimate of the activations is raised by this. Without it, it was 0.92 of
# what `memory_analysis()` has for nfnet_tiny, and 0.97 for F0 at 192 pixels.
# With it, the whole step's estimate was 1.07 to 1.16 of the measured (float32,
# both nets, shares of 2 to 64 images in 1 to 8 micro-batches).
SAFETY = 1.2

# The part of a device's memory that the step may fill. The rest is for what no
# trace shows: scratch space of convolutions, holes between arrays, the code
# itself, the evaluation's batch.
USABLE = 0.9

# Batches of raw images that lie on a device at once: the loop starts up to two
# steps before it waits for the first (`metrics.Window`).
_BATCHES_IN_FLIGHT = 3

# Images of the micro-batch that is traced: so many that the arrays which do not
# depend on their number hardly count. Tracing takes as long for one.
_TRACED_IMAGES = 256


class TooLargeError(ValueError):
  """A training step does not fit into a device."""


class MemoryEstimate(NamedTuple):
  """What a training step needs on each device, in bytes.

  Attributes:
    params: the parameters.
    opt_state: the optimiser's state.
    ema: the moving average of the parameters and of the network's state.
    model_state: the network's Haiku state.
    gradients: the gradient, and once more as much: its mean over the devices,
      or the standardised weights while it is computed.
    activations: for each image of a micro-batch, what forward and backward pass
      hold at their peak, `SAFETY` included.
    batch: for each image of the device's share, its pixels and labels.
  """

  params: int
  opt_state: int
  ema: int
  model_state: int
  gradients: int
  activations: int
  batch: int

  def total(self, share: int, micro_batches: int) -> int:
    """Returns the bytes of a step, between the updates of two batches.

    Args:
      share: images per device and step.
      micro_batches: parts that they are computed in.
    """
    state = self.params + self.opt_state + self.ema + self.model_state
    # The sum of the gradients lies beside the gradient that is added to it.
    sums = self.params if micro_batches > 1 else 0
    images = _BATCHES_IN_FLIGHT * share * self.batch
    part = math.ceil(share / micro_batches)
    return state + self.gradients + sums + images + part * self.activations


def estimate(
  net: hk.TransformedWithState,
  optimizer: optax.GradientTransformation,
  config: config_dict.ConfigDict,
  num_classes: int,
) -> MemoryEstimate:
  """Estimates the memory of a training step; only traces it.

  Args:
    net: takes `(images, is_training)`; with the config's `remat`, if any.
    optimizer: of the run.
    config: of the run; its size of the images and `compute_dtype`
      count, its batch size and `micro_batches` do not.
    num_classes: K.

  Returns:
    The estimate, whose `total` takes the size of the batch.
  """
  size = config.data.image_size
  state = train_step.state_shapes(net, optimizer, size)
  gradient = train_step.create_gradient(net, config, num_classes)
  count = _TRACED_IMAGES
  batch = {
    'image': jax.ShapeDtypeStruct((count, size, size, 3), jnp.uint8),
    'label': jax.ShapeDtypeStruct((count,), jnp.int32),
    'mix_label': jax.ShapeDtypeStruct((count,), jnp.int32),
    'ratio': jax.ShapeDtypeStruct((count,), jnp.float32),
  }
  peak = peak_bytes(
    gradient,
    state.params,
    state.model_state,
    jax.eval_shape(lambda: jax.random.key(0)),
    batch,
    jax.ShapeDtypeStruct((), jnp.int32),
  )
  params = _tree_bytes(state.params)
  # The gradient and its sum; with SAM also the parameters a step up the loss.
  copies = 2 if config.optimizer.sam_rho is None else 3
  return MemoryEstimate(
    params=params,
    opt_state=_tree_bytes(state.opt_state),
    ema=_tree_bytes((state.ema_params, state.ema_model_state)),
    model_state=_tree_bytes(state.model_state),
    gradients=copies * params,
    activations=round(SAFETY * peak / _TRACED_IMAGES),
    batch=3 * size**2 + 12,
  )


def device_memory() -> int:
  """Returns the bytes of memory that one local device can use.

  An accelerator says how much it lets jax allocate. On CPU the devices share
  the machine's memory, or what its control group leaves of it, evenly.

  Raises:
    ValueError: if the device does not say; the message says what to set.
  """
  device = jax.local_devices()[0]
  if device.platform == 'cpu':
    return _host_memory() // jax.local_device_count()
  limit = (device.memory_stats() or {}).get('bytes_limit')
  if not limit:
    raise ValueError(
      f'{device.device_kind} does not say how much memory it has, so the '
      'number of micro-batches cannot be chosen; set config.micro_batches'
    )
  return int(limit)


def valid_micro_batches(share: int) -> list[int]:
  """Returns the numbers of micro-batches that a share can be split into.

  Args:
    share: images per device and step.

  Returns:
    The numbers in ascending order.

  Example:
    >>> valid_micro_batches(12)
    [1, 2, 3, 4, 6, 12]
  """
  return [count for count in range(1, share + 1) if share % count == 0]


def choose_micro_batches(share: int, need: MemoryEstimate, memory: int) -> int:
  """Chooses the smallest number of micro-batches that fits into a device.

  Args:
    share: images per device and step.
    need: of the training step.
    memory: bytes of one device, of which `USABLE` is filled.

  Returns:
    A number that divides the share.

  Raises:
    TooLargeError: if not even the smallest micro-batch fits; the message has
      the figures, and what would help.

  Example:
    >>> need = MemoryEstimate(
    ...     params=0, opt_state=0, ema=0, model_state=0, gradients=0,
    ...     activations=100, batch=0)
    >>> choose_micro_batches(64, need=need, memory=1000)
    8
  """
  counts = valid_micro_batches(share)
  usable = USABLE * memory
  for count in counts:
    if need.total(share, count) <= usable:
      return count
  smallest = share // counts[-1]
  raise TooLargeError(
    f'a step needs {need.total(share, counts[-1]) / GIB:.2f} GiB with a '
    f'micro-batch of {smallest}, the smallest there is, and a device has '
    f'{usable / GIB:.2f} GiB ({USABLE:.0%} of {memory / GIB:.2f}): '
    f'{need.activations * smallest / GIB:.2f} for activations, '
    f'{_BATCHES_IN_FLIGHT * share * need.batch / GIB:.2f} for {share} images; '
    f"the rest for parameters and gradients. Set remat to 'block', make "
    'data.image_size or batch_size smaller, take more devices or another model'
  )


def peak_bytes(function: Callable[..., Any], *args: Any) -> int:
  """Returns the most memory that a function's values take at once.

  Its arguments do not count, what it returns does. The module's docstring says
  which values are taken to be kept.

  Args:
    function: of `args`; traced, not run.
    *args: arrays or `jax.ShapeDtypeStruct`s, or pytrees of them.

  Returns:
    Bytes.

  Example:
    >>> def square_of_product(x):
    ...   return (x @ x) ** 2
    >>> peak_bytes(square_of_product, jnp.ones((8, 8), jnp.float32))
    512
  """
  return _peak(jax.make_jaxpr(function)(*args).jaxpr)


# Functions that are inlined, as XLA does.
_CALLS = {
  'checkpoint',
  'closed_call',
  'custom_jvp_call',
  'custom_vjp_call',
  'jit',
  'pjit',
  'remat2',
}

# Operations that read their arguments from memory and write to it.
_KERNELS = {
  'concatenate',
  'cond',
  'conv_general_dilated',
  'dot_general',
  'dynamic_update_slice',
  'gather',
  'pad',
  'reduce_window',
  'reduce_window_sum',
  'scan',
  'scatter',
  'scatter-add',
  'sort',
  'split',
  'while',
}

# What XLA does not compute twice to save memory.
_EXPENSIVE = {
  'cos',
  'div',
  'erf',
  'erf_inv',
  'erfc',
  'exp',
  'exp2',
  'expm1',
  'log',
  'log1p',
  'logistic',
  'pow',
  'rsqrt',
  'sin',
  'sqrt',
  'tanh',
}


class _Operation(NamedTuple):
  """An operation on numbered values; `inner` is the peak inside a loop."""

  name: str
  reads: list[int]
  writes: list[int]
  inner: int


class _Program:
  """A traced function without the borders of the functions inside it."""

  def __init__(self, jaxpr: core.Jaxpr):
    self.sizes: list[int] = []
    self.operations: list[_Operation] = []
    numbers = self._number([*jaxpr.constvars, *jaxpr.invars])
    self.outputs = {x for x in self._inline(jaxpr, numbers) if x is not None}

  def _number(self, variables: list[core.Var]) -> dict[core.Var, int | None]:
    first = len(self.sizes)
    self.sizes += [_bytes(variable.aval) for variable in variables]
    return {variable: first + i for i, variable in enumerate(variables)}

  def _inline(
    self, jaxpr: core.Jaxpr, numbers: dict[core.Var, int | None]
  ) -> list[int | None]:
    """Adds the operations; returns the outputs' numbers, None for literals."""

    def read(variables: list[core.Var | core.Literal]) -> list[int | None]:
      return [
        None if isinstance(x, core.Literal) else numbers[x] for x in variables
      ]

    for eqn in jaxpr.eqns:
      inside = list(core.jaxprs_in_params(eqn.params))
      if eqn.primitive.name in _CALLS:
        called = inside[0]
        arguments = dict(zip(called.invars, read(eqn.invars), strict=True))
        arguments |= self._number(called.constvars)
        outputs = self._inline(called, arguments)
        numbers.update(zip(eqn.outvars, outputs, strict=True))
      else:
        written = self._number(eqn.outvars)
        numbers.update(written)
        self.operations.append(
          _Operation(
            name=eqn.primitive.name,
            reads=[x for x in read(eqn.invars) if x is not None],
            writes=[x for x in written.values() if x is not None],
            inner=max(map(_peak, inside), default=0),
          )
        )
    return read(jaxpr.outvars)


def _peak(jaxpr: core.Jaxpr) -> int:
  program = _Program(jaxpr)
  sources = _sources(program)
  end = len(program.operations)
  last_read = {source: end for x in program.outputs for source in sources[x]}
  for time, operation in reversed(list(enumerate(program.operations))):
    for x in operation.reads:
      for source in sources[x]:
        last_read.setdefault(source, time)
  freed: list[int] = [0] * (end + 1)
  living = peak = 0
  for time, operation in enumerate(program.operations):
    for x in operation.writes:
      if sources[x] == {x} and x in last_read:
        living += program.sizes[x]
        freed[last_read[x]] += program.sizes[x]
    peak = max(peak, living + operation.inner)
    living -= freed[time]
  return peak


def _sources(program: _Program) -> list[frozenset[int]]:
  """The kept values that each value is computed from; itself if it is kept."""
  kernel_reads: set[int] = set()
  readers = [0] * len(program.sizes)
  for operation in program.operations:
    if operation.name in _KERNELS:
      kernel_reads.update(operation.reads)
    for x in set(operation.reads):
      readers[x] += 1
  sources = [frozenset([x]) for x in range(len(program.sizes))]
  for operation in program.operations:
    if operation.name in _KERNELS or operation.name.startswith('reduce_'):
      continue
    for x in operation.writes:
      made_of = frozenset().union(*(sources[y] for y in operation.reads))
      # A quarter, because a byte may have become a float.
      large = [y for y in made_of if 4 * program.sizes[y] >= program.sizes[x]]
      shared = operation.name in _EXPENSIVE and readers[x] > 1
      kept = x in kernel_reads or x in program.outputs or shared
      if not kept and len(large) < 2:
        sources[x] = made_of
  return sources


def _bytes(array: Any) -> int:
  return math.prod(array.shape) * array.dtype.itemsize


def _tree_bytes(tree: Any) -> int:
  return sum(map(_bytes, jax.tree.leaves(tree)))


def _host_memory(groups: pathlib.Path = pathlib.Path('/sys/fs/cgroup')) -> int:
  """Bytes that this process can have: the machine's, or its control group's."""
  machine = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  return min([machine, *_group_limits(groups)])


def _group_limits(groups: pathlib.Path) -> Iterator[int]:
  # The names of the second and of the first version of control groups.
  for name in ('memory.max', 'memory/memory.limit_in_bytes'):
    path = groups / name
    if path.is_file() and (text := path.read_text().strip()) != 'max':
      yield int(text)
