"""State of AGC: the update count and the statistics of the last update."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Statistics(NamedTuple):
  """Update statistics of a parameter group, float32 scalars.

  Zero for a group without gradients.

  Attributes:
    clipped: fraction of units clipped.
    largest: largest finite ratio ‖G_i‖ / max(‖W_i‖, ε) before clipping.
    units: number of units.
  """

  clipped: jax.Array
  largest: jax.Array
  units: jax.Array


class AGCState(NamedTuple):
  """State of `adaptive_grad_clip` with a schedule or statistics.

  Attributes:
    count: number of updates, int32.
    statistics: `Statistics` of the last update by group; empty if off.
  """

  count: jax.Array  # type: ignore[assignment]
  statistics: dict[str, Statistics]


def unit_statistics(is_clipped: jax.Array, ratios: jax.Array) -> Statistics:
  """Reduces the clipped mask and ratios of some units to `Statistics`."""
  finite = jnp.where(jnp.isfinite(ratios), ratios, 0.0)
  return Statistics(
    jnp.mean(is_clipped, dtype=jnp.float32),
    jnp.max(finite, initial=0.0).astype(jnp.float32),
    jnp.asarray(ratios.size, jnp.float32),
  )


def no_units() -> Statistics:
  """Returns the statistics of a group without gradients."""
  return Statistics(*(jnp.zeros((), jnp.float32) for _ in Statistics._fields))
