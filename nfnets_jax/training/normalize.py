"""Normalisation of pixel values by the statistics of a data set."""

from collections.abc import Sequence

import jax
from jax import numpy as jnp
from jax.typing import DTypeLike

# The usual statistics of ImageNet's training set, red, green, blue, in 0..255.
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


def normalize(
  images: jax.Array,
  mean: Sequence[float] = IMAGENET_MEAN,
  std: Sequence[float] = IMAGENET_STD,
  dtype: DTypeLike = jnp.float32,
) -> jax.Array:
  """Gives each channel about zero mean and unit variance: `(x − mean) / std`.

  The arithmetic is in float32 whatever `dtype` is: bfloat16 has only 8 bits,
  so rounding comes once, at the end.

  Args:
    images: `[..., C]`, any integer or floating type, values in 0..255.
    mean: the mean of each channel, in 0..255.
    std: the standard deviation of each channel, on the same scale.
    dtype: the floating type of the result.

  Returns:
    `[..., C]` of type `dtype`, within about ±2.7 for photographs.

  Example:
    >>> white = jnp.full((1, 2, 2, 3), 255, jnp.uint8)
    >>> [f'{x:.2f}' for x in normalize(white)[0, 0, 0].tolist()]
    ['2.25', '2.43', '2.64']

  Reference:
    Brock et al., 2021, appendix A, https://arxiv.org/abs/2102.06171
  """
  channels = (1,) * (images.ndim - 1) + (len(mean),)
  offset = jnp.asarray(mean, jnp.float32).reshape(channels)
  scale = jnp.asarray(std, jnp.float32).reshape(channels)
  return ((images.astype(jnp.float32) - offset) / scale).astype(dtype)
