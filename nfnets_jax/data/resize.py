"""Resizes images as the released pipeline does.

Differences:
  * Pixels are rounded to uint8 after the resize, as they cross to the device
    in that form; the released code keeps float32. The mean difference is a
    quarter of a level, 0.004 in normalised units. At sharp edges the kernel
    overshoots by up to 36 levels, which uint8 cuts off at 0 and 255. The
    released code casts to uint8 for RandAugment alone, after mixing, and rounds
    down: there levels are half a level higher here, on average.
  * Evaluation and `nfnets_jax.predict` resize as TensorFlow does; the released
    notebook resizes with PIL's bicubic, which smooths when it reduces.

Reference:
  Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981
"""

import functools
from collections.abc import Sequence

import numpy as np
from scipy import sparse

# The released kernel reads its weights from a table of so many steps a pixel.
# Without that rounding a pixel is up to 0.13 of a level off.
_KERNEL_STEPS = 1024
_STRIP = 64  # pixels


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """Resizes an image by bicubic interpolation, rounding to whole levels.

  Args:
    image: uint8 `[H, W, 3]`.
    height: the new height in pixels.
    width: the new width in pixels.

  Returns:
    uint8 `[height, width, 3]`: `resize_float`, rounded and clipped.

  Example:
    >>> image = np.full((5, 7, 3), 200, np.uint8)
    >>> resized = resize(image, 4, 4)
    >>> resized.shape, resized.dtype, np.unique(resized).tolist()
    ((4, 4, 3), dtype('uint8'), [200])
  """
  images = _resize_by_columns(image[None], height, width)
  resized = np.empty((height, width, image.shape[-1]), np.uint8)
  _copy_by_rows(images[0], resized)
  return resized


def resize_float(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """Resizes an image by bicubic interpolation.

  The interpolation is Keys' cubic convolution with a = -0.5, sampled at the
  centres of the pixels. The kernel spans four pixels of the input whatever the
  scale (no antialiasing), and at the edges the weights that fall outside the
  image are dropped and the others rescaled to sum to one. That is what the
  released pipeline does; it costs two passes of four multiplications.

  Args:
    image: `[H, W, C]`, any real type.
    height: the new height in pixels.
    width: the new width in pixels.

  Returns:
    float32 `[height, width, C]`; it may leave the input's range by about an
    eighth, as the kernel has negative lobes.

  Example:
    >>> edge = np.array([0, 0, 100, 100])[None, :, None]
    >>> resize_float(edge, 1, 8).round().ravel().tolist()
    [0.0, -2.0, -7.0, 20.0, 80.0, 107.0, 102.0, 100.0]
  """
  return _interpolate(image[None], height, width)[0]


def same_shape(images: Sequence[np.ndarray]) -> bool:
  """Returns whether images can be stacked."""
  return len({image.shape for image in images}) == 1


def resize_and_mirror(
  images: np.ndarray, size: int, mirrored: np.ndarray
) -> np.ndarray:
  """Resizes images to squares and mirrors some, left to right.

  Args:
    images: uint8 `[n, H, W, 3]`.
    size: the side of the squares, in pixels.
    mirrored: `[n]` bool.

  Returns:
    uint8 `[n, size, size, 3]`, an array of its own: `resize` of each image.

  Example:
    >>> images = np.arange(12, dtype=np.uint8).reshape(2, 1, 2, 3)
    >>> mirrored = np.array([True, False])
    >>> resize_and_mirror(images, 2, mirrored)[:, 0, :, 0].tolist()
    [[3, 0], [6, 9]]
  """
  resized = np.empty((len(images), size, size, 3), np.uint8)
  columns = _resize_by_columns(images, size, size)
  if size <= _STRIP:
    resized[...] = columns
    resized[mirrored] = resized[mirrored, :, ::-1]
    return resized
  for image, flip, out in zip(columns, mirrored, resized, strict=True):
    # Whole columns are mirrored in no time, pixels would be moved one by one.
    _copy_by_rows(image[:, ::-1] if flip else image, out)
  return resized


def _resize_by_columns(
  images: np.ndarray, height: int, width: int
) -> np.ndarray:
  """Resizes uint8 `[n, H, W, C]`; the result may lie column by column."""
  if images.shape[1:3] == (height, width):
    return images
  levels = _interpolate(images, height, width)
  np.rint(levels, out=levels)
  pixels = levels.astype(np.int16)  # half the size, for what follows
  np.clip(pixels, 0, 255, out=pixels)
  return pixels.astype(np.uint8)


def _interpolate(images: np.ndarray, height: int, width: int) -> np.ndarray:
  """Is `resize_float` of `[n, H, W, C]`; the result lies column by column."""
  used_rows, row_weights = _interpolation(images.shape[1], height)
  used_columns, column_weights = _interpolation(images.shape[2], width)
  # So that the memory in float32 does not grow with the image.
  images = images[:, used_rows][:, :, used_columns]
  n, old_height, old_width, channels = images.shape
  # Sparse matrices do each pass in one sweep over the rows of a matrix, without
  # a copy of every pixel for each of its four uses, and without BLAS, which
  # would start threads of its own under each of the loader's.
  rows = images.transpose(1, 0, 2, 3).reshape(old_height, -1)
  rows = row_weights @ rows.astype(np.float32)
  columns = np.ascontiguousarray(rows.T)
  columns = columns.reshape(n, old_width, channels * height).transpose(1, 0, 2)
  columns = column_weights @ columns.reshape(old_width, -1)
  return columns.reshape(width, n, channels, height).transpose(1, 3, 0, 2)


def _copy_by_rows(image: np.ndarray, out: np.ndarray) -> None:
  """Copies an image that may lie in memory column by column, or mirrored.

  Turned in strips, which fit into the nearest cache, it takes half the time.
  """
  if image.flags.c_contiguous:
    out[...] = image
    return
  columns = np.ascontiguousarray(image.transpose(1, 2, 0))
  for left in range(0, image.shape[1], _STRIP):
    strip = columns[left : left + _STRIP]
    out[:, left : left + _STRIP] = strip.transpose(2, 0, 1)


# Random crops have a few hundred different sides; at 224 px one takes 8 kB.
@functools.lru_cache(maxsize=1024)
def _interpolation(
  old: int, new: int
) -> tuple[slice | np.ndarray, sparse.csr_array]:
  """Returns which pixels of an axis a resize uses, and their weights.

  Args:
    old: the length of the axis, in pixels.
    new: the length that it gets.

  Returns:
    An index of the pixels, and float32 `[new, pixels]`, four weights a row,
    which sum to one.
  """
  scale = np.float32(old) / np.float32(new)
  centers = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * scale
  centers -= np.float32(0.5)
  left = np.floor(centers)
  fraction = np.rint((centers - left) * _KERNEL_STEPS) / _KERNEL_STEPS
  offsets = np.arange(-1, 3)
  taps = left.astype(np.int32)[:, None] + offsets
  x = np.abs(fraction[:, None] - offsets)
  near = (1.5 * x - 2.5) * x**2 + 1  # |x| <= 1
  far = ((2.5 - 0.5 * x) * x - 4) * x + 2  # 1 <= |x| <= 2, zero at both ends
  inside = (taps >= 0) & (taps < old)
  weights = np.where(inside, np.where(x <= 1, near, far), 0)
  weights /= weights.sum(axis=1, keepdims=True)
  columns = np.clip(taps, 0, old - 1).astype(np.int32).ravel()
  used: slice | np.ndarray = slice(None)
  count = old
  if old > 4 * new:  # else nearly all are used
    used, columns = np.unique(columns, return_inverse=True)
    count = len(used)
  matrix = sparse.csr_array(
    (
      weights.astype(np.float32).ravel(),
      columns.astype(np.int32),
      np.arange(0, 4 * new + 1, 4, dtype=np.int32),
    ),
    shape=(new, count),
  )
  return used, matrix
