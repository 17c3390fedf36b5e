"""Pictures of any type are decoded to their full range, upright, or refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from nfnets_jax.data import decode, transforms


def encode(image, image_format='PNG', **options):
  buffer = io.BytesIO()
  image.save(buffer, format=image_format, **options)
  return buffer.getvalue()


def random_image(height, width, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(256, size=(height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
  ('mode', 'color', 'expected'),
  [
    ('RGB', (10, 20, 30), (10, 20, 30)),
    ('L', 40, (40, 40, 40)),
    ('LA', (40, 9), (40, 40, 40)),
    ('1', 1, (255, 255, 255)),
    ('RGBA', (10, 20, 30, 5), (10, 20, 30)),
    ('I;16', 0x8123, (0x81, 0x81, 0x81)),
  ],
)
def test_decode_png_of_any_mode(mode, color, expected):
  image = decode.decode(encode(Image.new(mode, (5, 3), color)))
  assert image.dtype == np.uint8
  np.testing.assert_array_equal(image, np.tile(expected, (3, 5, 1)))


@pytest.mark.parametrize('transparency', [None, 1, b'\x00\x80\xff'])
def test_decode_palette(transparency):
  palette = Image.new('P', (2, 2), 1)
  palette.putpalette([0, 0, 0, 10, 20, 30, 0, 0, 0])
  options = {} if transparency is None else {'transparency': transparency}
  image = decode.decode(encode(palette, **options))
  np.testing.assert_array_equal(image, np.tile((10, 20, 30), (2, 2, 1)))


@pytest.mark.parametrize(
  ('mode', 'color', 'expected', 'options'),
  [
    ('L', 40, (40, 40, 40), {}),
    ('RGB', (200, 90, 30), (200, 90, 30), {}),
    ('RGB', (200, 90, 30), (200, 90, 30), {'progressive': True}),
    ('RGB', (200, 90, 30), (200, 90, 30), {'keep_rgb': True}),
    ('CMYK', (255, 0, 0, 0), (0, 255, 255), {}),
  ],
)
def test_decode_jpeg_of_any_kind(mode, color, expected, options):
  encoded = encode(
    Image.new(mode, (40, 24), color), 'JPEG', quality=95, **options
  )
  image = decode.decode(encoded)
  np.testing.assert_allclose(image, np.tile(expected, (24, 40, 1)), atol=4)


def with_other_jfif_version(encoded):
  return encoded.replace(b'JFIF\0\1', b'JFIF\0\2')


def with_other_scan_header(encoded):
  at = encoded.index(b'\xff\xda')
  end = at + 2 + encoded[at + 3]
  return encoded[: end - 3] + b'\0\0\0' + encoded[end:]


def damage(encoded, kind, rng=None):
  """Damages a JPEG from two fifths of its length on."""
  rng = rng or np.random.default_rng(0)
  start, stop = (len(encoded) * i // 5 for i in (2, 3))
  before, after, length = encoded[:start], encoded[stop:], stop - start
  match kind:
    case 'random':
      return before + rng.bytes(length) + after
    case 'random without markers':
      return before + rng.bytes(length).replace(b'\xff', b'\x12') + after
    case 'ones':
      return before + b'\xff' * length + after
    case 'zeros':
      return before + bytes(length) + after
    case 'missing':
      return before + after
    case 'twice':
      return encoded[:stop] + encoded[start:]
    case 'cut':
      return before
    case 'cut, with an end':
      return before + b'\xff\xd9'
    case 'zeros to the end':
      return before + bytes(len(encoded) - start)
    case 'end missing':
      return encoded[:-2]
    case 'bytes left over':
      return encoded[:-2] + b'left over' + encoded[-2:]
  raise ValueError(kind)


DAMAGES = (
  'random',
  'random without markers',
  'ones',
  'zeros',
  'missing',
  'twice',
  'cut',
  'cut, with an end',
  'zeros to the end',
  'end missing',
  'bytes left over',
)


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize(
  'fault', [with_other_jfif_version, with_other_scan_header]
)
def test_decode_jpeg_with_a_harmless_fault(fault, mode):
  image = Image.fromarray(random_image(64, 48)).convert(mode)
  encoded = encode(image, 'JPEG')
  faulty = fault(encoded)
  assert faulty != encoded
  np.testing.assert_array_equal(decode.decode(faulty), decode.decode(encoded))
  # libjpeg reports but the first fault, which must not hide the second.
  for kind in DAMAGES:
    for both in fault(damage(encoded, kind)), damage(faulty, kind):
      with pytest.raises(ValueError, match='cannot decode an image of'):
        decode.decode(both)


def test_decode_jpeg_with_bytes_after_its_end():
  encoded = encode(Image.fromarray(random_image(64, 48)), 'JPEG')
  np.testing.assert_array_equal(
    decode.decode(encoded + b'left over'), decode.decode(encoded)
  )


def check_damage_is_an_error(encoded):
  example = {'image': encoded, 'label': 0}
  with pytest.raises(ValueError, match='cannot decode an image of'):
    transforms.decode_example(example)
  with pytest.raises(ValueError, match='cannot decode an image of'):
    transforms.eval_transform(8)(example)


@pytest.mark.parametrize('kind', DAMAGES)
@pytest.mark.parametrize(
  ('mode', 'options'),
  [
    ('RGB', {}),
    ('RGB', {'progressive': True}),
    ('RGB', {'restart_marker_blocks': 3}),
    ('L', {}),
    ('CMYK', {}),
  ],
)
def test_corrupt_jpeg_is_an_error_wherever_the_crop_is(kind, mode, options):
  for seed in range(3):
    image = Image.fromarray(random_image(96, 64, seed)).convert(mode)
    encoded = encode(image, 'JPEG', **options)
    damaged = damage(encoded, kind, np.random.default_rng(seed))
    check_damage_is_an_error(damaged)


@pytest.mark.parametrize(
  'kind', ['random', 'ones', 'missing', 'cut', 'cut, with an end']
)
def test_corrupt_photograph_is_an_error(photographs, kind):
  for seed, encoded in enumerate(photographs):
    damaged = damage(encoded, kind, np.random.default_rng(seed))
    check_damage_is_an_error(damaged)


def test_jpeg_of_unusual_subsampling_is_left_to_pillow():
  encoded = encode(Image.new('RGB', (96, 64), 'black'), 'JPEG', subsampling=0)
  frame = encoded.index(b'\xff\xc0')
  # Twice as many brightness samples across as colour samples, and thrice down.
  unusual = encoded[: frame + 11] + b'\x23' + encoded[frame + 12 :]
  with Image.open(io.BytesIO(unusual)) as file:
    expected = np.asarray(file.convert('RGB'))
  np.testing.assert_array_equal(decode.decode(unusual), expected)
  check_damage_is_an_error(damage(unusual, 'cut'))


@pytest.mark.parametrize('keep', [0.05, 0.99])
@pytest.mark.parametrize('progressive', [False, True])
def test_truncated_jpeg_is_an_error(keep, progressive):
  image = Image.fromarray(random_image(96, 64))
  encoded = encode(image, 'JPEG', progressive=progressive)
  check_damage_is_an_error(encoded[: int(keep * len(encoded))])


def test_decode_equals_the_released_pipeline(reference):
  golden = np.load(reference / 'eval_preprocess.npz')
  synsets = {name.split('/')[0] for name in golden}
  assert synsets
  for synset in synsets:
    decoded = decode.decode(golden[f'{synset}/jpeg'].tobytes())
    np.testing.assert_array_equal(decoded, golden[f'{synset}/decoded'])


def test_decode_equals_tensorflow(photographs):
  tf = pytest.importorskip('tensorflow')
  for image in photographs:
    np.testing.assert_array_equal(
      decode.decode(image), tf.io.decode_jpeg(image, channels=3).numpy()
    )


def test_decode_passes_arrays_through():
  image = random_image(4, 5)
  assert decode.decode(image) is image


@pytest.mark.parametrize('bad', [b'', b'no image', 'truncated', 'float', '2d'])
def test_decode_refuses_what_is_no_image(bad):
  if bad == 'truncated':
    bad = encode(Image.fromarray(random_image(64, 64)), 'JPEG')[:-900]
  elif bad == 'float':
    bad = np.zeros((2, 2, 3), np.float32)
  elif bad == '2d':
    bad = np.zeros((2, 2), np.uint8)
  with pytest.raises(
    ValueError, match=r'cannot decode|a decoded image is'
  ) as caught:
    decode.decode(bad)
  # The same image is always refused in the same words.
  assert ' at 0x' not in str(caught.value)


@pytest.mark.parametrize('bad', [None, 'a.jpg', [b'x'], bytearray(b'x')])
def test_what_is_neither_bytes_nor_an_array_is_refused(bad):
  with pytest.raises(ValueError, match='an image is bytes or an array, got'):
    decode.decode(bad)


@pytest.mark.parametrize('dtype', [np.uint16, np.float32, np.int64, bool])
@pytest.mark.parametrize('shape', [(4, 5, 3), (4, 5), (4, 5, 1), (0, 5, 3)])
def test_arrays_of_other_types_and_shapes_are_refused(dtype, shape):
  with pytest.raises(ValueError, match=r'uint8 \[H, W, 3\], 0 to 255, got'):
    decode.decode(np.ones(shape, dtype))


def tiff(pixels, *, photometric=1, bits=None, order='<', extra=None):
  """A TIFF of one strip, of pixels that Pillow would not write."""
  kind = {'u': 1, 'i': 2, 'f': 3}[pixels.dtype.kind]
  height, width = pixels.shape[:2]
  samples = pixels.shape[2] if pixels.ndim == 3 else 1
  data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
  bits = bits or 8 * pixels.dtype.itemsize
  if bits == 12:  # two levels in three bytes
    pairs = pixels.astype(int).reshape(-1, 2)
    data = b''.join(int(a << 12 | b).to_bytes(3, 'big') for a, b in pairs)
  tags = {
    256: width,
    257: height,
    258: bits,
    259: 1,
    262: photometric,
    273: 8,
    277: samples,
    278: height,
    279: len(data),
    339: kind,
    **({338: extra} if extra is not None else {}),
  }
  out = struct.pack(
    order + '2sHI', b'II' if order == '<' else b'MM', 42, 8 + len(data)
  )
  out += data + struct.pack(order + 'H', len(tags))
  after = 8 + len(data) + 2 + 12 * len(tags) + 4
  blob = b''
  for tag, value in sorted(tags.items()):
    count = samples if tag in (258, 339) else 1
    if count > 2:
      place = after + len(blob)
      blob += struct.pack(order + f'{count}H', *[value] * count)
      out += struct.pack(order + 'HHII', tag, 3, count, place)
    else:
      values = [value] * count + [0] * (2 - count)
      out += struct.pack(order + 'HHIHH', tag, 3, count, *values)
  return out + bytes(4) + blob


@pytest.mark.parametrize(
  ('level', 'options', 'expected'),
  [
    (0x8123, {}, 0x81),
    (0x8123, {'order': '>'}, 0x81),
    (0xFFFF, {}, 0xFF),
    (0xFFF, {'bits': 12}, 0xFF),  # not 16 of 255
    (0x812, {'bits': 12}, 0x81),
    (0x1234, {'photometric': 0}, 0xED),  # 0 is white
  ],
)
def test_grey_tiff_of_many_bits(level, options, expected):
  pixels = np.full((2, 4), level, np.uint16)
  image = decode.decode(tiff(pixels, **options))
  np.testing.assert_array_equal(image, np.full((2, 4, 3), expected))


@pytest.mark.parametrize('order', ['<', '>'])
def test_colour_of_16_bits(order):
  pixels = np.zeros((2, 4, 3), np.uint16)
  pixels[..., 1] = 0x8123
  image = decode.decode(tiff(pixels, photometric=2, order=order))
  np.testing.assert_array_equal(image, pixels >> 8)


@pytest.mark.parametrize(
  ('pixels', 'message'),
  [
    (np.full((2, 4), 70_000, np.uint32), r'32-bit integers \(mode I\)'),
    (np.full((2, 4), 200, np.int32), r'32-bit integers \(mode I\)'),
    (np.full((2, 4), -5, np.int16), r'\(mode I\), of unknown range'),
    (np.full((2, 4), 0.5, np.float32), r'floating point \(mode F\)'),
    (np.full((2, 4), np.nan, np.float32), r'floating point \(mode F\)'),
    (np.full((2, 4), 0.5, np.float64), 'cannot identify image file'),
    (np.full((2, 4, 3), 0.5, np.float32), 'cannot identify image file'),
    (np.full((2, 4), 255, np.uint16), 'the upper four are not used'),
    (np.full((2, 4), 4095, np.uint16), 'the upper four are not used'),
    (np.full((2, 4, 3), 255, np.uint16), 'the upper four are not used'),
  ],
)
def test_pixels_of_unknown_range_are_refused(pixels, message):
  photometric = 2 if pixels.ndim == 3 else 1
  with pytest.raises(ValueError, match=f'cannot decode .*: .*{message}'):
    decode.decode(tiff(pixels, photometric=photometric))


def test_other_files_of_unknown_range():
  with pytest.raises(ValueError, match=r'\(mode F\)'):
    decode.decode(encode(Image.new('F', (4, 4), 0.5), 'PPM'))
  dim = np.full((4, 4), 1000, np.uint16)
  with pytest.raises(ValueError, match='the upper four are not used'):
    decode.decode(encode(Image.fromarray(dim)))
  bright = encode(Image.fromarray(dim * 60), 'PPM')
  assert set(decode.decode(bright).ravel()) == {60_000 >> 8}
  black = decode.decode(encode(Image.fromarray(dim * 0)))
  assert not black.any()


@pytest.mark.parametrize(
  ('mode', 'color', 'expected'),
  [
    ('1', 1, (255, 255, 255)),
    ('L', 40, (40, 40, 40)),
    ('LA', (40, 9), (40, 40, 40)),
    ('RGBA', (10, 20, 30, 5), (10, 20, 30)),
    ('RGBX', (10, 20, 30, 5), (10, 20, 30)),
    ('CMYK', (255, 0, 0, 0), (0, 255, 255)),
    ('YCbCr', (128, 128, 128), (128, 128, 128)),
    ('LAB', (255, 128, 128), (255, 255, 255)),
    ('I;16B', 0x8123, (0x81, 0x81, 0x81)),
  ],
)
def test_decode_tiff_of_any_mode(mode, color, expected):
  image = decode.decode(encode(Image.new(mode, (5, 3), color), 'TIFF'))
  np.testing.assert_allclose(image, np.tile(expected, (3, 5, 1)), atol=2)


def test_decode_tiff_with_alpha_multiplied_in():
  pixels = np.full((2, 4, 2), (40, 80), np.uint8)
  image = decode.decode(tiff(pixels, extra=1))
  assert set(image.ravel()) == {40 * 255 // 80}


ORIENTED = ['JPEG', 'PNG', 'WEBP', 'TIFF']


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('image_format', ORIENTED)
def test_pictures_are_turned_upright(image_format, orientation):
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = orientation
  # Smooth, so that what a JPEG or WebP loses is little.
  corners = np.array([[[0, 0, 255], [255, 0, 0]], [[0, 255, 0], [99, 99, 99]]])
  upright = Image.fromarray(corners.astype(np.uint8)).resize((48, 32))
  undo = {6: 8, 8: 6}.get(orientation, orientation)
  turned = Image.fromarray(np.asarray(upright))
  turned.getexif()[ExifTags.Base.Orientation] = undo
  turned = ImageOps.exif_transpose(turned)
  encoded = encode(turned, image_format, exif=exif, quality=100)
  image = decode.decode(encoded, orient=True)
  assert image.shape == (32, 48, 3) and image.flags.c_contiguous
  np.testing.assert_allclose(image, np.asarray(upright), atol=20)
  asis = decode.decode(encoded)
  if image_format != 'TIFF':  # which Pillow turns in any case
    np.testing.assert_allclose(asis, np.asarray(turned), atol=20)


def test_orientation_of_a_cmyk_jpeg():
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = 6
  encoded = encode(Image.new('CMYK', (16, 8)), 'JPEG', exif=exif)
  assert decode.decode(encoded).shape == (8, 16, 3)
  assert decode.decode(encoded, orient=True).shape == (16, 8, 3)


@pytest.mark.parametrize('orientation', [0, 9, 600])
def test_orientation_that_means_nothing(orientation):
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = orientation
  encoded = encode(Image.new('RGB', (16, 8)), 'JPEG', exif=exif)
  assert decode.decode(encoded, orient=True).shape == (8, 16, 3)


@pytest.mark.filterwarnings('ignore:Corrupt EXIF data', 'ignore:Truncated')
def test_exif_data_that_cannot_be_read():
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = 6
  encoded = encode(Image.new('RGB', (16, 8)), 'JPEG', exif=exif)
  for bad in b'Exif\0\0XX', b'Exif\0\0II*\0\xff':
    at = encoded.index(b'Exif')
    faulty = encoded[:at] + bad + encoded[at + len(bad) :]
    assert decode.decode(faulty, orient=True).shape == (8, 16, 3)


def with_size(encoded, width, height):
  """A JPEG that says it has another size."""
  frame = encoded.index(b'\xff\xc0')
  size = struct.pack('>HH', height, width)
  return encoded[: frame + 5] + size + encoded[frame + 9 :]


@pytest.mark.parametrize('size', [(14_000, 14_000), (65_535, 1025)])
@pytest.mark.parametrize('mode', ['RGB', 'CMYK', 'L'])
def test_large_jpeg_is_refused_before_it_is_decoded(mode, size):
  encoded = with_size(encode(Image.new(mode, (8, 8)), 'JPEG'), *size)
  message = f'{size[0]:,} x {size[1]:,} pixels, and the limit is 67,108,864'
  with pytest.raises(ValueError, match=message):
    decode.decode(encoded)


@pytest.mark.parametrize(
  ('image_format', 'size'),
  [('PNG', (8193, 8192)), ('BMP', (8193, 8192)), ('TIFF', (67_108_865, 1))],
)
def test_large_pictures_of_other_formats_are_refused(image_format, size):
  image = Image.new('1', size)
  options = {'compression': 'tiff_lzw'} if image_format == 'TIFF' else {}
  encoded = encode(image, image_format, **options)
  with pytest.raises(ValueError, match='and the limit is 67,108,864; scale it'):
    decode.decode(encoded)


@pytest.mark.parametrize('side', [14_000, 30_000])
def test_what_pillow_warns_of_or_refuses_names_our_limit(side):
  header = b'IHDR' + struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0)
  header += struct.pack('>I', zlib.crc32(header))
  encoded = encode(Image.new('L', (1, 1)))
  at = encoded.index(b'IHDR')
  with pytest.raises(ValueError, match='the limit of 67,108,864 pixels'):
    decode.decode(encoded[:at] + header + encoded[at + len(header) :])


def test_long_and_narrow_pictures():
  for size in (1, 65_500), (65_500, 1):
    encoded = encode(Image.new('RGB', size, 'white'), 'JPEG')
    assert decode.decode(encoded).shape == (size[1], size[0], 3)


def test_of_several_pictures_the_first_is_taken():
  frames = [Image.new('RGB', (8, 6), c) for c in ('red', 'lime', 'blue')]
  for image_format in 'GIF', 'PNG', 'WEBP', 'TIFF':
    options = {'lossless': True} if image_format == 'WEBP' else {}
    encoded = encode(
      frames[0],
      image_format,
      save_all=True,
      append_images=frames[1:],
      **options,
    )
    image = decode.decode(encoded)
    np.testing.assert_array_equal(image, np.tile((255, 0, 0), (6, 8, 1)))


@pytest.mark.parametrize(
  'image_format', ['PNG', 'WEBP', 'TIFF', 'BMP', 'GIF', 'PPM', 'JPEG2000']
)
def test_truncated_pictures_are_refused(image_format):
  encoded = encode(Image.fromarray(random_image(64, 48)), image_format)
  decode.decode(encoded)
  for keep in 0.02, 0.5, 0.9:
    with pytest.raises(ValueError, match='cannot decode an image of'):
      decode.decode(encoded[: int(keep * len(encoded))])


def test_other_formats_are_named():
  encoded = encode(Image.new('RGB', (8, 8)), 'EPS')  # would call Ghostscript
  with pytest.raises(ValueError, match='of the format EPS; save it as JPEG'):
    decode.decode(encoded)
  encoded = encode(Image.new('RGB', (16, 16)), 'ICO')  # holds several sizes
  with pytest.raises(ValueError, match='of the format ICO; save it as JPEG'):
    decode.decode(encoded)


def test_text_that_unpacks_to_much_more_is_refused():
  bomb = zlib.compress(bytes(80 << 20), 9)
  for name, content in (b'zTXt', b'x\0\0' + bomb), (b'iCCP', b'x\0\0' + bomb):
    encoded = encode(Image.new('L', (1, 1)))
    chunk = struct.pack('>I', len(content)) + name + content
    chunk += struct.pack('>I', zlib.crc32(name + content))
    at = encoded.index(b'IDAT') - 4
    with pytest.raises(ValueError, match='cannot decode an image of'):
      decode.decode(encoded[:at] + chunk + encoded[at:])


def test_odd_metadata_that_libjpeg_skips_turn_nothing():
  buffer = io.BytesIO()
  Image.new('RGB', (8, 4), color=(200, 100, 50)).save(buffer, 'JPEG')
  data = buffer.getvalue()
  for segment in (b'\xff\xe2\0\x0eICC_PROFILE\0', b'\xff\xee\0\x08Adobe\0'):
    odd = data[:2] + segment + data[2:]
    expected = decode.decode(odd)
    np.testing.assert_array_equal(decode.decode(odd, orient=True), expected)
