"""Resizes images as the released pipeline does.

Differences:
  * Pixels are rounded to uint8 after the resize, the format sent to the device;
    the released code keeps float32. The mean difference is a quarter of a
    level, 0.004 in normalised units. At sharp edges the kernel overshoots by up
    to 36 levels, which uint8 clips. The released code casts to uint8 only for
    RandAugment, after mixing, and rounds down: half a level lower on average.
  * Evaluation and `nfnets_jax.predict` resize as TensorFlow does; the released
    notebook uses PIL's bicubic, which antialiases when downscaling.

Reference:
  Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981
"""

import functools
from collections.abc import Sequence

import numpy as np
from scipy import sparse

# The released kernel looks its weights up in a table with this many steps per
# pixel. Without that rounding a pixel is off by up to 0.13 of a level.
_KERNEL_STEPS = 1024
_STRIP = 64  # pixels


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """Resizes uint8 `[H, W, 3]` to uint8 `[height, width, 3]`.

  Rounds and clips the result of `interpolate`.

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


def same_shape(images: Sequence[np.ndarray]) -> bool:
  """Returns whether the images can be stacked."""
  return len({image.shape for image in images}) == 1


def resize_and_mirror(
  images: np.ndarray, size: int, mirrored: np.ndarray
) -> np.ndarray:
  """Resizes images to squares and flips some of them horizontally.

  Args:
    images: uint8 `[n, H, W, 3]`.
    size: side of the squares in pixels.
    mirrored: `[n]` bool.

  Returns:
    uint8 `[n, size, size, 3]`, a new array: `resize` of each image.

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
    # In column-major order, mirroring moves whole columns rather than pixels.
    _copy_by_rows(image[:, ::-1] if flip else image, out)
  return resized


def _resize_by_columns(
  images: np.ndarray, height: int, width: int
) -> np.ndarray:
  """Resizes uint8 `[n, H, W, C]`; the result may be column-major."""
  if images.shape[1:3] == (height, width):
    return images
  levels = interpolate(images, height, width)
  np.rint(levels, out=levels)
  pixels = levels.astype(np.int16)  # half the size, for speed
  np.clip(pixels, 0, 255, out=pixels)
  return pixels.astype(np.uint8)


def interpolate(images: np.ndarray, height: int, width: int) -> np.ndarray:
  """Resizes images by bicubic interpolation.

  Keys' cubic convolution with a = -0.5, sampled at pixel centres. The kernel
  spans four input pixels at any scale (no antialiasing). At the edges, weights
  outside the image are dropped and the others rescaled to sum to one. This is
  the released pipeline's method; it costs two passes of four multiplications.

  Args:
    images: `[n, H, W, C]`, any real dtype.
    height: new height in pixels.
    width: new width in pixels.

  Returns:
    float32 `[n, height, width, C]`, column-major; negative lobes of the kernel
    may exceed the input's range by about an eighth.

  Example:
    >>> edge = np.array([0, 0, 100, 100])[None, None, :, None]
    >>> interpolate(edge, 1, 8).round().ravel().tolist()
    [0.0, -2.0, -7.0, 20.0, 80.0, 107.0, 102.0, 100.0]
  """
  used_rows, row_weights = _interpolation(images.shape[1], height)
  used_columns, column_weights = _interpolation(images.shape[2], width)
  # Bounds the float32 memory for large images.
  images = images[:, used_rows][:, :, used_columns]
  n, old_height, old_width, channels = images.shape
  # A sparse product does each pass in one sweep without copying pixels, and
  # without BLAS, which would start threads under each of the loader's.
  rows = images.transpose(1, 0, 2, 3).reshape(old_height, -1)
  rows = row_weights @ rows.astype(np.float32)
  columns = np.ascontiguousarray(rows.T)
  columns = columns.reshape(n, old_width, channels * height).transpose(1, 0, 2)
  columns = column_weights @ columns.reshape(old_width, -1)
  return columns.reshape(width, n, channels, height).transpose(1, 3, 0, 2)


def _copy_by_rows(image: np.ndarray, out: np.ndarray) -> None:
  """Copies an image that may be column-major or mirrored."""
  if image.flags.c_contiguous:
    out[...] = image
    return
  # Transposing in strips, which fit into the L1 cache, takes half the time.
  columns = np.ascontiguousarray(image.transpose(1, 2, 0))
  for left in range(0, image.shape[1], _STRIP):
    strip = columns[left : left + _STRIP]
    out[:, left : left + _STRIP] = strip.transpose(2, 0, 1)


# Random crops have a few hundred different sides; at 224 px each takes 8 kB.
@functools.lru_cache(maxsize=1024)
def _interpolation(
  old: int, new: int
) -> tuple[slice | np.ndarray, sparse.csr_array]:
  """Returns the used pixels of an axis, and float32 weights `[new, pixels]`."""
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
  if old > 4 * new:  # otherwise nearly all pixels are used
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
