"""All that knows of several devices: the one file that says pmap.

The state has no device axis: it goes in and comes out replicated, and nothing
is ever indexed with `[0]`. What this cannot show is a forgotten mean over
devices, which makes replicas drift apart silently: `replica_spread` measures
it.

There may be several processes, each with devices of its own. All of them call
these functions, and sums and means go over the devices of all. What a step
returns may go into the next step as it is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

AXIS = 'devices'


def parallel_train_step(step: Callable, *inputs: chex.ArrayTree) -> Callable:
  """Maps `step(state, batch, *inputs) → (state, metrics)` over all devices.

  Args:
    step: averages over the axis `AXIS`.
    *inputs: the same in every step and on every device, yet no constants of the
      compiled program, which serves for any others of their shapes.

  Returns:
    The compiled function of a replicated state, which it consumes, and a batch
    from `shard`.
  """
  mapped = _map_train_step(step, len(inputs), None)
  if not inputs:
    return mapped
  copies = replicate(inputs)
  return lambda state, batch: mapped(state, batch, *copies)


def parallel_eval_step(step: Callable) -> Callable:
  """Maps `step(state, batch) → sums` over all devices; keeps the state."""
  return _map_eval_step(step, None)


def lower_train_step(
  step: Callable,
  state: chex.ArrayTree,
  batch: chex.ArrayTree,
  *inputs: chex.ArrayTree,
  devices: Sequence[jax.Device] | None = None,
) -> jax.stages.Lowered:
  """Lowers what `parallel_train_step` maps; nothing is consumed.

  Args:
    step: as of `parallel_train_step`.
    state: arrays or their shapes; replicated arrays if there are several
      processes.
    batch: shapes `[devices, n, ...]` of a batch; `devices` those of this
      process, or all of those given.
    *inputs: as of `parallel_train_step`.
    devices: to compile for, which need not be here; all there are if None.

  Returns:
    What to compile; a `Program` runs it.
  """
  mapped = _map_train_step(step, len(inputs), devices)
  return _lower(mapped, devices, state, batch, *inputs)


def lower_eval_step(
  step: Callable,
  state: chex.ArrayTree,
  batch: chex.ArrayTree,
  devices: Sequence[jax.Device] | None = None,
) -> jax.stages.Lowered:
  """Lowers what `parallel_eval_step` maps; see `lower_train_step`."""
  return _lower(_map_eval_step(step, devices), devices, state, batch)


class Program:
  """A compiled step of a replicated state and a batch from `shard`.

  Attributes:
    compiled: the program, for the devices that are here.
  """

  def __init__(self, compiled: jax.stages.Compiled, *inputs: chex.ArrayTree):
    """Copies the inputs to every device.

    Args:
      compiled: from what `lower_train_step` or `lower_eval_step` returns.
      *inputs: as of `parallel_train_step`.
    """
    self.compiled = compiled
    self._inputs = replicate(inputs)
    self._sharding = jax.sharding.NamedSharding(
      _mesh(), jax.sharding.PartitionSpec(AXIS)
    )

  def __call__(self, state: chex.ArrayTree, batch: chex.ArrayTree) -> Any:
    """Computes the step."""
    if jax.process_count() > 1:
      # A compiled step takes arrays over the devices of all processes, where
      # the mapped one makes them of each process's part.
      batch = jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(self._sharding, x),
        batch,
      )
    return self.compiled(state, batch, *self._inputs)


def _map_train_step(
  step: Callable, inputs: int, devices: Sequence[jax.Device] | None
) -> Any:
  return jax.pmap(
    step,
    axis_name=AXIS,
    in_axes=(None, 0, *[None] * inputs),
    out_axes=(None, None),
    donate_argnums=0,
    devices=devices,
  )


def _map_eval_step(step: Callable, devices: Sequence[jax.Device] | None) -> Any:
  return jax.pmap(
    step,
    axis_name=AXIS,
    in_axes=(None, 0),
    out_axes=None,
    devices=devices,
  )


def _lower(
  mapped: Any,
  devices: Sequence[jax.Device] | None,
  state: chex.ArrayTree,
  batch: chex.ArrayTree,
  *inputs: chex.ArrayTree,
) -> jax.stages.Lowered:
  if devices is None and jax.process_count() > 1:
    # Shapes do not say which part of an array is this process's.
    batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch)
    inputs = replicate(inputs)
  return mapped.lower(state, batch, *inputs)


def _all_devices() -> list[jax.Device]:
  """Returns the devices of all processes, process by process."""
  return [
    device
    for process in range(jax.process_count())
    for device in jax.local_devices(process)
  ]


def _mesh() -> jax.sharding.Mesh:
  return jax.sharding.Mesh(np.asarray(_all_devices()), (AXIS,))


def replicate(tree: chex.ArrayTree) -> chex.ArrayTree:
  """Copies a pytree of arrays to every device.

  Args:
    tree: the same values in every process.

  Returns:
    The same pytree, each array with one full copy per device.
  """
  sharding = jax.sharding.NamedSharding(_mesh(), jax.sharding.PartitionSpec())

  def copy(x: np.ndarray) -> jax.Array:
    # Device by device: for all at once, device_put would gather what each
    # process has, to compare.
    copies = [jax.device_put(x, device) for device in jax.local_devices()]
    return jax.make_array_from_single_device_arrays(
      np.shape(x), sharding, copies
    )

  # Through the host, since device_put may alias the buffer that it is given,
  # and the training step then consumes both.
  return jax.tree.map(copy, jax.device_get(tree))


def local_copy(x: chex.Array) -> chex.Array:
  """Returns one device's copy of a replicated array, without copying it.

  Args:
    x: replicated, or of the host.

  Returns:
    An array on one device of this process, so that the other processes need not
    take part in what is done with it; or `x`, if it is of the host.
  """
  return x.addressable_data(0) if isinstance(x, jax.Array) else x


def shard(batch: chex.ArrayTree) -> chex.ArrayTree:
  """Splits this process's part of a batch over its devices.

  Args:
    batch: arrays `[n, ...]`; n a multiple of the local devices.

  Returns:
    Arrays `[local devices, n / local devices, ...]`.

  Raises:
    ValueError: if the examples cannot be split evenly.

  Example:
    >>> shard({'label': np.zeros(16)})['label'].shape[0] == (
    ...     jax.local_device_count())
    True
  """
  devices = jax.local_device_count()

  def split(x: np.ndarray) -> np.ndarray:
    if x.shape[0] % devices:
      raise ValueError(
        f'{x.shape[0]} examples are not divisible by {devices} devices; change '
        'the batch size'
      )
    return x.reshape(devices, x.shape[0] // devices, *x.shape[1:])

  return jax.tree.map(split, batch)


def replica_spread(tree: chex.ArrayTree) -> float:
  """Measures how far the copies of a pytree on all devices differ.

  Args:
    tree: replicated arrays.

  Returns:
    The largest difference between two copies of any element, also of different
    processes: 0 for replicas that are identical, NaN if an element is no number
    somewhere or the same infinity everywhere. All processes get the same.
  """
  if jax.device_count() == 1 and jax.devices()[0].platform == 'cpu':
    # There is no other copy, and the host has it: it takes no program.
    leaves = jax.tree.leaves(jax.device_get(tree))
    finite = (np.isfinite(x).all() for x in leaves)
    return 0.0 if all(finite) else np.nan
  return float(_spread(tree, np.zeros(jax.local_device_count(), np.int32)))


def _spread_over_devices(tree: chex.ArrayTree, _: jax.Array) -> jax.Array:
  def leaf(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    spread = jnp.max(jax.lax.pmax(x, AXIS) - jax.lax.pmin(x, AXIS))
    # A maximum over devices may pass over a NaN.
    nans = jax.lax.psum(jnp.sum(jnp.isnan(x)), AXIS)
    return jnp.where(nans > 0, jnp.nan, spread)

  leaves = [leaf(x) for x in jax.tree.leaves(tree) if x.size]
  return jnp.max(jnp.stack(leaves))


# The second argument is there for its device axis alone: pmap wants one.
_spread = jax.pmap(
  _spread_over_devices, axis_name=AXIS, in_axes=(None, 0), out_axes=None
)
