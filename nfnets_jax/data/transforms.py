"""Crops, flips and resizes images, and prepares those of evaluation.

What is random is a function of numbers that are given to it, uniform in [0, 1).

`train_crop` knows these crops:

* `'random_resized'`, or `'random_resized_0.25'` for another minimal area: a box
  of random area and aspect ratio, resized; the crop of ImageNet training;
* `'pad_4'`: pad by so many black pixels and take a random window of the size
  before; the crop of CIFAR training;
* `'none'`: the whole image, resized.

`eval_transform` knows these:

* `'resize_crop_32'`: resize both sides to px + 32, take the central px; the
  whole image is squashed into a square. The evaluation of the NFNets;
* `'resize_crop_0.875'`: likewise, with both sides resized to px / 0.875;
* `'crop_resize'`: take the central square of px / (px + 32) of the shorter
  side, resize; keeps the proportions;
* `'resize'`: the whole image, resized; for small square images.

Differences:
  * Pixels are rounded to uint8 after the resize, as they cross to the device
    in that form; the released code keeps float32. The mean difference is a
    quarter of a level, 0.004 in normalised units. At sharp edges the kernel
    overshoots by up to 36 levels, which uint8 cuts off at 0 and 255. The
    released code casts to uint8 for RandAugment alone, after mixing, and rounds
    down: there levels are half a level higher here, on average.
  * The released random crop asks for 8 % of the area, and also for 10 % of the
    object, which it says is the whole image. Both together ask for 10 %, the
    default of `min_area` here. So does EfficientNet's official code; its config
    here asks for the 8 % alone, `random_resized_0.08`.
  * Evaluation and `nfnets_jax.predict` resize as TensorFlow does; the released
    notebook resizes with PIL's bicubic, which smooths when it reduces.

Reference:
  Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition
  Without Normalization", 2021, Appendix A, https://arxiv.org/abs/2102.06171
  Szegedy et al., "Going Deeper with Convolutions", 2014, section 6: the random
  crop, https://arxiv.org/abs/1409.4842
  Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import sparse

from nfnets_jax.data import decode

Example = Mapping[str, Any]
# Of n images and `[n, CROP_DRAWS]` numbers, uniform in [0, 1).
Crop = Callable[[Sequence[np.ndarray], np.ndarray], Sequence[np.ndarray]]

TRAIN_CROPS = ('random_resized', 'random_resized_AREA', 'pad_PIXELS', 'none')
EVAL_CROPS = (
  'resize_crop_PIXELS',
  'resize_crop_FRACTION',
  'crop_resize',
  'resize',
)

# The released kernel reads its weights from a table of so many steps a pixel.
# Without that rounding a pixel is up to 0.13 of a level off.
_KERNEL_STEPS = 1024
_STRIP = 64  # pixels
_TRIES = 10
CROP_DRAWS = 4 * _TRIES  # the most that a crop takes


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


def random_resized_crop(
  image: np.ndarray,
  uniform: np.ndarray,
  min_area: float = 0.1,
  center: float = 1.0,
) -> np.ndarray:
  """Cuts out a box of random area and aspect ratio.

  The ratio of width to height is uniform in [3/4, 4/3], then the height among
  those that fit into the image and cover at least `min_area` of it, then the
  place. A ratio that leaves no height is drawn again, up to ten times; after
  that, as for an image more narrow than 10 : 1, the central square is taken. As
  in the released code it is also taken in place of a box that is the whole
  image.

  Args:
    image: `[H, W, C]`.
    uniform: `[40]`, uniform in [0, 1): four for each try.
    min_area: the least area of the box, as a fraction of the image's, in
      (0, 1].
    center: the side of the central square, as a fraction of the shorter side.

  Returns:
    A view `[h, w, C]` of the image.

  Example:
    >>> image = np.zeros((60, 80, 3), np.uint8)
    >>> height, width, _ = random_resized_crop(
    ...   image, np.random.default_rng(0).random(40)
    ... ).shape
    >>> height * width >= 0.1 * 60 * 80
    True
  """
  height, width = image.shape[:2]
  box = _random_box(height, width, uniform, min_area)
  if box is None:
    return _center_crop(image, max(1, int(center * min(height, width))))
  return image[box]


def pad_crop(
  images: np.ndarray, uniform: np.ndarray, pixels: int = 4
) -> list[np.ndarray]:
  """Pads images with black and cuts out random windows of their own size.

  Args:
    images: `[n, H, W, C]`.
    uniform: `[n, 2]` or more numbers, uniform in [0, 1).
    pixels: how far to pad each side, and so how far to shift at most.

  Returns:
    n views `[H, W, C]`, the images moved by up to `pixels` along each axis.

  Example:
    >>> images = np.ones((1, 8, 8, 3), np.uint8)
    >>> pad_crop(images, np.array([[0.0, 0.5]]), pixels=2)[0][..., 0].sum()
    np.uint64(48)
  """
  n, height, width, channels = images.shape
  padded = np.zeros(
    (n, height + 2 * pixels, width + 2 * pixels, channels), images.dtype
  )
  padded[:, pixels : pixels + height, pixels : pixels + width] = images
  corners = (uniform[:, :2] * (2 * pixels + 1)).astype(int).tolist()
  return [
    image[top : top + height, left : left + width]
    for image, (top, left) in zip(padded, corners, strict=True)
  ]


def train_crop(name: str, image_size: int) -> Crop:
  """Returns the crop of that name.

  Args:
    name: `'random_resized'`, `'random_resized_AREA'`, `'pad_PIXELS'` or
      `'none'`; see the module's docstring.
    image_size: the side that the crop is then resized to, in pixels.

  Returns:
    A function of n images `[H, W, C]` and `[n, CROP_DRAWS]` numbers, uniform in
    [0, 1), which returns n crops.

  Raises:
    ValueError: if there is no such crop, or its number makes no sense.

  Example:
    >>> crop = train_crop('pad_4', image_size=32)
    >>> images = np.zeros((1, 28, 28, 3), np.uint8)
    >>> crop(images, np.zeros((1, CROP_DRAWS)))[0].shape
    (28, 28, 3)
  """
  # The released fallback is the crop of evaluation.
  center = image_size / (image_size + 32)
  match _split_number(name):
    case 'none', None:
      return lambda images, uniform: images
    case 'random_resized', None:
      return _each(functools.partial(random_resized_crop, center=center))
    case 'random_resized', int(area) | float(area) if 0 < area <= 1:
      return _each(
        functools.partial(random_resized_crop, min_area=area, center=center)
      )
    case 'pad', int(pixels):
      return functools.partial(_pad_crops, pixels=pixels)
  raise ValueError(
    f'unknown crop {name!r} for training, choose from {", ".join(TRAIN_CROPS)} '
    'with 0 < AREA <= 1 and a whole number of PIXELS'
  )


def eval_transform(
  image_size: int, crop: str = 'resize_crop_32'
) -> Callable[[Example], dict[str, Any]]:
  """Makes the transform of evaluation examples: decode, crop, resize.

  Args:
    image_size: the side of the square result, in pixels.
    crop: `'resize_crop_PIXELS'`, `'resize_crop_FRACTION'`, `'crop_resize'` or
      `'resize'`; see the module's docstring.

  Returns:
    A function of an example, which returns
    `{'image': uint8 [image_size, image_size, 3], 'label': np.int32}`.

  Raises:
    ValueError: if there is no such crop, or its number makes no sense.

  Example:
    >>> transform = eval_transform(image_size=64, crop='crop_resize')
    >>> example = {'image': np.zeros((90, 120, 3), np.uint8), 'label': 3}
    >>> transform(example)['image'].shape
    (64, 64, 3)
  """
  view = _eval_view(crop, image_size)

  def transform(example: Example) -> dict[str, Any]:
    image = view(_decode(example))
    return {'image': image, 'label': np.int32(example['label'])}

  return transform


def _decode(example: Example) -> np.ndarray:
  return decode.decode(example['image'], example.get('orient', False))


def _each(crop: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Crop:
  return lambda images, uniform: list(map(crop, images, uniform))


def _pad_crops(
  images: Sequence[np.ndarray], uniform: np.ndarray, pixels: int
) -> list[np.ndarray]:
  """Is `pad_crop` of images that may differ in size."""
  if same_shape(images):
    return pad_crop(np.stack(images), uniform, pixels)
  return [
    pad_crop(image[None], numbers[None], pixels)[0]
    for image, numbers in zip(images, uniform, strict=True)
  ]


def _eval_view(name: str, px: int) -> Callable[[np.ndarray], np.ndarray]:
  """Returns the function that makes an image `[px, px, 3]`."""
  match _split_number(name):
    case 'resize', None:
      return functools.partial(resize, height=px, width=px)
    case 'crop_resize', None:
      return functools.partial(_crop_resize, px=px)
    case 'resize_crop', int(pixels):
      return functools.partial(_resize_crop, side=px + pixels, px=px)
    case 'resize_crop', float(fraction) if 0 < fraction <= 1:
      return functools.partial(_resize_crop, side=round(px / fraction), px=px)
  raise ValueError(
    f'unknown crop {name!r} for evaluation, choose from '
    f'{", ".join(EVAL_CROPS)} with a whole number of PIXELS and a decimal '
    '0 < FRACTION <= 1'
  )


def _split_number(name: str) -> tuple[str, int | float | None]:
  """Splits 'pad_4' into 'pad' and 4; a name without a number has None."""
  match = re.fullmatch(r'(\w+)_(\d+(\.\d+)?)', name)
  if match is None:
    return name, None
  kind, number, decimals = match.groups()
  return kind, float(number) if decimals else int(number)


def _random_box(
  height: int, width: int, uniform: np.ndarray, min_area: float
) -> tuple[slice, slice] | None:
  """Draws the rows and columns of `random_resized_crop`, None for a center."""
  least = min_area * height * width
  for shape, size, down, right in uniform[:CROP_DRAWS].reshape(-1, 4).tolist():
    ratio = 3 / 4 + shape * (4 / 3 - 3 / 4)
    low = max(1, round((least / ratio) ** 0.5))
    high = min(height, int(width / ratio))
    if low > high:
      continue
    h = low + int(size * (high - low + 1))
    w = round(h * ratio)
    if least <= h * w and 1 <= w <= width:
      if (h, w) == (height, width):
        return None
      top = int(down * (height - h + 1))
      left = int(right * (width - w + 1))
      return slice(top, top + h), slice(left, left + w)
  return None


def _crop_resize(image: np.ndarray, px: int) -> np.ndarray:
  side = max(1, int(px / (px + 32) * min(image.shape[:2])))
  return resize(_center_crop(image, side), px, px)


def _resize_crop(image: np.ndarray, side: int, px: int) -> np.ndarray:
  return _center_crop(resize(image, side, side), px)


def _center_crop(image: np.ndarray, side: int) -> np.ndarray:
  height, width = image.shape[:2]
  rows, columns = _center_box(height, width, side)
  return image[rows, columns]


def _center_box(height: int, width: int, side: int) -> tuple[slice, slice]:
  """Finds the central square; an odd pixel is left over below and right."""
  top, left = (height - side + 1) // 2, (width - side + 1) // 2
  return slice(top, top + side), slice(left, left + side)


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
