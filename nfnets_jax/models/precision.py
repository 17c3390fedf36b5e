"""Sums in float32, whatever the dtype of the features."""

import jax
import jax.numpy as jnp


def widen(x: jax.Array) -> jax.Array:
  """Returns `x` in float32 or wider.

  For features that meet a broadcast parameter, such as a bias or a gain: its
  gradient, a sum over the features, is then also taken in float32. XLA fuses
  the cast, so it takes no memory.

  Example:
    >>> widen(jnp.ones(3, jnp.bfloat16)).dtype
    dtype('float32')
  """
  return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
