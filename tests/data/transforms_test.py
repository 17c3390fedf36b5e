"""Pixels against oracles, crops against their promises."""

import io
import tracemalloc

import numpy as np
import pytest
from PIL import ExifTags, Image

from nfnets_jax.data import decode, pipeline, transforms

MEAN = np.array([0.485, 0.456, 0.406]) * 255
STD = np.array([0.229, 0.224, 0.225]) * 255


def encode(image, image_format='PNG', **options):
  buffer = io.BytesIO()
  image.save(buffer, format=image_format, **options)
  return buffer.getvalue()


def random_image(height, width, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(256, size=(height, width, 3), dtype=np.uint8)


def position_image(height, width):
  """An image whose every pixel says where it is."""
  rows, columns = np.mgrid[:height, :width]
  return np.stack([rows, columns, np.ones_like(rows)], axis=-1).astype(np.uint8)


def train(example, image_size, seed=0, *args, **kwargs):
  """One training image, without mixing."""
  examples = [pipeline.decode_example(example)]
  uniform = np.random.default_rng(seed).random((1, pipeline.NUM_DRAWS))
  make = pipeline.TrainPipeline(image_size, *args, **kwargs)
  return make(examples, examples, uniform, np.array([0]))['image'][0]


def crop_of(image, rng, *args, **kwargs):
  uniform = rng.random(transforms.CROP_DRAWS)
  return transforms.random_resized_crop(image, uniform, *args, **kwargs)


def keys_matrix(old, new):
  """Keys' interpolation of a whole axis, float64 [new, old], a = -1/2."""
  centers = (np.arange(new) + 0.5) * old / new - 0.5
  steps = np.floor(centers) + np.rint((centers % 1) * 1024) / 1024
  x = np.abs(steps[:, None] - np.arange(old))
  a = -0.5
  near = (a + 2) * x**3 - (a + 3) * x**2 + 1
  far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
  weights = np.where(x < 1, near, np.where(x < 2, far, 0))
  return weights / weights.sum(axis=1, keepdims=True)


def test_random_crop_of_a_photograph_is_that_of_its_pixels(photographs):
  for seed, encoded in enumerate(photographs):
    results = [
      train({'image': image, 'label': 0}, 32, seed)
      for image in (encoded, decode.decode(encoded))
    ]
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
  ('old', 'new'),
  [((1, 1), (3, 2)), ((2, 9), (9, 4)), ((23, 40), (40, 23)), ((8, 8), (33, 8))],
)
def test_resize_is_keys_interpolation(old, new):
  image = random_image(*old)
  expected = np.einsum(
    'hi,ijc,wj->hwc',
    keys_matrix(old[0], new[0]),
    image.astype(np.float64),
    keys_matrix(old[1], new[1]),
  )
  resized = transforms.resize_float(image, *new)
  assert resized.dtype == np.float32
  np.testing.assert_allclose(resized, expected, atol=1e-3)
  levels = transforms.resize(image, *new)
  assert levels.dtype == np.uint8
  assert np.abs(levels - np.clip(expected, 0, 255)).max() < 0.501


def test_resize_to_its_own_size_changes_nothing():
  image = random_image(6, 9)
  np.testing.assert_array_equal(transforms.resize(image, 6, 9), image)
  np.testing.assert_array_equal(transforms.resize_float(image, 6, 9), image)


def test_resize_equals_the_released_kernel(reference):
  golden = np.load(reference / 'bicubic.npz')
  names = [name for name in golden if name.startswith('out/')]
  assert names
  for name in names:
    image = golden['in/' + name.removeprefix('out/').split('->')[0]]
    resized = transforms.resize_float(image, *golden[name].shape[:2])
    np.testing.assert_allclose(resized, golden[name], atol=1e-3, rtol=0)


def test_evaluation_equals_the_released_pipeline(reference):
  golden = np.load(reference / 'eval_preprocess.npz')
  names = [name for name in golden if name.count('/') == 2]
  assert names
  for name in names:
    synset, crop, size = name.split('/')
    transform = transforms.eval_transform(int(size), crop)
    encoded = golden[f'{synset}/jpeg'].tobytes()
    pixels = transform({'image': encoded, 'label': 0})['image']
    # Rounding errs by 0.004.
    error = np.abs((pixels - MEAN) / STD - golden[name]).mean()
    assert error < 0.005, name


def test_evaluation_crops_take_the_right_part():
  whole = position_image(100, 200)

  def seen(crop, px=32):
    """The first and last row and column of the original that show."""
    transform = transforms.eval_transform(px, crop)
    pixels = transform({'image': whole, 'label': 3})['image']
    assert pixels.shape == (px, px, 3)
    rows, columns = pixels[:, 0, 0], pixels[0, :, 1]
    return [int(x) for x in (rows[0], rows[-1], columns[0], columns[-1])]

  half_row, half_column = 100 / 64 / 2, 200 / 64 / 2
  assert seen('resize_crop_32') == pytest.approx(
    [25 + half_row, 75 - half_row, 50 + half_column, 150 - half_column], abs=1.5
  )
  assert seen('resize_crop_0.5') == seen('resize_crop_32')
  assert seen('crop_resize') == pytest.approx([25, 74, 75, 124], abs=1)
  assert seen('resize') == seen('resize_crop_0') == seen('resize_crop_1.0')
  assert seen('resize') == pytest.approx([1, 98, 3, 196], abs=1.5)


@pytest.mark.parametrize('min_area', [0.1, 0.25])
def test_random_resized_crop_keeps_its_promises(min_area):
  height, width = 120, 200
  image = position_image(height, width)
  rng = np.random.default_rng(0)
  areas, corners = [], set()
  for _ in range(2000):
    crop = crop_of(image, rng, min_area)
    h, w, _ = crop.shape
    top, left = crop[0, 0, :2].astype(int)
    np.testing.assert_array_equal(
      crop, image[top : top + h, left : left + w], strict=True
    )
    # The width is rounded to whole pixels.
    assert (w + 0.5) / h >= 3 / 4 and (w - 0.5) / h <= 4 / 3
    areas.append(h * w / (height * width))
    corners.add((int(top), int(left)))
  assert min_area <= min(areas) < min_area + 0.02
  assert 0.7 < max(areas) <= 0.8  # the whole height at 4 : 3
  assert len(corners) > 1000


def test_random_resized_crop_falls_back_to_the_center():
  image = position_image(120, 200)
  # No box of those ratios covers so much of it.
  crop = crop_of(image, np.random.default_rng(0), 0.9)
  np.testing.assert_array_equal(crop, image[:, 40:160])


@pytest.mark.parametrize(('height', 'width'), [(1, 1), (8, 200), (300, 9)])
@pytest.mark.parametrize('image_format', ['PNG', 'JPEG'])
def test_extreme_images_become_squares(height, width, image_format):
  encoded = encode(Image.new('RGB', (width, height), 'white'), image_format)
  example = {'image': encoded, 'label': 0}
  for crop in 'random_resized', 'pad_1', 'none':
    image = train(example, 32, 0, crop, flip=False)
    assert image.shape == (32, 32, 3)
    if crop == 'random_resized':
      assert image.min() == 255
  for crop in 'resize_crop_32', 'crop_resize', 'resize':
    image = transforms.eval_transform(32, crop)(example)['image']
    assert image.shape == (32, 32, 3) and image.min() == 255


def test_random_resized_crop_of_extreme_shapes():
  rng = np.random.default_rng(0)
  for height, width in (1, 1), (1, 50), (50, 1), (2, 3), (10, 300):
    image = position_image(height, width)
    for _ in range(20):
      h, w, _ = crop_of(image, rng).shape
      assert 1 <= h <= height
      assert 1 <= w <= width


def test_pad_crop_shifts_evenly_and_pads_with_black():
  image = position_image(6, 7)
  rng = np.random.default_rng(0)
  shifts = []
  for _ in range(900):
    (crop,) = transforms.pad_crop(image[None], rng.random((1, 2)), pixels=1)
    assert crop.shape == image.shape
    top, left = crop[2, 2, :2].astype(int) - 2
    rolled = np.roll(image, (-top, -left), axis=(0, 1))
    inside = crop[..., 2] == 1
    np.testing.assert_array_equal(crop, rolled * inside[..., None])
    assert inside.sum() == (6 - abs(top)) * (7 - abs(left))
    shifts.append((top, left))
  _, counts = np.unique(shifts, axis=0, return_counts=True)
  assert len(counts) == 9
  assert counts.min() > 65 and counts.max() < 135  # 100 expected


def test_pad_crop_by_more_than_the_image():
  rng = np.random.default_rng(0)
  images = np.ones((99, 2, 3, 3))
  crops = transforms.pad_crop(images, rng.random((99, 2)), 9)
  sums = {crop.sum() / 3 for crop in crops}
  assert sums <= {0, 1, 2, 3, 4, 6} and 0 in sums


@pytest.mark.parametrize(
  'crop',
  ['', 'random', 'random_resized_0', 'random_resized_2', 'pad', 'pad_1.5'],
)
def test_unknown_training_crop_lists_the_choices(crop):
  with pytest.raises(ValueError, match='random_resized_AREA, pad_PIXELS, none'):
    transforms.train_crop(crop, 32)


@pytest.mark.parametrize(
  'crop', ['', 'none', 'resize_crop', 'resize_crop_0.0', 'resize_crop_1.5']
)
def test_unknown_evaluation_crop_lists_the_choices(crop):
  with pytest.raises(ValueError, match=r'resize_crop_PIXELS, .*, resize '):
    transforms.eval_transform(32, crop)


def test_photographs_of_any_shape(photographs):
  shapes = {decode.decode(image).shape for image in photographs}
  assert any(height != width for height, width, _ in shapes)
  for image in photographs:
    example = {'image': image, 'label': 1}
    evaluation = transforms.eval_transform(64)(example)
    squashed = transforms.eval_transform(64, 'resize')(example)
    for result in evaluation, squashed:
      assert result['image'].shape == (64, 64, 3)
    assert train(example, 64).shape == (64, 64, 3)
    # The central part of the squashed image, at a larger scale.
    center = transforms.resize(squashed['image'][11:53, 11:53], 64, 64)
    assert np.corrcoef(center.ravel(), evaluation['image'].ravel())[0, 1] > 0.8


@pytest.mark.parametrize('name', ['random_resized', 'none'])
def test_examples_say_whether_they_are_turned(name):
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = 6
  pixels = np.zeros((40, 60, 3), np.uint8)
  pixels[:, :30] = 255  # lies left, and turned upright on top
  encoded = encode(Image.fromarray(pixels), exif=exif)
  evaluate = transforms.eval_transform(16, 'resize')
  for orient in None, False, True:
    example = {'image': encoded, 'label': 0}
    if orient is not None:
      example['orient'] = orient
    image = evaluate(example)['image']
    assert (image[0].mean() > 250) == bool(orient)
    assert (image[:, 0].mean() > 250) == (not orient)
    crop = train(example, 16, 0, name, flip=False).astype(int)
    along = crop.mean(axis=0 if orient else 1)  # is the same everywhere
    assert np.ptp(along, axis=0).max() < 1


def test_failed_crop_is_that_of_evaluation():
  image = position_image(12, 250)
  evaluate = transforms.eval_transform(32, 'crop_resize')
  example = {'image': image, 'label': 0}
  np.testing.assert_array_equal(
    train(example, 32, flip=False), evaluate(example)['image']
  )
  # As does a box that is all of the image.
  for size in (1, 1), (3, 3), (3, 4):
    crops = {
      crop_of(
        position_image(*size), np.random.default_rng(seed), 1.0, center=0.5
      ).shape
      for seed in range(20)
    }
    assert crops == {(1, 1, 3)}


@pytest.mark.parametrize('shape', [(3000, 3000), (100, 90_000), (90_000, 7)])
def test_memory_of_a_resize_does_not_grow_with_the_image(shape):
  image = np.broadcast_to(np.uint8([1, 2, 3]), (*shape, 3))
  tracemalloc.start()
  resized = transforms.resize(image, 32, 40)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  np.testing.assert_array_equal(resized, np.tile((1, 2, 3), (32, 40, 1)))
  assert peak < 3e6  # all of it in float32 would be 7.6 to 108 MB


@pytest.mark.parametrize('old', [(1000, 90), (7, 2000), (700, 900)])
def test_a_strong_reduction_is_keys_interpolation(old):
  image = random_image(*old)
  expected = np.einsum(
    'hi,ijc,wj->hwc',
    keys_matrix(old[0], 20),
    image.astype(np.float64),
    keys_matrix(old[1], 30),
    optimize=True,
  )
  resized = transforms.resize_float(image, 20, 30)
  np.testing.assert_allclose(resized, expected, atol=1e-3)
