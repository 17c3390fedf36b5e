"""Decodes images of any type to uint8 RGB.

Inputs come from cameras, scanners and the web, not only as the 8-bit JPEG of
ImageNet. Images whose range is ambiguous are rejected.

Differences:
  * With `orient`, images are rotated by their EXIF orientation, as for folders
    and `predict`. TFDS data sets are not, as in TensorFlow, so that published
    weights see what they were trained on. Pillow always rotates TIFF.
  * A JPEG that libjpeg finds corrupt is rejected; TensorFlow fills in grey.
"""

import contextlib
import io
import re

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

# Largest image in pixels, 8192 x 8192. Decoding takes 3 bytes per pixel for
# JPEG, 9 for progressive JPEG and up to 22 for other formats: at most 1.4 GiB.
MAX_PIXELS = 1 << 26

# Pillow's other formats run external programs or hold several sizes.
FORMATS = (
  'AVIF',
  'BMP',
  'DIB',
  'GIF',
  'JPEG',
  'JPEG2000',
  'MPO',
  'PNG',
  'PPM',
  'TIFF',
  'WEBP',
)

_JPEG_START = b'\xff\xd8'

# Faults that libjpeg reports although the pixels are correct: its message, the
# pattern and the replacement. It reports only the first fault, so a harmless
# one must be repaired before a later one can show.
_HARMLESS = {
  'unknown JFIF revision': (b'(\xff\xe0..JFIF\0).', b'\\g<1>\x01'),
  'Invalid SOS parameters': (
    b'(\xff\xda\0(?:\x08\x01.{2}|\x0c\x03.{6})).{3}',
    b'\\g<1>\0\x3f\0',
  ),
}

# JPEGs that only Pillow decodes, without detecting truncation.
_UNUSUAL = re.compile('determine subsampling|color conversion')

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF


def decode(image: bytes | np.ndarray, orient: bool = False) -> np.ndarray:
  """Decodes an image to RGB.

  Grey, palette, CMYK, YCbCr, LAB and 16-bit images are converted (16 bits keep
  the upper eight) and alpha is dropped, as in TensorFlow. A JPEG decodes to
  exactly TensorFlow's levels, except CMYK. Only the first frame or page is
  read.

  Pixels of unknown range are rejected: 32-bit integers, floating point, and 16
  bits with the upper four unused, which would come out black.

  A JPEG that libjpeg finds corrupt is rejected. Extra bytes at its end count as
  corrupt, since faults in the middle mostly cause them; an odd version number
  or scan header does not. Faults that are valid code go undetected, such as a
  few flipped bits, as do some faults of JPEGs with unusual subsampling (any but
  4:4:4, 4:4:0, 4:2:2, 4:2:0, 4:1:1 and 4:4:1), which Pillow decodes.

  Args:
    image: an encoded image in one of `FORMATS` with at most `MAX_PIXELS`, or a
      decoded uint8 array `[H, W, 3]`, which is returned unchanged.
    orient: whether to apply the EXIF orientation.

  Returns:
    uint8 `[H, W, 3]`, 0 to 255.

  Raises:
    ValueError: if the bytes are not an image, too large, of unknown range,
      truncated or corrupt, or the array is not an RGB image.
    MemoryError: if there is not enough memory.

  Example:
    >>> buffer = io.BytesIO()
    >>> Image.new('L', (4, 2), color=7).save(buffer, format='PNG')
    >>> image = decode(buffer.getvalue())
    >>> image.shape, image.dtype, int(image.max())
    ((2, 4, 3), dtype('uint8'), 7)
  """
  if isinstance(image, np.ndarray):
    if (
      image.dtype != np.uint8
      or image.ndim != 3
      or image.shape[-1] != 3
      or not image.size
    ):
      raise ValueError(
        'a decoded image is uint8 [H, W, 3], 0 to 255, '
        f'got {image.dtype} {list(image.shape)}'
      )
    return image
  if not isinstance(image, bytes):
    raise ValueError(f'an image is bytes or an array, got {image!r:.80}')
  try:
    is_jpeg = image[:2] == _JPEG_START
    pixels = _decode_jpeg(image) if is_jpeg else None
    if pixels is None:
      with Image.open(io.BytesIO(image)) as file:
        pixels = _decode_any(file)
        return _orient(pixels, file) if orient else pixels
    if orient:
      # libjpeg skips odd metadata that Pillow rejects; ignore it here too.
      with (
        contextlib.suppress(Image.UnidentifiedImageError, SyntaxError),
        Image.open(io.BytesIO(image)) as file,
      ):
        return _orient(pixels, file)
    return pixels
  except MemoryError:
    raise
  except (
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
  ) as error:
    raise ValueError(
      f'cannot decode an image of {len(image):,} bytes: it has more than the '
      f'limit of {MAX_PIXELS:,} pixels; scale it down'
    ) from error
  except Exception as error:  # Pillow's plug-ins raise any exception
    reason = re.sub(r' <_io\.BytesIO object at \w+>', '', str(error))
    if 'nsufficient memory' in reason:  # libjpeg's
      raise MemoryError(reason) from error
    raise ValueError(
      f'cannot decode an image of {len(image):,} bytes: {reason}'
    ) from error


def _check_size(width: int, height: int) -> None:
  if width * height > MAX_PIXELS:
    raise ValueError(
      f'it has {width:,} x {height:,} pixels, and the limit is '
      f'{MAX_PIXELS:,}; scale it down'
    )


def _decode_jpeg(image: bytes) -> np.ndarray | None:
  """Decodes a JPEG; returns None if only Pillow can decode it."""
  try:
    height, width, *_ = simplejpeg.decode_jpeg_header(image)
    _check_size(width, height)
    # TensorFlow's default is the fast transform. It differs from Pillow's slow
    # one by up to 15 levels.
    return simplejpeg.decode_jpeg(image, 'RGB', fastdct=True)
  except ValueError as error:
    if _UNUSUAL.search(str(error)):
      return None
    repaired = image
    for message, (wrong, right) in _HARMLESS.items():
      if message in str(error):
        repaired = re.sub(wrong, right, image, flags=re.DOTALL)
    if repaired == image:
      raise
  return _decode_jpeg(repaired)


def _decode_any(file: Image.Image) -> np.ndarray:
  """Decodes an image with Pillow."""
  if file.format not in FORMATS:
    raise ValueError(
      f'it is of the format {file.format}; save it as JPEG or PNG'
    )
  _check_size(*file.size)
  mode = file.mode
  if mode.startswith('I;16') or (mode == 'I' and file.format == 'PPM'):
    return _decode_16_bits(file)
  if mode in ('I', 'F'):
    kind = '32-bit integers' if mode == 'I' else 'floating point'
    raise ValueError(
      f'its pixels are {kind} (mode {mode}), of unknown range; scale them and '
      'save it with 8 or 16 bits'
    )
  is_wide = any(';16' in str(tile.args) for tile in getattr(file, 'tile', []))
  image: Image.Image = file
  # Pillow cannot convert 'La' directly, and warns about transparency.
  if mode == 'La':
    image = file.convert('LA')
  elif 'transparency' in file.info:
    image = file.convert('RGBA')
  pixels = np.asarray(image.convert('RGB'))
  if is_wide:
    _check_used(int(pixels.max()), 255)
  return pixels


def _decode_16_bits(file: Image.Image) -> np.ndarray:
  """Decodes a grey image to its upper eight bits."""
  levels = np.asarray(file)
  tags = getattr(file, 'tag_v2', {})  # of TIFF
  bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
  top = (1 << bits) - 1
  if tags.get(_PHOTOMETRIC) == 0:  # 0 is white; Pillow does not invert
    levels = top - levels
  if levels.any():
    _check_used(int(levels.max()), top)
  grey = (levels >> (bits - 8)).astype(np.uint8)
  return np.repeat(grey[..., None], 3, axis=-1)


def _check_used(brightest: int, top: int) -> None:
  """Rejects images that use fewer bits than their 16."""
  if brightest < (top + 1) // 16:
    raise ValueError(
      'it has 16 bits, and the upper four are not used: it would be '
      'black; scale it to the full range'
    )


def _orient(pixels: np.ndarray, file: Image.Image) -> np.ndarray:
  """Applies the EXIF orientation."""
  orientation = file.getexif().get(ExifTags.Base.Orientation, 1)
  if orientation not in range(2, 9):
    return pixels
  if orientation >= 5:
    pixels = pixels.transpose(1, 0, 2)
  if orientation in (3, 4, 7, 8):
    pixels = pixels[::-1]
  if orientation in (2, 3, 6, 7):
    pixels = pixels[:, ::-1]
  return np.ascontiguousarray(pixels)
