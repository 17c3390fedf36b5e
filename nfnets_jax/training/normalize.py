"""Normalisation of pixel values."""

import jax
from jax import numpy as jnp
from jax.typing import DTypeLike

# ImageNet training set statistics (red, green, blue), in 0..255.
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


def normalize(images: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
  """Normalises each channel by the statistics of ImageNet: (x − mean) / std.

  Computed in float32 and rounded once, since bfloat16 has only 8 bits.

  Args:
    images: RGB `[..., 3]`, any integer or floating dtype, values in 0..255.
    dtype: floating dtype of the result, `[..., 3]`.

  Example:
    >>> white = jnp.full((1, 2, 2, 3), 255, jnp.uint8)
    >>> [f'{x:.2f}' for x in normalize(white)[0, 0, 0].tolist()]
    ['2.25', '2.43', '2.64']

  Reference:
    Brock et al. 2021, appendix A.
  """
  channels = (1,) * (images.ndim - 1) + (3,)
  offset = jnp.asarray(IMAGENET_MEAN, jnp.float32).reshape(channels)
  scale = jnp.asarray(IMAGENET_STD, jnp.float32).reshape(channels)
  return ((images.astype(jnp.float32) - offset) / scale).astype(dtype)
