"""The cost of a compiled step per device, from its compiler and its HLO."""

from collections.abc import Callable, Mapping
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from nfnets_jax import hlo, models, topologies
from nfnets_jax.training import fit


def step_figures(
  fitted: fit.Fitting,
  text: str,
  kind: topologies.Kind | None,
  peak: float | None,
  count_flops: Callable[[], float],
) -> dict[str, Any]:
  """Returns the cost of a compiled step per device.

  Args:
    fitted: the compiled step.
    text: its HLO.
    kind: the device, for times; None if unknown.
    peak: FLOP/s of the device for the step's matrix products, with `kind`.
    count_flops: returns the FLOPs of the step, for compilers that do not.

  Returns:
    JSON-serialisable bytes, counts and seconds; None for unknown seconds.
  """
  program = hlo.read(text)
  figures = {
    **fit.need(fitted.compiled)._asdict(),
    'total': fitted.total,
    'traffic': program.traffic,
    'cycles': program.cycles,
    'large_gathers': program.large_gathers,
    'large_scatters': program.large_scatters,
    'collectives': [x._asdict() for x in program.collectives],
    'collective_bytes': sum(x.times * x.bytes for x in program.collectives),
    'overlapped_bytes': sum(
      x.times * x.bytes for x in program.collectives if x.work
    ),
    'compile_seconds': fitted.seconds,
  }
  cost = fitted.compiled.cost_analysis() or {}
  # The compiler counts a loop body once.
  traffic_ratio = cycle_ratio = program.traffic / program.traffic_once
  if program.cycles_once:
    cycle_ratio = program.cycles / program.cycles_once
  if 'flops' in cost:
    flops = cost['flops'] * cycle_ratio
    accessed = cost.get('bytes accessed', 0.0) * traffic_ratio
  else:
    flops, accessed = count_flops(), program.traffic
  figures |= {'flops': flops, 'bytes_accessed': accessed}
  if kind is None or peak is None:
    return figures | {'seconds': None, 'cycle_seconds': None, 'bound': None}
  compute, transfer = flops / peak, accessed / kind.bandwidth
  seconds = max(compute, transfer)
  if (optimal := optimal_seconds(cost)) and program.cycles_once:
    seconds = optimal * cycle_ratio
  cycle_seconds = None
  if kind.clock and program.cycles:
    cycle_seconds = program.cycles / kind.clock
  return figures | {
    'compute_seconds': compute,
    'memory_seconds': transfer,
    'bound': 'compute' if compute > transfer else 'memory',
    'seconds': seconds,
    'cycle_seconds': cycle_seconds,
  }


def optimal_seconds(cost: Mapping[str, float]) -> float | None:
  """Returns XLA's estimate of a program's time, None if unavailable.

  libtpu's is negative for a v5e.

  Example:
    >>> optimal_seconds({'optimal_seconds': -407.9}) is None
    True
  """
  seconds = cost.get('optimal_seconds', 0.0)
  return seconds if seconds > 0 else None


def count_macs(name: str, overrides: Mapping[str, Any], image_size: int) -> int:
  """Returns the multiply-accumulates of a forward pass of one image."""

  def forward(images: jax.Array) -> dict[str, jax.Array]:
    # No device axis here.
    single = {k: v for k, v in overrides.items() if k != 'cross_replica_axis'}
    return models.create(name, 1000, **single)(images, is_training=False)

  return models.count_macs(
    hk.transform_with_state(forward).init,
    jax.eval_shape(lambda: jax.random.key(0)),
    jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32),
  )
