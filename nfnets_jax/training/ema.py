"""Exponential moving average of parameters and of a net's state."""

import chex
import jax
import jax.numpy as jnp
import optax


def decay_at(step: jax.Array, decay: float) -> jax.Array:
  """Returns the decay at `step` t, float32: min(decay, (1 + t) / (10 + t)).

  The second term reaches 0.99999 only at t = 899,990, so the paper's 112,602
  steps average over about the last ninth of training even with `decay` 0.99999.
  t counts the previous updates; `decay` is in [0, 1).

  Example:
    >>> round(float(decay_at(jnp.asarray(0), 0.99999)), 3)
    0.1
  """
  t = step.astype(jnp.float32)
  return jnp.minimum(decay, (1.0 + t) / (10.0 + t))


def update(
  average: chex.ArrayTree, new: chex.ArrayTree, step: jax.Array, decay: float
) -> chex.ArrayTree:
  """Moves `average` towards `new` by 1 − `decay_at(step, decay)`.

  `new` is a pytree after update t; its integers, such as counters, are copied.

  Reference:
    Brock et al. 2021, appendix A; the warm-up is the released code's.
  """
  step_size = 1.0 - decay_at(step, decay)

  def move(old: jax.Array, new: jax.Array) -> jax.Array:
    if not jnp.issubdtype(new.dtype, jnp.floating):
      return new
    return optax.incremental_update(new, old, step_size)

  return jax.tree.map(move, average, new)


@jax.jit
def distance(average: chex.ArrayTree, params: chex.ArrayTree) -> jax.Array:
  """Returns ‖params − average‖ / ‖params‖, float32; NaN if `params` are zero.

  Example:
    >>> float(distance({'w': jnp.array([3.0])}, {'w': jnp.array([4.0])}))
    0.25
  """
  difference = optax.tree.norm(optax.tree.sub(params, average))
  return difference / optax.tree.norm(params)
