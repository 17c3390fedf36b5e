"""State of AGC: the update count and the statistics of the last update."""

from collections.abc import Sequence
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


def unit_statistics(
  leaves: Sequence[Sequence[jax.Array]],
) -> Statistics:
  """Reduces each leaf's clipped mask and ratios to `Statistics`."""
  clipped = [jnp.zeros((), jnp.float32)]
  largest = [jnp.zeros((), jnp.float32)]
  for is_clipped, ratio in leaves:
    finite = jnp.where(jnp.isfinite(ratio), ratio, 0.0)
    clipped.append(jnp.sum(is_clipped, dtype=jnp.float32))
    largest.append(jnp.max(finite, initial=0.0).astype(jnp.float32))
  units = sum(ratio.size for _, ratio in leaves)
  return Statistics(
    jnp.stack(clipped).sum() / max(1, units),
    jnp.stack(largest).max(),
    jnp.asarray(units, jnp.float32),
  )
