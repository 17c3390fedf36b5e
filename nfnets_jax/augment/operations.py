"""The sixteen image operations of RandAugment and AutoAugment, for a batch.

Their names, what a magnitude means to each, and their application: every image
of a batch has an operation of its own.

Differences from the released code:
  * AutoContrast computes in whole numbers, where rounding in float32 may give
    one level more or less.

As in the released code, and unlike in Pillow or in the papers:
  * Contrast blends with the constant `H · W / 256`, at most 255, where the mean
    of the grey image was meant.
  * Solarize's threshold wraps around to 8 bits. At magnitude 10 it is 0, which
    inverts the image; at magnitude 15 it is 128, as it is at 5.
  * Posterize keeps at least one bit.
  * Color, Contrast, Brightness and Sharpness do nothing at magnitude 5.
  * Translations and the box of Cutout are in pixels, at any image size;
    `rand_augment` may be told otherwise.

Reference:
  Cubuk et al., "AutoAugment: Learning Augmentation Policies from Data", 2019,
  appendix, https://arxiv.org/abs/1805.09501
  Brock et al., 2021, appendix A, https://arxiv.org/abs/2102.06171
"""

import jax
from jax import numpy as jnp

from nfnets_jax.augment import kernels

OPERATIONS = (
  'AutoContrast',
  'Equalize',
  'Invert',
  'Rotate',
  'Posterize',
  'Solarize',
  'Color',
  'Contrast',
  'Brightness',
  'Sharpness',
  'ShearX',
  'ShearY',
  'TranslateX',
  'TranslateY',
  'Cutout',
  'SolarizeAdd',
)

# The operations whose argument has a random sign.
SIGNED = ('Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY')

# Those whose argument is a length in pixels.
IN_PIXELS = ('TranslateX', 'TranslateY', 'Cutout')

MAX_MAGNITUDE = 20  # above it Posterize would keep more than 8 bits


def argument(name: str, magnitude: int, translate: int = 100) -> float:
  """What a magnitude, the same scale for all, means to one operation.

  | operation              | argument                        |   5 |  10 |  15 |
  |------------------------|---------------------------------|-----|-----|-----|
  | Rotate                 | degrees                         |  15 |  30 |  45 |
  | ShearX, ShearY         | pixels per pixel                | .15 |  .3 | .45 |
  | TranslateX, TranslateY | pixels                          |  50 | 100 | 150 |
  | Color, Contrast,       |                                 |     |     |     |
  | Brightness, Sharpness  | factor, 1 for the image as is   |   1 | 1.9 | 2.8 |
  | Posterize              | bits kept                       |   2 |   4 |   6 |
  | Solarize               | threshold, modulo 256           | 128 | 256 | 384 |
  | SolarizeAdd            | levels added to those below 128 |  55 | 110 | 165 |
  | Cutout                 | pixels, half the side           |  20 |  40 |  60 |

  AutoContrast, Equalize and Invert have none, which reads 0.

  Args:
    name: one of `OPERATIONS`.
    magnitude: 0..`MAX_MAGNITUDE`; arguments are linear in it.
    translate: the pixels of a translation at magnitude 10.

  Returns:
    The argument, without the random sign.

  Raises:
    ValueError: no such operation, or the magnitude is out of range.

  Example:
    >>> argument('Rotate', 15), argument('Color', 5), argument('Solarize', 3)
    (45.0, 1.0, 76.0)
  """
  if not 0 <= magnitude <= MAX_MAGNITUDE:
    raise ValueError(f'magnitude {magnitude} is not in 0..{MAX_MAGNITUDE}')
  level = magnitude / 10
  match name:
    case 'AutoContrast' | 'Equalize' | 'Invert':
      return 0.0
    case 'Rotate':
      return level * 30
    case 'ShearX' | 'ShearY':
      return level * 0.3
    case 'TranslateX' | 'TranslateY':
      return level * translate
    case 'Color' | 'Contrast' | 'Brightness' | 'Sharpness':
      return level * 1.8 + 0.1
    case 'Posterize':
      return float(int(level * 4))
    case 'Solarize':
      return float(int(level * 256))
    case 'SolarizeAdd':
      return float(int(level * 110))
    case 'Cutout':
      return float(int(level * 40))
  raise ValueError(f'{name!r} is not one of {", ".join(OPERATIONS)}')


def apply_operations(
  images: jax.Array,
  operation: jax.Array,
  arguments: jax.Array,
  centre: jax.Array,
) -> jax.Array:
  """Applies to each image its own operation.

  Args:
    images: `[B, H, W, 3]` uint8.
    operation: `[B]` int32, indices into `OPERATIONS`; −1 for none at all.
    arguments: `[B]` float32, in the operation's own unit, signed (`argument`).
    centre: `[B, 2]` int32, the pixel (y, x) in the middle of Cutout's box.

  Returns:
    `[B, H, W, 3]` uint8.

  Example:
    >>> images = jnp.full((2, 4, 4, 3), 200, jnp.uint8)
    >>> operation = jnp.array([OPERATIONS.index('Invert'), -1])
    >>> images = jax.jit(apply_operations)(
    ...     images, operation, jnp.zeros(2), jnp.zeros((2, 2), jnp.int32))
    >>> images[:, 0, 0, 0].tolist()
    [55, 200]
  """
  chosen = {name: operation == i for i, name in enumerate(OPERATIONS)}
  # At most one kernel acts on an image, so any order would do. In this one XLA
  # fuses them, and only the first reads more of the image than a single pixel.
  table = kernels.tables(images, chosen, arguments)
  images = kernels.enhance(images, chosen, arguments)
  images = kernels.look_up(images, table)
  return kernels.warp(images, chosen, arguments, centre)


def distort(
  keys: jax.Array, images: jax.Array, operation: jax.Array, strength: jax.Array
) -> jax.Array:
  """Applies to each image its own operation, in a random direction and place.

  The argument's sign is a fair coin for the operations in `SIGNED`; the middle
  of Cutout's box is uniform over the pixels.

  Args:
    keys: `[B]` random keys, one per image.
    images: `[B, H, W, 3]` uint8.
    operation: `[B]` int32, indices into `OPERATIONS`; −1 for none at all.
    strength: `[B]` float32, the arguments without their signs.

  Returns:
    `[B, H, W, 3]` uint8.

  Example:
    >>> keys = jax.random.split(jax.random.key(0), 1)
    >>> images = jnp.zeros((1, 8, 8, 3), jnp.uint8)
    >>> operation = jnp.array([OPERATIONS.index('Cutout')])
    >>> images = jax.jit(distort)(keys, images, operation, jnp.array([8.]))
    >>> images.mean().item()
    128.0

  Reference:
    Cubuk et al., 2019, section 3, https://arxiv.org/abs/1805.09501
  """
  negative, centre = draw_sign_and_centre(keys, *images.shape[1:3])
  signed = jnp.array([name in SIGNED for name in OPERATIONS])[operation]
  arguments = jnp.where(signed & negative, -strength, strength)
  return apply_operations(images, operation, arguments, centre)


def draw_sign_and_centre(
  keys: jax.Array, height: int, width: int
) -> tuple[jax.Array, jax.Array]:
  """Draws what is random about an operation, once it is chosen.

  Args:
    keys: `[B]` random keys, one per image.
    height: H, pixels.
    width: W, pixels.

  Returns:
    Whether the argument is negative, `[B]` bool, a fair coin. And the middle
    (y, x) of Cutout's box, `[B, 2]` int32, uniform over the pixels.

  Example:
    >>> keys = jax.random.split(jax.random.key(0), 8)
    >>> negative, centre = draw_sign_and_centre(keys, 24, 32)
    >>> negative.shape, centre.shape
    ((8,), (8, 2))
  """
  uniform = jax.vmap(lambda key: jax.random.uniform(key, (3,)))(keys)
  size = jnp.array([[height, width]], jnp.float32)
  return uniform[:, 0] < 0.5, (uniform[:, 1:] * size).astype(jnp.int32)


def to_uint8(images: jax.Array) -> jax.Array:
  """Clips to 0..255 and drops fractions; what uint8 holds already stays.

  Args:
    images: `[B, H, W, 3]`, uint8 or floating.

  Returns:
    `[B, H, W, 3]` uint8.

  Example:
    >>> to_uint8(jnp.array([-3., 7.9, 300.])).tolist()
    [0, 7, 255]
  """
  return jnp.clip(images, 0, 255).astype(jnp.uint8)
