"""RandAugment: a few random operations of one fixed magnitude.

Differences from the released code: none but the random generator, and the one
that `operations` names. As in the released code, and unlike in the paper, the
identity is not among the operations, and SolarizeAdd, Invert and Cutout are.
What is in pixels may be told to follow the image's size, which is for images
smaller than ImageNet's.

Reference:
  Cubuk et al., "RandAugment: Practical automated data augmentation with a
  reduced search space", 2020, https://arxiv.org/abs/1909.13719
  Brock et al., 2021, appendix A, https://arxiv.org/abs/2102.06171
"""

import functools
import re

import jax
from jax import numpy as jnp

from nfnets_jax.augment.operations import (
  IN_PIXELS,
  MAX_MAGNITUDE,
  OPERATIONS,
  argument,
  distort,
  to_uint8,
)


def parse_policy(policy: str) -> tuple[int, int, int | None]:
  """Reads a policy such as `'4x10'`: four layers of magnitude ten.

  The recipe has `'4x5'` for NFNet-F0, `'4x10'` for F1 and F2, and `'4x15'` for
  the larger ones. `'4x10@224'` is that of images of 224 pixels, made smaller
  or larger with the image.

  Args:
    policy: two decimal numbers with an `x` between, and perhaps a third behind
      an `@`.

  Returns:
    The number of layers, at least 1, the magnitude, in 0..20, and the size that
    lengths in pixels are for, at least 1, or None where they are for any size.

  Raises:
    ValueError: the string has another form, or a number is out of range.

  Example:
    >>> parse_policy('4x10')
    (4, 10, None)
    >>> parse_policy('2x5@224')
    (2, 5, 224)

  Reference:
    Brock et al., 2021, table 1 and appendix A,
    https://arxiv.org/abs/2102.06171
  """
  match = re.fullmatch(r'([0-9]+)x([0-9]+)(?:@([0-9]+))?', policy)
  if match is None:
    raise ValueError(
      f'RandAugment policy {policy!r} is not of the form '
      "'LAYERSxMAGNITUDE' or 'LAYERSxMAGNITUDE@SIZE', such as '4x10'"
    )
  num_layers, magnitude = int(match[1]), int(match[2])
  size = None if match[3] is None else int(match[3])
  _check(num_layers, magnitude, size)
  return num_layers, magnitude, size


def rand_augment(
  keys: jax.Array,
  images: jax.Array,
  num_layers: int,
  magnitude: int,
  size: int | None = None,
) -> jax.Array:
  """Applies `num_layers` random operations, one after the other.

  In each layer each image draws one of the sixteen operations, all equally
  likely, and where the operation has them, a sign and the place of its box.

  Args:
    keys: `[B]` random keys, one per image.
    images: `[B, H, W, 3]`, uint8 or floating; floating values are clipped to
      0..255 and their fractions dropped.
    num_layers: operations per image, at least 1. Static.
    magnitude: their strength, in 0..20. Static.
    size: pixels, at least 1: translations and the box of Cutout are as long as
      in an image of that size, times `min(H, W) / size`, in whole pixels. None
      leaves them as they are at any size, as in the released code. Static.

  Returns:
    `[B, H, W, 3]` of the type of `images`, whole numbers in 0..255.

  Raises:
    ValueError: `num_layers`, `magnitude` or `size` is out of range.

  Example:
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> images = jnp.zeros((2, 16, 16, 3), jnp.uint8)
    >>> rand_augment(keys, images, num_layers=4, magnitude=10).shape
    (2, 16, 16, 3)

  Reference:
    Cubuk et al., 2020, section 3, https://arxiv.org/abs/1909.13719
  """
  _check(num_layers, magnitude, size)
  arguments = {name: argument(name, magnitude) for name in OPERATIONS}
  if size is not None:
    shorter = min(images.shape[1:3])
    for name in IN_PIXELS:
      arguments[name] = float(round(arguments[name] * shorter / size))
  strength = jnp.array([*arguments.values()], jnp.float32)

  def layer(pixels: jax.Array, keys: jax.Array) -> tuple[jax.Array, None]:
    keys = jax.vmap(jax.random.split)(keys)
    operation = choose_operations(keys[:, 0])
    return distort(keys[:, 1], pixels, operation, strength[operation]), None

  split = functools.partial(jax.random.split, num=num_layers)
  layer_keys = jax.vmap(split, out_axes=1)(keys)
  # A scan compiles one layer, however many there are.
  pixels, _ = jax.lax.scan(layer, to_uint8(images), layer_keys)
  return pixels.astype(images.dtype)


def choose_operations(keys: jax.Array) -> jax.Array:
  """Draws one of the sixteen operations per image, all equally likely.

  Args:
    keys: `[B]` random keys, one per image.

  Returns:
    `[B]` int32, indices into `operations.OPERATIONS`.

  Example:
    >>> choose_operations(jax.random.split(jax.random.key(0), 8)).shape
    (8,)

  Reference:
    Cubuk et al., 2020, section 3, https://arxiv.org/abs/1909.13719
  """
  count = len(OPERATIONS)
  return jax.vmap(lambda key: jax.random.randint(key, (), 0, count))(keys)


def _check(num_layers: int, magnitude: int, size: int | None) -> None:
  if num_layers < 1:
    raise ValueError(f'RandAugment needs at least 1 layer, not {num_layers}')
  if not 0 <= magnitude <= MAX_MAGNITUDE:
    raise ValueError(
      f'RandAugment magnitude {magnitude} is not in 0..{MAX_MAGNITUDE}'
    )
  if size is not None and size < 1:
    raise ValueError(f'RandAugment for images of {size} pixels; give 1 or more')
