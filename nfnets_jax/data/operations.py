"""The sixteen image operations of RandAugment.

Pillow is used where it agrees with the released code, numpy elsewhere.

Differences from the released code:
  * AutoContrast is exact; the released code is off by up to one level, from
    rounding in float32.
  * Posterize keeps all bits above magnitude 20, where the released code shifts
    by a negative number; no NFNet has such a magnitude.

As in the released code, and unlike Pillow or the papers:
  * Contrast blends with the constant `H · W / 256`, at most 255, instead of the
    mean of the grey image.
  * Solarize's threshold wraps around to 8 bits. At magnitude 10 it is 0, which
    inverts the image; at magnitude 15 it is 128, as at 5.
  * Posterize keeps at least one bit.
  * Color, Contrast, Brightness and Sharpness do nothing at magnitude 5.
  * Translations and the box of Cutout are in pixels at any image size, unless
    the policy scales them; see `randaugment.Policy`.

Reference:
  Cubuk et al., "AutoAugment: Learning Augmentation Policies from Data", 2019,
  appendix, https://arxiv.org/abs/1805.09501
  Brock et al., 2021, appendix A, https://arxiv.org/abs/2102.06171
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

# The argument of each operation at magnitude 10 · level.
_ARGUMENTS: dict[str, Callable[[float], float]] = {
  'AutoContrast': lambda level: 0.0,  # unused
  'Equalize': lambda level: 0.0,
  'Invert': lambda level: 0.0,
  'Rotate': lambda level: level * 30,  # degrees
  'Posterize': lambda level: float(int(level * 4)),  # bits kept
  'Solarize': lambda level: float(int(level * 256)),  # threshold, modulo 256
  'Color': lambda level: level * 1.8 + 0.1,  # factor, 1 is the identity
  'Contrast': lambda level: level * 1.8 + 0.1,
  'Brightness': lambda level: level * 1.8 + 0.1,
  'Sharpness': lambda level: level * 1.8 + 0.1,
  'ShearX': lambda level: level * 0.3,  # pixels per pixel
  'ShearY': lambda level: level * 0.3,
  'TranslateX': lambda level: level * 100,  # pixels
  'TranslateY': lambda level: level * 100,
  'Cutout': lambda level: float(int(level * 40)),  # pixels, half the side
  'SolarizeAdd': lambda level: float(int(level * 110)),  # to levels below 128
}
OPERATIONS = tuple(_ARGUMENTS)

# Operations whose argument has a random sign.
SIGNED = ('Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY')

# Operations whose argument is a length in pixels.
IN_PIXELS = ('TranslateX', 'TranslateY', 'Cutout')

FILL = 128  # level of pixels from outside the image and of Cutout's box
LEVELS = np.arange(256, dtype=np.int16)

MAX_MAGNITUDE = 30


def argument(name: str, magnitude: int) -> float:
  """Converts a magnitude, a common scale, to the argument of an operation.

  Args:
    name: one of `OPERATIONS`.
    magnitude: 0..`MAX_MAGNITUDE`; arguments are linear in it.

  Returns:
    The argument, without the random sign.

  Raises:
    ValueError: if the operation is unknown or the magnitude out of range.

  Example:
    >>> argument('Rotate', 15), argument('Color', 5), argument('Solarize', 3)
    (45.0, 1.0, 76.0)
  """
  if not 0 <= magnitude <= MAX_MAGNITUDE:
    raise ValueError(f'magnitude {magnitude} is not in 0..{MAX_MAGNITUDE}')
  if name not in _ARGUMENTS:
    raise ValueError(_unknown(name))
  return _ARGUMENTS[name](magnitude / 10)


def apply(
  name: str, image: np.ndarray, argument: float, center: tuple[int, int]
) -> np.ndarray:
  """Applies one operation to an image.

  Args:
    name: one of `OPERATIONS`.
    image: `[H, W, 3]` uint8; not modified.
    argument: in the unit of the operation, signed; see `argument`.
    center: pixel (y, x) at the centre of Cutout's box.

  Returns:
    `[H, W, 3]` uint8.

  Example:
    >>> image = np.full((4, 4, 3), 200, np.uint8)
    >>> int(apply('Invert', image, 0.0, (0, 0))[0, 0, 0])
    55
  """
  height, width, _ = image.shape
  match name:
    case 'AutoContrast':
      return _auto_contrast(image)
    case 'Equalize':
      return _equalize(image)
    case 'Invert':
      return ~image
    case 'Posterize':
      return image & (0xFF << (8 - min(max(int(argument), 1), 8)) & 0xFF)
    case 'Solarize':
      # XOR with all ones inverts the pixels at or above the threshold.
      return image ^ -(image >= int(argument) % 256).view(np.uint8)
    case 'SolarizeAdd':
      added = np.minimum(LEVELS + int(argument), 255)
      return _look_up(image, np.where(LEVELS < 128, added, LEVELS))
    case 'Contrast':
      # As released: the number of pixels divided by 256, not the mean.
      mean = min(height * width // 256, 255)
      return _look_up(
        image, _blend(np.full_like(LEVELS, mean), LEVELS, argument)
      )
    case 'Brightness':
      return _look_up(image, _blend(np.zeros_like(LEVELS), LEVELS, argument))
    case 'Color':
      return _color(image, argument)
    case 'Sharpness':
      return _blend(_smooth(image), image, argument)
    case 'Rotate':
      return _rotate(image, argument)
    case 'ShearX':
      return _shear(image, argument, axis=1)
    case 'ShearY':
      return _shear(image, argument, axis=0)
    case 'TranslateX':
      return _translate(image, 0, int(argument))
    case 'TranslateY':
      return _translate(image, int(argument), 0)
    case 'Cutout':
      half, (y, x) = int(argument), center
      image = image.copy()
      image[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = FILL
      return image
  raise ValueError(_unknown(name))


def _unknown(name: str) -> str:
  return f'{name!r} is not one of {", ".join(OPERATIONS)}'


def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
  """Maps each level through a table of 256."""
  # Faster than `np.take`, which converts the levels to 64-bit indices.
  pixels = bytearray(image.data).translate(table.astype(np.uint8).tobytes())
  return np.frombuffer(pixels, np.uint8).reshape(image.shape)


def _auto_contrast(image: np.ndarray) -> np.ndarray:
  """Stretches each channel to 0..255, unless it is constant."""
  height, width, channels = image.shape
  # By rows: numpy is slow if the last axis is short.
  rows = image.reshape(height, -1)
  low = rows.min(0).reshape(width, channels).min(0)
  high = rows.max(0).reshape(width, channels).max(0)
  flat = low == high
  low[flat], high[flat] = 0, 255
  # Slightly above 255, so that rounding errors do not truncate integers to the
  # level below. All other values are at least 1/255 below the next integer.
  factor = np.float32(255.0001) / (high - low)
  stretched = (rows - np.tile(low, width)) * np.tile(factor, width)
  return stretched.astype(np.uint8).reshape(image.shape)


def _equalize(image: np.ndarray) -> np.ndarray:
  """Equalizes each channel's histogram, with an integer step of pixels."""
  picture = Image.fromarray(image)
  counts = np.reshape(picture.histogram(), (3, 256))
  below = np.cumsum(counts, axis=1) - counts
  # The step excludes the pixels of the highest level.
  step = (below * (counts > 0)).max(1, keepdims=True) // 255
  flat = (below + step // 2) // np.maximum(step, 1)
  tables = np.where(step > 0, np.minimum(flat, 255), LEVELS)
  return np.asarray(picture.point(tables.ravel().tolist()))


def _blend(start: np.ndarray, end: np.ndarray, factor: float) -> np.ndarray:
  """`start + factor · (end − start)`, clipped and rounded down, as uint8."""
  values = np.subtract(end, start, dtype=np.int16) * np.float32(factor)
  values += start
  np.clip(values, 0, 255, out=values)
  return values.astype(np.uint8)


def _color(image: np.ndarray, factor: float) -> np.ndarray:
  """Blends with the greyscale image."""
  planes = [np.ascontiguousarray(image[..., channel]) for channel in range(3)]
  red, green, blue = planes
  luma = red * np.float32(0.2989)
  luma += green * np.float32(0.587)
  luma += blue * np.float32(0.114)
  # The released code converts to 0..1 and back, adding half a level.
  luma *= np.float32(255.5 / 255)
  grey = luma.astype(np.uint8)
  blended = np.empty_like(image)
  for channel, plane in enumerate(planes):
    blended[..., channel] = _blend(grey, plane, factor)
  return blended


def _smooth(image: np.ndarray) -> np.ndarray:
  """A 3 × 3 mean with weight 5 at the center; borders are unchanged."""
  height, width, channels = image.shape
  smooth = image.copy()
  if min(height, width) < 3:
    return smooth
  # Faster on the flat array, where the neighbour below is `row` values away.
  # The first and last columns come out wrong and are restored at the end.
  row, values = width * channels, image.ravel()
  pixels = values.astype(np.uint16)
  rows = pixels[: -2 * row] + pixels[row:-row]
  rows += pixels[2 * row :]
  total = rows[: -2 * channels] + rows[channels:-channels]
  total += rows[2 * channels :]
  inner = slice(row + channels, -row - channels)
  total += 4 * pixels[inner]
  mean = total // 13
  # An integral mean may come out one less in float32. Float64 reproduces the
  # rounding of the released code's chain of fused multiply-adds.
  whole = np.flatnonzero(13 * mean == total)
  chain = np.zeros(len(whole), np.float32)
  for i, j in itertools.product(range(3), range(3)):
    weight = np.float64(np.float32((5 if i == j == 1 else 1) / 13))
    neighbour = values[i * row + j * channels :].take(whole)
    np.add(weight * neighbour, chain, out=chain, casting='same_kind')
  mean[whole] = chain.astype(np.uint16)
  smooth.reshape(-1)[inner] = mean
  smooth[:, 0], smooth[:, -1] = image[:, 0], image[:, -1]
  return smooth


def _translate(image: np.ndarray, down: int, across: int) -> np.ndarray:
  """Reads each pixel from `down` rows below and `across` columns right."""
  height, width, _ = image.shape
  moved = np.full_like(image, FILL)
  if abs(down) < height and abs(across) < width:
    rows, columns = (
      slice(max(-x, 0), min(size - x, size))
      for x, size in ((down, height), (across, width))
    )
    moved[rows, columns] = image[
      rows.start + down : rows.stop + down,
      columns.start + across : columns.stop + across,
    ]
  return moved


def _rotate(image: np.ndarray, degrees: float) -> np.ndarray:
  """Rotates about the center of the image; reads the nearest pixels."""
  height, width, _ = image.shape
  angle = math.radians(degrees)
  cos, sin = math.cos(angle), math.sin(angle)
  dx = (width - 1 - cos * (width - 1) + sin * (height - 1)) / 2
  dy = (height - 1 - sin * (width - 1) - cos * (height - 1)) / 2
  # Pillow uses pixel centers and rounds down.
  dx, dy = dx + 0.5 - (cos - sin) / 2, dy + 0.5 - (sin + cos) / 2
  rotated = Image.fromarray(image).transform(
    (width, height),
    Image.Transform.AFFINE,
    (cos, -sin, dx, sin, cos, dy),
    Image.Resampling.NEAREST,
    fillcolor=(FILL,) * 3,
  )
  return np.asarray(rotated)


def _shear(image: np.ndarray, slope: float, axis: int) -> np.ndarray:
  """Shifts along an axis by `slope` pixels per pixel of the other axis."""
  height, width, channels = image.shape
  y, x = np.ogrid[:height, :width]
  along, across = (y, x) if axis == 0 else (x, y)
  # As released, half pixels are decided in float32; Pillow has 16 fractional
  # bits.
  source = np.float32(slope) * across.astype(np.float32)
  source = source + along.astype(np.float32)
  source += np.float32(0.5)
  index = source.astype(np.int32)
  if axis == 0:
    index *= width
    index += x.astype(np.int32)
  else:
    index += (y * width).astype(np.int32)
  # Halves round away from zero, out of the image. Outside pixels read an extra
  # pixel at the end.
  index[(source <= 0) | (source >= image.shape[axis])] = height * width
  outside = np.full((1, channels), FILL, np.uint8)
  pixels = np.concatenate([image.reshape(-1, channels), outside])
  return pixels.take(index, axis=0)
