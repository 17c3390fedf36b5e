"""Benches and the contact sheet run; what is compared does the same.

The commands run in processes of their own, since some of their flags have the
same names.
"""

import io
import json
import os
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from experiments import digits
from experiments.figures import show_augment
from nfnets_jax.data import crops, decode, operations, resize
from nfnets_jax.training import build


def run_python(*args):
  return subprocess.run(
    [sys.executable, *map(str, args)],
    env={**os.environ, 'TF_CPP_MIN_LOG_LEVEL': '2'},
    capture_output=True,
    text=True,
  )


def command(module, *args):
  """Runs a module and returns what it printed."""
  done = run_python('-m', f'experiments.{module}', *args)
  assert done.returncode == 0, done.stderr
  return done.stdout


def photos(count=6):
  rng = np.random.default_rng(0)
  found = []
  for _ in range(count):
    blocks = rng.integers(256, size=(5, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((70, 50)).save(buffer, format='JPEG')
    found.append(buffer.getvalue())
  return found


def write_tar(path, files):
  with tarfile.open(path, 'w') as tar:
    for name, content in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def photo_tar(tmp_path):
  """A tar of a photograph and of a tar of five."""
  first, *others = photos()
  write_tar(
    tmp_path / 'class.tar', {f'{i}.JPEG': x for i, x in enumerate(others)}
  )
  inner = (tmp_path / 'class.tar').read_bytes()
  write_tar(tmp_path / 'all.tar', {'0.JPEG': first, 'class.tar': inner})
  return tmp_path / 'all.tar'


def input_bench(photo_tar, *args):
  output = photo_tar.parent / 'figures.json'
  printed = command(
    'benchmarks.input_pipeline',
    f'--tar={photo_tar}',
    f'--output={output}',
    '--image_size=32',
    '--batch=2',
    '--repeats=2',
    *args,
  )
  return printed, json.loads(output.read_text())


def check_rates(figures, names):
  assert list(figures['images_per_second_per_core']) == names
  for rates in figures['images_per_second_per_core'].values():
    assert len(rates) == 2 and min(rates) > 0


def test_input_bench_without_tensorflow(photo_tar):
  printed, figures = input_bench(photo_tar, '--notensorflow', '--threads=1')
  assert printed.startswith('6 photographs of')
  assert list(figures) == ['1', 'milliseconds', 'small_microseconds']
  check_rates(figures['1'], ['photographs alone', 'pipeline', 'loader'])
  assert min(figures['milliseconds'].values()) > 0
  assert figures['small_microseconds'] > 0


@pytest.mark.slow
def test_input_bench_with_several_workers(photo_tar):
  _, figures = input_bench(
    photo_tar, '--notensorflow', '--threads=1', '--threads=2'
  )
  check_rates(figures['2'], ['loader, threads', 'loader, processes'])


def test_input_bench_beside_tensorflow(photo_tar):
  pytest.importorskip('tensorflow')
  printed, figures = input_bench(photo_tar, '--threads=1')
  assert 'pipeline / tf.data:' in printed
  rates, ratios = figures['1'].values()
  for ours in 'photographs alone', 'pipeline', 'loader':
    for theirs in 'tf.data', 'tf.data, photographs':
      expected = np.divide(rates[ours], rates[theirs])
      np.testing.assert_allclose(ratios[f'{ours} / {theirs}'], expected)


@pytest.mark.thorough
def test_contact_sheet(tmp_path):
  output = tmp_path / 'new folder' / 'sheet.png'
  printed = command(
    'figures.show_augment',
    '--config=experiments/digits.py',
    f'--config.data.data_dir={tmp_path}',
    '--config.augment.rand_augment=2x5',
    '--images=6',
    '--columns=4',
    f'--output={output}',
  )
  assert 'MixUp 0.2, CutMix, RandAugment 2x5' in printed
  with Image.open(output) as sheet:
    assert sheet.size == (680, 640)
    assert (np.asarray(sheet.convert('L')) < 255).mean() > 0.3


def test_tile_has_one_crop_without_mixing():
  image, *crops = np.random.default_rng(0).integers(
    200, size=(3, 8, 8, 3), dtype=np.uint8
  )
  for shown in (crops, crops[:1]):
    tile = show_augment.tile(image, np.stack(shown))
    np.testing.assert_array_equal(tile[:8], image)
    assert (tile[8:, :4] < 255).all()
    assert (tile[8:, 4:] == 255).all() == (len(shown) == 1)


@pytest.mark.thorough
def test_contact_sheet_names_a_missing_folder(tmp_path):
  done = run_python(
    '-m',
    'experiments.figures.show_augment',
    f'--output={tmp_path / "sheet.png"}',
    '--config=experiments/nfnet_imagenet.py:F0',
    '--config.data.data_dir=no such folder',
  )
  assert done.returncode == 1
  assert re.search('^error: ', done.stderr, re.MULTILINE)
  assert 'no such folder' in done.stderr and 'Traceback' not in done.stderr


def test_contact_sheet_is_of_the_first_step(tmp_path):
  config = digits.get_config()
  config.data.data_dir = str(tmp_path)
  config.augment.rand_augment = '2x5'
  crops, images, labels, _ = show_augment.make_images(config, 6)
  config.data.num_workers = 0
  dataset, _ = build.load_data(config)
  batches = build.train_batches(config, dataset)
  batch = next(batches)
  batches.close()
  np.testing.assert_array_equal(images, batch['image'][:6])
  for i, (label, weights) in enumerate(
    zip(batch['label'], labels[:6], strict=False)
  ):
    assert weights.sum() == pytest.approx(1)
    assert weights[label] >= batch['ratio'][i] - 1e-6
  # Mixed by hand, they are what RandAugment was given.
  config.augment.rand_augment = None
  crops, images, _, _ = show_augment.make_images(config, 6)
  ratio = batch['ratio'][0]
  expected = ratio * crops[0, 0] + (1 - ratio) * crops[0, 1]
  np.testing.assert_array_equal(images[0], np.floor(expected + 0.5))


@pytest.fixture(scope='module')
def pipeline():
  """What ours is timed beside."""
  pytest.importorskip('tensorflow')
  from experiments.benchmarks import tf_pipeline

  return tf_pipeline


@pytest.mark.parametrize('magnitude', [3, 10, 15])
@pytest.mark.parametrize('name', operations.OPERATIONS)
def test_operation_in_tensorflow_is_ours(pipeline, name, magnitude):
  with Image.open(io.BytesIO(photos(1)[0])) as file:
    image = np.array(file)
  center = np.array([20, 50], np.int32)
  for sign in (1, -1) if name in operations.SIGNED else (1,):
    argument = sign * operations.argument(name, magnitude)
    theirs = pipeline.OPERATIONS[name](
      pipeline.tf.constant(image), argument, pipeline.tf.constant(center)
    ).numpy()
    ours = operations.apply(name, image, argument, tuple(center.tolist()))
    differs = np.abs(theirs.astype(int) - np.asarray(ours, int)) > 1
    assert theirs.dtype == np.uint8
    assert differs.mean() < 0.01


def test_resize_in_tensorflow_is_ours(pipeline):
  image = decode.decode(photos(1)[0])
  np.testing.assert_array_equal(
    pipeline.resize(pipeline.tf.constant(image), 32).numpy(),
    resize.resize(image, 32, 32),
  )


def test_random_crops_in_tensorflow_are_as_large_as_ours(pipeline):
  photo = photos(1)[0]
  pixels = decode.decode(photo)
  rng = np.random.default_rng(0)
  theirs, ours = (
    [np.prod(crop().shape[:2]) / (50 * 70) for _ in range(600)]
    for crop in (
      lambda: pipeline.decode_random_crop(photo),
      lambda: crops.random_resized_crop(pixels, rng.random(40)),
    )
  )
  assert min(theirs) == pytest.approx(0.1, abs=0.02)
  assert np.mean(theirs) == pytest.approx(np.mean(ours), abs=0.04)


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'mixup_alpha': 0.2},
    {'mixup_alpha': 0.2, 'cutmix': True, 'policy': (4, 10)},
  ],
)
def test_batches_of_tensorflow(pipeline, options):
  # Larger than a translation, which would leave nothing of some.
  batches = pipeline.batches(
    photos(), batch_size=4, image_size=128, threads=2, **options
  )
  some = np.stack([next(batches) for _ in range(3)])
  assert some.shape == (3, 4, 128, 128, 3) and some.dtype == np.uint8
  assert some.std() > 10


@pytest.mark.slow
def test_clipping_is_timed_beside_optax():
  out = command('benchmarks.clipping', '--model=nfnet_tiny', '--repeats=2')
  rows = [line for line in out.splitlines() if line.startswith('ours')]
  assert len(rows) == 2
  args = ('--model=nfnet_tiny', '--repeats=2', '--json')
  result = json.loads(command('benchmarks.clipping', *args))
  assert {*result['temporaries']} == {*result['seconds']}
  assert all(len(times) == 2 for times in result['seconds'].values())
