"""Data parallelism over devices; the only module that uses pmap.

The state has no device axis: it enters and leaves replicated and is never
indexed with `[0]`. A missing mean over devices would make replicas diverge
silently, which `replica_spread` detects.

With several processes, all must call these functions; sums and means cover the
devices of all. A step's outputs may be passed to the next step as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

AXIS = 'devices'


def parallel_train_step(
  step: Callable, inputs: int = 0, devices: Sequence[jax.Device] | None = None
) -> Any:
  """Maps `step(state, batch, *inputs) → (state, metrics)` over devices.

  `step` averages over `AXIS`. The state is replicated and donated, the batch
  comes from `shard`, and the further inputs, a number of them, are replicated.
  """
  return jax.pmap(
    step,
    axis_name=AXIS,
    in_axes=(None, 0, *[None] * inputs),
    out_axes=(None, None),
    donate_argnums=0,
    devices=devices,
  )


def parallel_eval_step(
  step: Callable, devices: Sequence[jax.Device] | None = None
) -> Any:
  """Maps `step(state, batch) → sums` over devices, without donation."""
  return jax.pmap(
    step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=devices
  )


def lower_train_step(
  step: Callable,
  state: chex.ArrayTree,
  batch: chex.ArrayTree,
  *inputs: chex.ArrayTree,
  devices: Sequence[jax.Device] | None = None,
) -> jax.stages.Lowered:
  """Lowers the step mapped by `parallel_train_step`; keeps `state`.

  With several processes, `state` must be replicated arrays; else shapes
  suffice. `batch` are shapes `[devices, n, ...]`, for the devices of this
  process, or for all of `devices` if given, which need not be attached.
  """
  mapped = parallel_train_step(step, len(inputs), devices)
  return _lower(mapped, devices, state, batch, *inputs)


def lower_eval_step(
  step: Callable,
  state: chex.ArrayTree,
  batch: chex.ArrayTree,
  devices: Sequence[jax.Device] | None = None,
) -> jax.stages.Lowered:
  """Lowers the step mapped by `parallel_eval_step`; see `lower_train_step`."""
  return _lower(parallel_eval_step(step, devices), devices, state, batch)


class Program:
  """A compiled step of a replicated state and a batch from `shard`.

  Attributes:
    compiled: the program, for the attached devices.
  """

  def __init__(self, compiled: jax.stages.Compiled, *inputs: chex.ArrayTree):
    self.compiled = compiled
    self._inputs = replicate(inputs)
    self._sharding = jax.sharding.NamedSharding(
      _mesh(), jax.sharding.PartitionSpec(AXIS)
    )

  def __call__(self, state: chex.ArrayTree, batch: chex.ArrayTree) -> Any:
    """Runs the step."""
    if jax.process_count() > 1:
      # A compiled step takes global arrays, unlike a mapped one.
      batch = jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(self._sharding, x),
        batch,
      )
    return self.compiled(state, batch, *self._inputs)


def _lower(
  mapped: Any,
  devices: Sequence[jax.Device] | None,
  state: chex.ArrayTree,
  batch: chex.ArrayTree,
  *inputs: chex.ArrayTree,
) -> jax.stages.Lowered:
  if devices is None and jax.process_count() > 1:
    # Shapes do not show which part of an array is this process's.
    batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch)
    inputs = replicate(inputs)
  return mapped.lower(state, batch, *inputs)


def _all_devices() -> list[jax.Device]:
  return [
    device
    for process in range(jax.process_count())
    for device in jax.local_devices(process)
  ]


def _mesh() -> jax.sharding.Mesh:
  return jax.sharding.Mesh(np.asarray(_all_devices()), (AXIS,))


def replicate(tree: chex.ArrayTree) -> chex.ArrayTree:
  """Copies a pytree, equal in all processes, to every device."""
  sharding = jax.sharding.NamedSharding(_mesh(), jax.sharding.PartitionSpec())

  def copy(x: np.ndarray) -> jax.Array:
    # Per device: a global device_put compares the values of all processes.
    copies = [jax.device_put(x, device) for device in jax.local_devices()]
    return jax.make_array_from_single_device_arrays(
      np.shape(x), sharding, copies
    )

  # Through the host: device_put may alias its input, which a step donates.
  return jax.tree.map(copy, jax.device_get(tree))


def local_copy(x: chex.Array) -> chex.Array:
  """Returns one device's copy of a replicated array, without copying.

  Operations on it involve no other process. Host arrays stay as they are.
  """
  return x.addressable_data(0) if isinstance(x, jax.Array) else x


def shard(batch: chex.ArrayTree) -> chex.ArrayTree:
  """Splits this process's part of a batch over its devices.

  Returns:
    Arrays `[local devices, n / local devices, ...]` of arrays `[n, ...]`.

  Raises:
    ValueError: if n is not divisible by the local device count.

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
  """Returns the largest difference between the copies on all devices.

  It covers all processes and is the same in each: 0 for identical replicas; NaN
  if any copy of an element is NaN, or all are the same infinity.
  """
  if jax.device_count() == 1 and jax.devices()[0].platform == 'cpu':
    # A single copy, on the host: no program needed.
    leaves = jax.tree.leaves(jax.device_get(tree))
    finite = (np.isfinite(x).all() for x in leaves)
    return 0.0 if all(finite) else np.nan
  return float(_spread(tree, np.zeros(jax.local_device_count(), np.int32)))


def _spread_over_devices(tree: chex.ArrayTree, _: jax.Array) -> jax.Array:
  def leaf(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    spread = jnp.max(jax.lax.pmax(x, AXIS) - jax.lax.pmin(x, AXIS))
    # pmax may ignore NaN.
    nans = jax.lax.psum(jnp.sum(jnp.isnan(x)), AXIS)
    return jnp.where(nans > 0, jnp.nan, spread)

  leaves = [leaf(x) for x in jax.tree.leaves(tree) if x.size]
  return jnp.max(jnp.stack(leaves))


# pmap needs an argument with a device axis.
_spread = jax.pmap(
  _spread_over_devices, axis_name=AXIS, in_axes=(None, 0), out_axes=None
)
