"""Casts to float32."""

import jax
import jax.numpy as jnp


def widen(x: jax.Array) -> jax.Array:
  """Casts 16-bit floats to float32.

  For operations of features with a broadcast parameter, such as a gain, so that
  the gradient of the parameter, a sum over features, is float32. XLA fuses the
  cast.

  Example:
    >>> widen(jnp.ones(3, jnp.bfloat16)).dtype
    dtype('float32')
  """
  return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
