"""Images of training and evaluation: each a function of its numbers alone."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from nfnets_jax.data import (
  crops,
  decode,
  mixing,
  randaugment,
  resize,
  transforms,
)

MEAN = np.array([0.485, 0.456, 0.406]) * 255
STD = np.array([0.229, 0.224, 0.225]) * 255


def _image(height, width, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(256, size=(height, width, 3), dtype=np.uint8)


def _examples(n, size=(30, 40), seed=0):
  return [
    {'image': _image(*size, seed + i), 'label': (seed + i) % 7}
    for i in range(n)
  ]


def _uniform(n, seed=0):
  return np.random.default_rng(seed).random((n, transforms.NUM_DRAWS))


def _make(options, n=1, seed=0, size=(30, 40)):
  make = transforms.train_transform(24, **options)
  first, second = _examples(n, size, seed), _examples(n, size, seed + 50)
  return make(first, second, _uniform(n, seed), np.arange(n))


CROPS = ['random_resized', 'random_resized_0.25', 'pad_4', 'none']


@pytest.mark.parametrize('crop', CROPS)
def test_an_image_is_a_function_of_its_numbers(crop):
  make = transforms.train_transform(24, crop)
  examples = [{'image': _image(30, 40), 'label': 7}]
  results = [
    make(examples, examples, _uniform(1, seed), np.array([0]))
    for seed in (*range(8), 0)
  ]
  for result in results:
    assert result['image'].shape == (1, 24, 24, 3)
    assert result['image'].dtype == np.uint8
    for name in ('label', 'mix_label'):
      assert result[name].dtype == np.int32 and result[name] == [7]
    assert result['ratio'].dtype == np.float32 and result['ratio'] == [1]
  np.testing.assert_array_equal(results[0]['image'], results[-1]['image'])
  different = {result['image'].tobytes() for result in results}
  assert len(different) == (2 if crop == 'none' else 8)


def test_without_chance_it_is_a_resize():
  make = transforms.train_transform(24, crop='none', flip=False)
  examples = _examples(1)
  result = make(examples, examples, _uniform(1), np.array([0]))
  expected = resize.resize(examples[0]['image'], 24, 24)
  np.testing.assert_array_equal(result['image'][0], expected)


def test_flip_mirrors_half_of_the_images():
  make = transforms.train_transform(24, crop='none')
  image = _image(24, 24)
  examples = [{'image': image, 'label': 0}] * 1000
  result = make(examples, examples, _uniform(1000), np.arange(1000))['image']
  mirrored = (result == image[:, ::-1]).all((1, 2, 3))
  np.testing.assert_array_equal(
    result[~mirrored], np.broadcast_to(image, result[~mirrored].shape)
  )
  assert 440 < mirrored.sum() < 560


EVERYTHING = {'mixup_alpha': 0.2, 'cutmix': True, 'rand_augment': '4x10'}


@pytest.mark.parametrize('size', [(8, 8), (24, 24), (30, 40)])
@pytest.mark.parametrize('crop', CROPS)
@pytest.mark.parametrize('others', [{}, EVERYTHING])
def test_a_chunk_is_its_images_one_by_one(size, crop, others):
  n, first_index = 12, 7
  make = transforms.train_transform(24, crop, **others)
  first, second = _examples(n, size), _examples(n, size, 50)
  uniform, index = _uniform(n), first_index + np.arange(n)
  chunk = make(first, second, uniform, index)
  for i in range(n):
    one = slice(i, i + 1)
    alone = make(first[one], second[one], uniform[one], index[one])
    assert alone.keys() == chunk.keys()
    for name in alone:
      np.testing.assert_array_equal(alone[name], chunk[name][one], strict=True)


def test_a_chunk_of_images_of_several_sizes():
  sizes = [(8, 8), (30, 40), (8, 8)]
  make = transforms.train_transform(24, 'pad_2', mixup_alpha=0.2)
  examples = [
    {'image': _image(*size, i), 'label': i} for i, size in enumerate(sizes)
  ]
  uniform = _uniform(3)
  chunk = make(examples, examples[::-1], uniform, np.arange(3))
  assert chunk['label'].tolist() == [0, 1, 2]
  assert chunk['mix_label'].tolist() == [2, 1, 0]
  alone = make(examples[1:2], examples[1:2], uniform[1:2], np.array([1]))
  np.testing.assert_array_equal(chunk['image'][1:2], alone['image'])


def test_the_parts_are_applied_in_order():
  first, second, uniform = _examples(4), _examples(4, seed=50), _uniform(4)
  index = np.arange(4)
  result = transforms.train_transform(24, **EVERYTHING)(
    first, second, uniform, index
  )
  plain = transforms.train_transform(24)
  a = plain(first, first, uniform, index)['image']
  numbers = transforms.numbers_of_second(uniform)
  b = plain(second, second, numbers, index)['image']
  rest = uniform[:, 2 * (crops.NUM_DRAWS + 1) :]
  mixed, ratio = mixing.mix(a, b, rest[:, : mixing.NUM_DRAWS], index, 0.2, True)
  policy = randaugment.parse_policy('4x10')
  for i in range(4):
    expected = randaugment.rand_augment(
      mixed[i], rest[i, mixing.NUM_DRAWS :], policy
    )
    np.testing.assert_array_equal(result['image'][i], expected)
  np.testing.assert_array_equal(result['ratio'], ratio)
  assert result['label'].tolist() == [x['label'] for x in first]
  assert result['mix_label'].tolist() == [x['label'] for x in second]


@pytest.mark.parametrize('options', [{}, {'cutmix': True}, EVERYTHING])
@pytest.mark.parametrize('n', [1, 3])
def test_what_is_in_memory_stays_as_it_is(options, n):
  make = transforms.train_transform(24, 'none', flip=False, **options)
  first, second = _examples(n, (24, 24)), _examples(n, (24, 24), 50)
  result = make(first, second, _uniform(n), np.arange(n))
  for examples, seed in ((first, 0), (second, 50)):
    for i, example in enumerate(examples):
      np.testing.assert_array_equal(example['image'], _image(24, 24, seed + i))
      assert not np.shares_memory(result['image'], example['image'])


def test_decoded_photographs_are_turned_when_told_to():
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = 6
  buffer = io.BytesIO()
  Image.fromarray(_image(40, 60)).save(buffer, format='PNG', exif=exif)
  for orient, shape in ((None, (40, 60)), (False, (40, 60)), (True, (60, 40))):
    example = {'image': buffer.getvalue(), 'label': 3}
    if orient is not None:
      example['orient'] = orient
    decoded = transforms.decode_example(example)
    assert decoded['image'].shape == (*shape, 3) and decoded['label'] == 3


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'mixup_alpha': 0.0}, 'mixup alpha must be positive, not 0.0'),
    ({'mixup_alpha': float('nan')}, 'must be positive, not nan'),
    ({'mixup_alpha': float('inf')}, 'must be positive, not inf'),
    ({'rand_augment': '4y5'}, '4y5'),
    ({'rand_augment': '43x5'}, 'has more than 42 layers'),
    ({'crop': 'pad'}, 'unknown crop'),
  ],
)
def test_impossible_transforms(options, message):
  with pytest.raises(ValueError, match=message):
    transforms.train_transform(24, **options)


def test_as_many_layers_as_there_are_numbers():
  assert transforms.MAX_LAYERS == 42
  result = _make({'rand_augment': '42x5', 'cutmix': True})
  assert result['image'].shape == (1, 24, 24, 3)


def encode(image, image_format='PNG', **options):
  buffer = io.BytesIO()
  image.save(buffer, format=image_format, **options)
  return buffer.getvalue()


def position_image(height, width):
  """An image whose every pixel says where it is."""
  rows, columns = np.mgrid[:height, :width]
  return np.stack([rows, columns, np.ones_like(rows)], axis=-1).astype(np.uint8)


def train(example, image_size, seed=0, *args, **kwargs):
  """One training image, without mixing."""
  examples = [transforms.decode_example(example)]
  uniform = np.random.default_rng(seed).random((1, transforms.NUM_DRAWS))
  make = transforms.train_transform(image_size, *args, **kwargs)
  return make(examples, examples, uniform, np.array([0]))['image'][0]


def test_random_crop_of_a_photograph_is_that_of_its_pixels(photographs):
  for seed, encoded in enumerate(photographs):
    results = [
      train({'image': image, 'label': 0}, 32, seed)
      for image in (encoded, decode.decode(encoded))
    ]
    np.testing.assert_array_equal(*results)


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
    center = resize.resize(squashed['image'][11:53, 11:53], 64, 64)
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
