"""Three kernels that do the sixteen image operations, over a whole batch.

Computing every operation for every image and keeping one would waste most of
the work. Instead, each kernel does all the operations of one kind, with
parameters that leave an image as it is where its operation is of another kind:

* `tables` and `look_up`, a table per channel: AutoContrast, Equalize, Invert,
  Posterize, Solarize, SolarizeAdd, Contrast, Brightness;
* `warp`, an affine map of the pixels, and a box to fill: Rotate, ShearX,
  ShearY, TranslateX, TranslateY, Cutout;
* `enhance`, a blend with the grey or the smoothed image: Color, Sharpness.

Reference:
  Brock et al., 2021, appendix A, https://arxiv.org/abs/2102.06171
"""

import functools
import itertools
from collections.abc import Mapping

import jax
from jax import numpy as jnp

FILL = 128  # what comes in from outside the image, and into Cutout's box


def tables(
  images: jax.Array, chosen: Mapping[str, jax.Array], arguments: jax.Array
) -> jax.Array:
  """What becomes of each level in each channel, for `look_up`.

  Args:
    images: `[B, H, W, 3]` uint8.
    chosen: `[B]` bool for the name of each operation: the images it is for.
    arguments: `[B]` float32: bits, threshold, levels or factor.

  Returns:
    `[B, 3, 256]` uint8, 0..255 in order for operations that use no table.
  """
  height, width = images.shape[1:3]
  counts = _histograms(images)
  level = jnp.arange(256, dtype=jnp.int32)[None, None]
  factor = arguments[:, None, None]
  integer = factor.astype(jnp.int32)
  shift = 8 - jnp.clip(integer, 1, 8)
  # The released code divides the number of pixels by 256 and calls it the mean.
  mean = jnp.full_like(level, min(height * width // 256, 255))
  entries = {
    'AutoContrast': _auto_contrast(counts, level),
    'Equalize': _equalize(counts, level),
    'Invert': 255 - level,
    'Posterize': level >> shift << shift,
    'Solarize': jnp.where(level < integer % 256, level, 255 - level),
    'SolarizeAdd': jnp.where(
      level < 128, jnp.minimum(level + integer, 255), level
    ),
    'Contrast': _blend(mean, level, factor),
    'Brightness': _blend(jnp.zeros_like(level), level, factor),
  }
  mine = jnp.stack([chosen[name] for name in entries], axis=1)
  stacked = jnp.stack(
    [jnp.broadcast_to(entry, counts.shape) for entry in entries.values()],
    axis=1,
  )
  # A product with a one-hot vector, exact for whole numbers up to 255. A select
  # would be fused by XLA into the gather of `look_up`, which would then compute
  # the entries of all operations anew for each pixel.
  table = jnp.einsum(
    'bn,bncl->bcl', mine.astype(jnp.float32), stacked.astype(jnp.float32)
  )
  table = jnp.where(mine.any(1)[:, None, None], table.astype(jnp.int32), level)
  return table.astype(jnp.uint8)


def _histograms(images: jax.Array) -> jax.Array:
  """How many pixels have each level in each channel, `[B, 3, 256]` int32."""
  batch_size, _, _, channels = images.shape
  rows = jnp.arange(batch_size * channels, dtype=jnp.int32)
  rows = rows.reshape(batch_size, 1, 1, channels)
  bins = (256 * rows + images.astype(jnp.int32)).ravel()
  counts = jnp.zeros(batch_size * channels * 256, jnp.int32)
  counts = counts.at[bins].add(1, mode='promise_in_bounds')
  return counts.reshape(batch_size, channels, 256)


def _auto_contrast(counts: jax.Array, level: jax.Array) -> jax.Array:
  """Stretches each channel's range to 0..255, unless it is a single level."""
  low = jnp.min(level, axis=2, where=counts > 0, initial=255, keepdims=True)
  high = jnp.max(level, axis=2, where=counts > 0, initial=0, keepdims=True)
  stretched = (level - low) * 255 // jnp.maximum(high - low, 1)
  return jnp.where(high > low, jnp.clip(stretched, 0, 255), level)


def _equalize(counts: jax.Array, level: jax.Array) -> jax.Array:
  """Flattens each channel's histogram, in steps of whole pixel counts."""
  below = jnp.cumsum(counts, axis=2) - counts
  # The pixels of the highest level do not count: there is no step above them.
  step = below.max(2, where=counts > 0, initial=0, keepdims=True) // 255
  flat = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255)
  return jnp.where(step > 0, flat, level)


def look_up(images: jax.Array, table: jax.Array) -> jax.Array:
  """Replaces each value by its entry in a table of its image and channel.

  Args:
    images: `[B, H, W, 3]` uint8.
    table: `[B, 3, 256]` uint8.

  Returns:
    `[B, H, W, 3]` uint8.
  """
  batch_size, _, _, channels = images.shape
  start = 256 * jnp.arange(channels, dtype=jnp.int32)[None, None, None]
  index = (images.astype(jnp.int32) + start).reshape(batch_size, -1)
  table = table.reshape(batch_size, -1)
  values = jnp.take_along_axis(table, index, axis=1, mode='promise_in_bounds')
  return values.reshape(images.shape)


def warp(
  images: jax.Array,
  chosen: Mapping[str, jax.Array],
  arguments: jax.Array,
  centre: jax.Array,
) -> jax.Array:
  """Moves pixels by an affine map, nearest neighbour, and fills Cutout's box.

  The pixel (x, y) of the result is the pixel (x', y') of the image, with

    x' = cos · x − sin · y + shear_x · y + dx,
    y' = sin · x + cos · y + shear_y · x + dy.

  Args:
    images: `[B, H, W, 3]` uint8.
    chosen: `[B]` bool for the name of each operation: the images it is for.
    arguments: `[B]` float32: degrees, pixels per pixel or pixels.
    centre: `[B, 2]` int32, the pixel (y, x) in the middle of Cutout's box.

  Returns:
    `[B, H, W, 3]` uint8, `FILL` where there is no pixel (x', y').
  """
  batch_size, height, width, channels = images.shape

  def only(name: str) -> jax.Array:
    """The arguments of this operation, and 0 for all others."""
    return jnp.where(chosen[name], arguments, 0)[:, None, None]

  x = jnp.arange(width, dtype=jnp.float32)[None, None]
  y = jnp.arange(height, dtype=jnp.float32)[None, :, None]
  angle = jnp.deg2rad(only('Rotate'))
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  # A rotation is about the middle of the image: that pixel stays in its place.
  right, bottom = width - 1, height - 1
  dx = only('TranslateX') + (right - cos * right + sin * bottom) / 2
  dy = only('TranslateY') + (bottom - sin * right - cos * bottom) / 2
  from_x = _nearest(cos * x + (only('ShearX') - sin) * y + dx)
  from_y = _nearest(cos * y + (only('ShearY') + sin) * x + dy)

  known = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
  index = jnp.where(known, from_y * width + from_x, 0)
  moved = jnp.take_along_axis(
    images.reshape(batch_size, -1, channels),
    index.reshape(batch_size, -1, 1),
    axis=1,
    mode='promise_in_bounds',
  )

  half = only('Cutout').astype(jnp.int32)
  down = jnp.arange(height)[None, :, None] - centre[:, 0, None, None]
  across = jnp.arange(width)[None, None] - centre[:, 1, None, None]
  box = (-half <= down) & (down < half) & (-half <= across) & (across < half)
  kept = (known & ~box)[..., None]
  return jnp.where(kept, moved.reshape(images.shape), jnp.uint8(FILL))


def _nearest(x: jax.Array) -> jax.Array:
  """The nearest integer; half way goes away from zero."""
  rounded = jax.lax.round(x, jax.lax.RoundingMethod.AWAY_FROM_ZERO)
  return rounded.astype(jnp.int32)


def enhance(
  images: jax.Array, chosen: Mapping[str, jax.Array], arguments: jax.Array
) -> jax.Array:
  """Moves away from the grey image (Color) or the smoothed one (Sharpness).

  Args:
    images: `[B, H, W, 3]` uint8.
    chosen: `[B]` bool for the name of each operation: the images it is for.
    arguments: `[B]` float32: factor; 0 is the other image, 1 the image itself.

  Returns:
    `[B, H, W, 3]` uint8.
  """
  color, sharpness = (
    chosen[name][:, None, None, None] for name in ('Color', 'Sharpness')
  )
  factor = jnp.where(color | sharpness, arguments[:, None, None, None], 1)
  degenerate = jnp.where(color, _grey(images), _smooth(images))
  return _blend(degenerate, images, factor).astype(jnp.uint8)


def _grey(images: jax.Array) -> jax.Array:
  """The luma of each pixel, `[B, H, W, 1]` uint8."""
  red, green, blue = jnp.split(images.astype(jnp.float32), 3, axis=-1)
  luma = 0.2989 * red + 0.587 * green + 0.114 * blue
  # The released code goes through 0..1 and back with half a level more.
  return (luma * (255.5 / 255)).astype(jnp.uint8)


def _smooth(images: jax.Array) -> jax.Array:
  """A 3 × 3 mean in which the centre counts 5 times; borders stay."""
  batch_size, height, width, channels = images.shape
  # Rows are flat: the innermost dimension is a long one, the neighbour to the
  # right is `channels` places away.
  rows = images.reshape(batch_size, height, width * channels)
  pixels = rows.astype(jnp.float32)
  products = (
    (5 if i == j == 1 else 1)
    / 13
    * pixels[:, i : height - 2 + i, j * channels : (width - 2 + j) * channels]
    for i, j in itertools.product(range(3), range(3))
  )
  # Fractions are dropped, so the last bit matters where the mean is a whole
  # number: this order becomes the chain of fused multiply-adds of the released
  # code's convolution.
  total = functools.reduce(lambda total, product: product + total, products)
  inner = jnp.clip(total, 0, 255).astype(jnp.uint8)
  rows = rows.at[:, 1:-1, channels:-channels].set(inner)
  return rows.reshape(images.shape)


def _blend(
  degenerate: jax.Array, image: jax.Array, factor: jax.Array
) -> jax.Array:
  """`degenerate + factor · (image − degenerate)` as int32 in 0..255."""
  start, end = degenerate.astype(jnp.float32), image.astype(jnp.float32)
  value = start + factor * (end - start)
  return jnp.clip(value, 0, 255).astype(jnp.int32)
