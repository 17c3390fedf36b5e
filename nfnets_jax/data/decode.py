"""Decodes pictures: pixels of any type to uint8 RGB.

An image comes from a camera, a scanner or the web, and not only as the 8-bit
JPEG of ImageNet. What cannot be brought to 0 to 255 without a guess is refused.

Differences:
  * Pictures are turned upright by their EXIF orientation if asked to: those of
    folders and of `predict` are. Those of TFDS data sets are not, as in
    TensorFlow, so that published weights see what they were trained on. Pillow
    turns TIFF in any case.
  * A JPEG that libjpeg finds corrupt is refused; TensorFlow fills in grey.
"""

import contextlib
import io
import re

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

# The largest picture, in pixels: 8192 x 8192. To decode a JPEG takes 3 bytes a
# pixel, a progressive one 9, other formats up to 22: 1.4 GiB at most.
MAX_PIXELS = 1 << 26

# Others of Pillow's formats call other programs, or hold several sizes.
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

# What libjpeg complains of though the pixels are right, where it stands, and
# what should stand there. It reports only the first of several complaints, so
# that a harmless one has to be mended before a later one can show.
_HARMLESS = {
  'unknown JFIF revision': (b'(\xff\xe0..JFIF\0).', b'\\g<1>\x01'),
  'Invalid SOS parameters': (
    b'(\xff\xda\0(?:\x08\x01.{2}|\x0c\x03.{6})).{3}',
    b'\\g<1>\0\x3f\0',
  ),
}

# What Pillow may be able to decode, though not to tell whether it is whole.
_UNUSUAL = re.compile('determine subsampling|color conversion')

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF


def decode(image: bytes | np.ndarray, orient: bool = False) -> np.ndarray:
  """Decodes an image to RGB.

  Grey, palette, CMYK, YCbCr, LAB and 16-bit images are converted (16 bits keep
  the upper eight) and an alpha channel is dropped, as in TensorFlow. A JPEG
  becomes the same levels as in TensorFlow, to the last one, unless it is CMYK.
  Of an animation or a file of several pages the first is taken.

  Pixels whose range is not known are refused: 32-bit integers, floating point,
  and 16 bits of which the upper four are not used, which would come out black.

  A JPEG that libjpeg finds corrupt anywhere is refused. Bytes left over at its
  end count as corrupt, since they are what a fault in the middle mostly leads
  to; an odd version number or scan header does not. Faults that happen to be
  valid code cannot be noticed, such as a few flipped bits, nor can all faults
  of a JPEG of unusual subsampling (any but 4:4:4, 4:4:0, 4:2:2, 4:2:0, 4:1:1
  and 4:4:1), which Pillow decodes.

  Args:
    image: an encoded image in one of `FORMATS`, of at most `MAX_PIXELS`, or the
      decoded uint8 array `[H, W, 3]`, which is returned as it is.
    orient: whether to turn it upright, by the orientation in its EXIF data.

  Returns:
    uint8 `[H, W, 3]`, 0 to 255.

  Raises:
    ValueError: if the bytes are no image, too large, of pixels of unknown
      range, end early or are corrupt, or the array is no RGB image.
    MemoryError: if there is too little memory.

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
        return _turn(pixels, file) if orient else pixels
    if orient:
      # libjpeg skips odd metadata that Pillow refuses: they turn nothing.
      with (
        contextlib.suppress(Image.UnidentifiedImageError, SyntaxError),
        Image.open(io.BytesIO(image)) as file,
      ):
        return _turn(pixels, file)
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
  except Exception as error:  # Pillow's plug-ins raise whatever they like
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
  """Decodes a JPEG unless it is corrupt; returns None for an unusual one."""
  try:
    height, width, *_ = simplejpeg.decode_jpeg_header(image)
    _check_size(width, height)
    # The fast transform is the one that TensorFlow takes by default; it differs
    # from the slow one, which is Pillow's, by up to 15 levels.
    return simplejpeg.decode_jpeg(image, 'RGB', fastdct=True)
  except ValueError as error:
    if _UNUSUAL.search(str(error)):
      return None
    mended = image
    for complaint, (wrong, right) in _HARMLESS.items():
      if complaint in str(error):
        mended = re.sub(wrong, right, image, flags=re.DOTALL)
    if mended == image:
      raise
  return _decode_jpeg(mended)


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
  # Pillow has no direct conversion of the first, and warns of the second.
  if mode == 'La':
    image = file.convert('LA')
  elif 'transparency' in file.info:
    image = file.convert('RGBA')
  pixels = np.asarray(image.convert('RGB'))
  if is_wide:
    _check_used(int(pixels.max()), 255)
  return pixels


def _decode_16_bits(file: Image.Image) -> np.ndarray:
  """Decodes a grey image to the upper eight of its bits."""
  levels = np.asarray(file)
  tags = getattr(file, 'tag_v2', {})  # of TIFF
  bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
  top = (1 << bits) - 1
  if tags.get(_PHOTOMETRIC) == 0:  # 0 is white, which Pillow leaves to us
    levels = top - levels
  if levels.any():
    _check_used(int(levels.max()), top)
  grey = (levels >> (bits - 8)).astype(np.uint8)
  return np.repeat(grey[..., None], 3, axis=-1)


def _check_used(brightest: int, top: int) -> None:
  """Refuses what was most likely stored in fewer than its 16 bits."""
  if brightest < (top + 1) // 16:
    raise ValueError(
      'it has 16 bits, and the upper four are not used: it would come out '
      'black; scale it to the full range'
    )


def _turn(pixels: np.ndarray, file: Image.Image) -> np.ndarray:
  """Turns and mirrors an image as its EXIF data say."""
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
