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

import jax
import numpy as np
import pytest
from nfnets_jax.augment import operations
from PIL import Image

from experiments import digits
from nfnets_jax.data import decode, transforms
from nfnets_jax.models import cost
from nfnets_jax.training import train

apply_operations = jax.jit(operations.apply_operations)


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
  assert list(figures) == ['1']
  check_rates(figures['1'], ['transform', 'loader'])


@pytest.mark.slow
def test_input_bench_with_several_workers(photo_tar):
  _, figures = input_bench(
    photo_tar, '--notensorflow', '--threads=1', '--threads=2'
  )
  assert list(figures) == ['1', '2']
  check_rates(figures['2'], ['loader, threads', 'loader, processes'])


def test_input_bench_beside_tensorflow(photo_tar):
  pytest.importorskip('tensorflow')
  printed, figures = input_bench(photo_tar, '--threads=1')
  assert 'transform / tf.data:' in printed
  rates, ratios = figures['1'].values()
  for ours in 'transform', 'loader':
    for theirs in 'tf.data', 'tf.data, RandAugment':
      expected = np.divide(rates[ours], rates[theirs])
      np.testing.assert_allclose(ratios[f'{ours} / {theirs}'], expected)


def augmentation_bench(tmp_path, *args):
  output = tmp_path / 'figures.json'
  printed = command(
    'benchmarks.augmentation',
    '--config=experiments/digits.py',
    '--config.augment.rand_augment=3x10',
    '--batch=4',
    f'--output={output}',
    *args,
  )
  return printed, json.loads(output.read_text())


@pytest.mark.slow
def test_augmentation_bench_estimates(tmp_path):
  printed, figures = augmentation_bench(tmp_path)
  assert 'H100' in printed
  # In each layer every value counts in a histogram and is looked up, and every
  # pixel moves.
  places = 3 * (3 + 3 + 1) * 16 * 16 * 4
  assert places <= figures['augment_irregular_accesses'] < 1.1 * places
  assert figures['augment_flops'] > 3 * 20 * 16 * 16 * 3 * 4
  # Two operations for each multiply-accumulate, forwards and twice backwards.
  shape = jax.ShapeDtypeStruct((1, 16, 16, 3), 'float32')
  net = train.create_net(digits.get_config(), 1000)
  variables = jax.eval_shape(
    lambda key, x: net.init(key, x, is_training=True), jax.random.key(0), shape
  )
  forward = cost.count_macs(
    lambda variables, key, x: net.apply(*variables, key, x, is_training=True),
    variables,
    jax.random.key(0),
    shape,
  )
  assert figures['step_flops'] == pytest.approx(4 * 6 * forward, rel=0.2)
  for low, high in figures['estimated_share_percent'].values():
    assert 0 < low < high


@pytest.mark.slow
def test_augmentation_bench_measures(tmp_path):
  printed, figures = augmentation_bench(tmp_path, '--measure', '--repeats=2')
  assert 'measured share' in printed
  assert len(figures['measured_share_percent']) == 2
  assert min(figures['measured_share_percent']) > 0


@pytest.mark.thorough
@pytest.mark.parametrize(
  'raw_per_image', [1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_contact_sheet(tmp_path, raw_per_image):
  output = tmp_path / 'new folder' / 'sheet.png'
  printed = command(
    'show_augment',
    '--config=experiments/digits.py',
    f'--config.data.data_dir={tmp_path}',
    f'--config.augment.raw_per_image={raw_per_image}',
    '--config.augment.rand_augment=2x5',
    '--images=6',
    '--columns=4',
    '--cell=64',
    f'--output={output}',
  )
  assert 'MixUp 0.2, CutMix, RandAugment 2x5' in printed
  with Image.open(output) as sheet:
    assert sheet.width == 4 * (64 + 8) + 8
    assert sheet.height > 2 * (64 + 32)
    assert len(sheet.getcolors(100_000)) > 10


@pytest.fixture
def unmixed(tmp_path):
  """A config without mixing."""
  path = tmp_path / 'unmixed.py'
  path.write_text(
    'from experiments import digits\n'
    'def get_config():\n'
    '  config = digits.get_config()\n'
    '  config.augment.mixup_alpha = None\n'
    '  config.augment.cutmix = False\n'
    '  return config\n'
  )
  return path


@pytest.mark.thorough
def test_contact_sheet_without_mixing_shows_one_crop_each(tmp_path, unmixed):
  output = tmp_path / 'sheet.png'
  command(
    'show_augment',
    f'--config={unmixed}',
    '--images=3',
    '--cell=64',
    f'--output={output}',
  )
  with Image.open(output) as sheet:
    pixels = np.asarray(sheet.convert('L'))
  below = slice(3 * 8 + 14 + 64 + 2, 3 * 8 + 14 + 64 + 2 + 32)
  for left in 8, 80, 152:
    assert (pixels[below, left : left + 32] < 255).mean() > 0.9
    assert (pixels[below, left + 32 : left + 64] == 255).all()


@pytest.mark.thorough
@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--config=experiments/digits.py', '--images=3'], 'even number'),
    (
      [
        '--config=experiments/nfnet_imagenet.py:F0',
        '--config.data.data_dir=no such folder',
      ],
      'no such folder',
    ),
  ],
)
def test_contact_sheet_says_what_is_wrong(tmp_path, args, message):
  output = tmp_path / 'sheet.png'
  done = run_python(
    '-m', 'experiments.show_augment', f'--output={output}', *args
  )
  assert done.returncode == 1
  assert re.search('^error: ', done.stderr, re.MULTILINE)
  assert message in done.stderr and 'Traceback' not in done.stderr


# The key that step 0 of a run augments with must be the one of the sheet.
FIRST_STEP = """
import types
import jax, numpy as np, optax
from experiments import digits, show_augment
from nfnets_jax.training import train_step

class Seen(Exception):
  pass

def see(key, *_):
  raise Seen(jax.random.key_data(key))

config = digits.get_config()
net = types.SimpleNamespace(init=lambda *args, **options: ({}, {}))
identity = optax.identity()
state = train_step.init_state(net, identity, config.seed, 16)
train_step.augment_batch = see
step = train_step.create_train_step(net, identity, None, config, 10, 'devices')
batch = {
  'image': np.zeros((1, 4, 16, 16, 3), np.uint8),
  'label': np.zeros((1, 4), np.int32),
}
try:
  jax.vmap(step, axis_name='devices', in_axes=(None, 0))(state, batch)
except Seen as seen:
  expected, = seen.args
key = jax.random.key_data(show_augment.first_key(config.seed))
np.testing.assert_array_equal(key, expected)
"""


@pytest.mark.thorough
def test_contact_sheet_draws_with_the_key_of_the_first_step():
  done = run_python('-c', FIRST_STEP)
  assert done.returncode == 0, done.stderr


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
    ours = apply_operations(
      image[None],
      np.array([operations.OPERATIONS.index(name)], np.int32),
      np.array([argument], np.float32),
      center[None],
    )[0]
    differs = np.abs(theirs.astype(int) - np.asarray(ours, int)) > 1
    assert theirs.dtype == np.uint8
    assert differs.mean() < 0.01


def test_resize_in_tensorflow_is_ours(pipeline):
  image = decode.decode(photos(1)[0])
  np.testing.assert_array_equal(
    pipeline.resize(pipeline.tf.constant(image), 32).numpy(),
    transforms.resize(image, 32, 32),
  )


def test_random_crops_in_tensorflow_are_as_large_as_ours(pipeline):
  photo = photos(1)[0]
  pixels = decode.decode(photo)
  rng = np.random.default_rng(0)
  theirs, ours = (
    [np.prod(crop().shape[:2]) / (50 * 70) for _ in range(600)]
    for crop in (
      lambda: pipeline.decode_random_crop(photo),
      lambda: transforms.random_resized_crop(pixels, rng),
    )
  )
  assert min(theirs) == pytest.approx(0.1, abs=0.02)
  assert np.mean(theirs) == pytest.approx(np.mean(ours), abs=0.04)


@pytest.mark.parametrize('policy', [None, (4, 10)])
def test_batches_of_tensorflow(pipeline, policy):
  # Larger than a translation, which would leave nothing of some.
  batches = pipeline.batches(
    photos(), batch_size=4, image_size=128, threads=2, policy=policy
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
