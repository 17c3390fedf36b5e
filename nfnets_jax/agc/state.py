"""The state of AGC: the number of updates, and statistics of the last one."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Statistics(NamedTuple):
  """Statistics of an update for a group of parameters, float32 scalars.

  Zero for a group without gradients.

  Attributes:
    clipped: fraction of the units that were clipped.
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
    statistics: of the last update, by group; empty if off.
  """

  count: jax.Array  # type: ignore[assignment]
  statistics: dict[str, Statistics]


def unit_statistics(
  leaves: Sequence[Sequence[jax.Array]],
) -> Statistics:
  """Reduces, for each leaf, which units were clipped and their ratios."""
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
