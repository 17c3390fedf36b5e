"""Crops for training and evaluation.

Random crops are deterministic functions of the uniform numbers they are given.

Crops of `train_crop`:

* `'random_resized'`: a box of random area and aspect ratio, resized; the crop
  of ImageNet training. `'random_resized_0.25'` sets the minimal area;
* `'pad_4'`: pad by 4 black pixels and cut out a random window of the original
  size; the crop of CIFAR training;
* `'none'`: the whole image, resized.

Crops of `eval_crop`:

* `'resize_crop_32'`: resize both sides to px + 32 regardless of aspect ratio,
  then crop the central px; the evaluation of NFNets;
* `'resize_crop_0.875'`: the same, with both sides resized to px / 0.875;
* `'crop_resize'`: crop the central square, px / (px + 32) of the shorter side,
  then resize; keeps the aspect ratio; `'crop_resize_0.9'` sets the fraction, as
  timm's `crop_pct`;
* `'resize'`: the whole image, resized; for small square images.

Differences:
  * The released random crop requires 8 % of the area and also 10 % of the
    object, which it sets to the whole image: 10 % in effect, the default of
    `min_area` here. EfficientNet's official code does the same.

Reference:
  Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition
  Without Normalization", 2021, Appendix A, https://arxiv.org/abs/2102.06171
  Szegedy et al., "Going Deeper with Convolutions", 2014, section 6: the random
  crop, https://arxiv.org/abs/1409.4842
"""

import difflib
import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from nfnets_jax.data import resize

# Maps n images `[H, W, C]` and `[n, NUM_DRAWS]` numbers in [0, 1) to n crops.
TrainCrop = Callable[[Sequence[np.ndarray], np.ndarray], Sequence[np.ndarray]]

TRAIN_CROPS = ('random_resized', 'random_resized_AREA', 'pad_PIXELS', 'none')
EVAL_CROPS = (
  'resize_crop_PIXELS',
  'resize_crop_FRACTION',
  'crop_resize',
  'crop_resize_FRACTION',
  'resize',
)

_TRIES = 10
NUM_DRAWS = 4 * _TRIES  # the most that any crop uses


def random_resized_crop(
  image: np.ndarray,
  uniform: np.ndarray,
  min_area: float = 0.1,
  center: float = 1.0,
) -> np.ndarray:
  """Crops a box of random area and aspect ratio.

  The aspect ratio (width / height) is uniform in [3/4, 4/3]; the height is
  uniform over those that fit and cover at least `min_area`; then the position
  is uniform. If no height fits, the ratio is redrawn, up to ten times. The
  fallback, as for images narrower than 10 : 1, is the central square. As in the
  released code, the central square also replaces a box of the whole image.

  Args:
    image: `[H, W, C]`.
    uniform: `[40]`, uniform in [0, 1): four per try.
    min_area: minimal area of the box as a fraction of the image, in (0, 1].
    center: side of the central square as a fraction of the shorter side.

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
  """Pads images with black and crops random windows of the original size.

  Args:
    images: `[n, H, W, C]`.
    uniform: `[n, 2]` or more columns, uniform in [0, 1).
    pixels: padding of each side, and thus the largest shift.

  Returns:
    n views `[H, W, C]`.

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


def train_crop(name: str, image_size: int) -> TrainCrop:
  """Returns a training crop by name.

  Args:
    name: one of `TRAIN_CROPS`; see the module docstring.
    image_size: side in pixels to which the crop is later resized.

  Raises:
    ValueError: if the name is unknown or its number is out of range.

  Example:
    >>> crop = train_crop('pad_4', image_size=32)
    >>> images = np.zeros((1, 28, 28, 3), np.uint8)
    >>> crop(images, np.zeros((1, NUM_DRAWS)))[0].shape
    (28, 28, 3)
  """
  # As released, the fallback is the evaluation crop.
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


def eval_crop(name: str, image_size: int) -> Callable[[np.ndarray], np.ndarray]:
  """Returns an evaluation crop by name, including the resize.

  Args:
    name: one of `EVAL_CROPS`; see the module docstring.
    image_size: side of the square result in pixels.

  Returns:
    A function from uint8 `[H, W, 3]` to uint8 `[image_size, image_size, 3]`.

  Raises:
    ValueError: if the name is unknown or its number is out of range.

  Example:
    >>> crop = eval_crop('crop_resize', image_size=64)
    >>> crop(np.zeros((90, 120, 3), np.uint8)).shape
    (64, 64, 3)
  """
  px = image_size
  match _split_number(name):
    case 'resize', None:
      return functools.partial(resize.resize, height=px, width=px)
    case 'crop_resize', None:
      return functools.partial(_crop_resize, px=px, fraction=px / (px + 32))
    case 'crop_resize', float(fraction) if 0 < fraction <= 1:
      return functools.partial(_crop_resize, px=px, fraction=fraction)
    case 'resize_crop', int(pixels):
      return functools.partial(_resize_crop, side=px + pixels, px=px)
    case 'resize_crop', float(fraction) if 0 < fraction <= 1:
      return functools.partial(_resize_crop, side=round(px / fraction), px=px)
  known = ('crop_resize', 'resize', 'resize_crop_32', 'resize_crop_0.875')
  near = difflib.get_close_matches(name, known, n=1)
  guess = f' (did you mean {near[0]}?)' if near else ''
  raise ValueError(
    f'unknown crop {name!r} for evaluation{guess}, choose from '
    f'{", ".join(EVAL_CROPS)} with a whole number of PIXELS and a decimal '
    '0 < FRACTION <= 1'
  )


def _each(crop: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> TrainCrop:
  return lambda images, uniform: list(map(crop, images, uniform))


def _pad_crops(
  images: Sequence[np.ndarray], uniform: np.ndarray, pixels: int
) -> list[np.ndarray]:
  """Applies `pad_crop` to images that may differ in size."""
  if resize.same_shape(images):
    return pad_crop(np.stack(images), uniform, pixels)
  return [
    pad_crop(image[None], numbers[None], pixels)[0]
    for image, numbers in zip(images, uniform, strict=True)
  ]


def _split_number(name: str) -> tuple[str, int | float | None]:
  """Splits 'pad_4' into 'pad' and 4; the number is None if absent."""
  match = re.fullmatch(r'(\w+)_(\d+(\.\d+)?)', name)
  if match is None:
    return name, None
  kind, number, decimals = match.groups()
  return kind, float(number) if decimals else int(number)


def _random_box(
  height: int, width: int, uniform: np.ndarray, min_area: float
) -> tuple[slice, slice] | None:
  """Draws the box of `random_resized_crop`; None means the central square."""
  least = min_area * height * width
  for shape, size, down, right in uniform[:NUM_DRAWS].reshape(-1, 4).tolist():
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


def _crop_resize(image: np.ndarray, px: int, fraction: float) -> np.ndarray:
  side = max(1, int(fraction * min(image.shape[:2])))
  return resize.resize(_center_crop(image, side), px, px)


def _resize_crop(image: np.ndarray, side: int, px: int) -> np.ndarray:
  return _center_crop(resize.resize(image, side, side), px)


def _center_crop(image: np.ndarray, side: int) -> np.ndarray:
  height, width = image.shape[:2]
  rows, columns = _center_box(height, width, side)
  return image[rows, columns]


def _center_box(height: int, width: int, side: int) -> tuple[slice, slice]:
  """Returns the central square; an odd pixel remains below and on the right."""
  top, left = (height - side + 1) // 2, (width - side + 1) // 2
  return slice(top, top + side), slice(left, left + side)
