"""ImageNet is prepared from its archives, by the command, with tensorflow.

The command runs in a process of its own, and with another interpreter where the
variable NFNETS_TENSORFLOW_PYTHON names one: what it makes is read here, where
tensorflow need not be.
"""

import io
import os
import pathlib
import signal
import struct
import subprocess
import sys
import tarfile
import time

import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source

from nfnets_jax.data import datasets, loader, transforms

ROOT = pathlib.Path(__file__).parents[3]
PYTHON = os.environ.get('NFNETS_TENSORFLOW_PYTHON') or sys.executable
TRAIN, VALIDATION = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'

# How users have prepared it, but that there would be one file for so little.
TFRECORD = """
import sys
import tensorflow_datasets as tfds
builder = tfds.builder('imagenet2012', data_dir=sys.argv[2])
config = tfds.download.DownloadConfig(manual_dir=sys.argv[1], num_shards=8)
builder.download_and_prepare(file_format='tfrecord', download_config=config)
"""

# The command, but that there is time to kill it.
SLOWLY = """
import time
from nfnets_jax.data.prepare import __main__ as command
from nfnets_jax.data.prepare import tfrecord
convert_shard = tfrecord._convert_shard
def slowly(*args):
  time.sleep(0.2)
  convert_shard(*args)
tfrecord._convert_shard = slowly
command.main()
"""

READ = """
import sys
from nfnets_jax.data import datasets
for split in 'train', 'validation':
  dataset = datasets.load('imagenet2012', split, sys.argv[1])
  assert dataset.num_classes == 1000
  print(sum(bool(dataset.source[i]['image']) for i in range(len(dataset))))
assert 'tensorflow' not in sys.modules
"""

pytestmark = pytest.mark.slow


def start(*words):
  # A test run in the background ignores what is to be sent.
  handler = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    return subprocess.Popen(
      [PYTHON, *map(str, words)],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
  finally:
    signal.signal(signal.SIGINT, handler)


def finish(process):
  out, err = process.communicate(timeout=600)
  return process.returncode, out, err


def run(*words):
  code, out, err = finish(start(*words))
  assert code == 0, err
  return out, err


def prepare(data_dir, **options):
  words = [f'--{name}={value}' for name, value in options.items()]
  return (
    '-m',
    'nfnets_jax.data.prepare',
    'imagenet2012',
    *words,
    (f'--data_dir={data_dir}'),
  )


def wait_for(process, seen):
  while not seen():
    assert process.poll() is None, process.communicate()
    time.sleep(0.001)


@pytest.fixture(scope='module')
def tars(shared):
  folder = shared / 'data' / 'imagenet-sample'
  if not folder.is_dir():
    pytest.skip('no sample of ImageNet beside the checkout')
  find = "import importlib.util as x; exit(x.find_spec('tensorflow') is None)"
  if subprocess.run([PYTHON, '-c', find], check=False).returncode:
    pytest.skip(
      f'{PYTHON} has no tensorflow; `make test-slow` makes an environment '
      'that has'
    )
  return folder


@pytest.fixture(scope='module')
def built(tars, tmp_path_factory):
  """The data_dir of the sample, and what the command printed."""
  folder = tmp_path_factory.mktemp('built')
  return folder, *run(*prepare(folder, imagenet_dir=tars))


@pytest.fixture(scope='module')
def tfrecords(tars, tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfrecords')
  run('-c', TFRECORD, tars, folder)
  return folder


def images_in(tars):
  """Returns the images of both archives, by their names."""
  found = {}
  with tarfile.open(tars / TRAIN) as outer:
    for archive in outer:
      content = outer.extractfile(archive).read()
      with tarfile.open(fileobj=io.BytesIO(content)) as inner:
        for member in inner:
          found[member.name] = inner.extractfile(member).read()
  with tarfile.open(tars / VALIDATION) as archive:
    for member in archive:
      found[member.name] = archive.extractfile(member).read()
  return found


def examples(data_dir):
  """Returns `{file name: (image, name of its class)}` of both splits."""
  found = {}
  for split in 'train', 'validation':
    dataset = datasets.load('imagenet2012', split, data_dir)
    for i in range(len(dataset)):
      example = dataset.source[i]
      label = dataset.class_names[example['label']]
      found[example['file_name'].decode()] = example['image'], label
  return found


def test_command_says_what_it_does(built, tars):
  folder, out, err = built
  assert f'{tars / TRAIN}: train, 256 of 1,281,167 images' in out
  assert f'{tars / VALIDATION}: validation, 64 of 50,000 images' in out
  assert 'This is a sample of ImageNet.' in out
  assert f'prepared in {folder}/imagenet2012/5.1.0\n  train: 256 ex' in out
  assert '\n  validation: 64 examples\n' in out
  assert '/256 [' in err and '/64 [' in err  # progress


def test_prepared_sample_is_what_the_archives_hold(built, tars):
  folder, *_ = built
  found = examples(folder)
  images = images_in(tars)
  assert len(found) == len(images) == 256 + 64
  assert {name: image for name, (image, _) in found.items()} == images
  path = tfds.core.tfds_path('datasets/imagenet2012/validation_labels.txt')
  synsets = path.read_text().split()
  for name, (_, synset) in found.items():
    if name.startswith('ILSVRC2012_val_'):
      number = int(name.removesuffix('.JPEG').rpartition('_')[2])
      assert synset == synsets[number - 1]
    else:
      assert synset == name.split('_')[0]


def test_prepared_sample_is_read_without_tensorflow(built):
  folder, *_ = built
  command = [sys.executable, '-c', READ, folder]
  out = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
  assert out.stdout.split() == [b'256', b'64']


def test_prepared_sample_makes_batches(built):
  folder, *_ = built
  batches = loader.train_batches(
    datasets.load('imagenet2012', 'train[56:]', folder),
    batch_size=200,
    transform=transforms.train_transform(image_size=32),
    seed=0,
  )
  batch = next(batches)
  assert batch['image'].shape == (200, 32, 32, 3)
  assert len(set(batch['label'].tolist())) > 100


def test_prepared_sample_is_left_alone(built, tars):
  folder, *_ = built
  before = {x: x.stat().st_mtime_ns for x in folder.rglob('*')}
  out, _ = run(*prepare(folder, imagenet_dir=tars))
  assert 'imagenet2012: already prepared in' in out
  assert f'delete this one: rm -r {folder}/imagenet2012/5.1.0' in out
  assert before == {x: x.stat().st_mtime_ns for x in folder.rglob('*')}


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_building_can_be_interrupted(how, tars, tmp_path):
  process = start(*prepare(tmp_path, imagenet_dir=tars))

  def leftovers():
    return list((tmp_path / 'imagenet2012').glob('incomplete.*'))

  wait_for(process, leftovers)
  process.send_signal(how)
  code, _, err = finish(process)
  with pytest.raises(FileNotFoundError, match='not prepared'):
    datasets.load('imagenet2012', 'train', tmp_path)
  if how == signal.SIGKILL:
    assert code == -signal.SIGKILL
    (leftover,) = leftovers()
  else:
    assert code == 130
    assert 'interrupted: nothing is kept; the same command starts' in err
    assert not leftovers()
  out, _ = run(*prepare(tmp_path, imagenet_dir=tars))
  if how == signal.SIGKILL:
    assert f'delete it: rm -r {leftover}\n' in out
  assert len(datasets.load('imagenet2012', 'train', tmp_path)) == 256


def read_tfrecord(path):
  data = path.read_bytes()
  while data:
    (length,) = struct.unpack_from('<Q', data)
    yield data[12 : 12 + length]
    data = data[16 + length :]


def test_tfrecord_copy_is_converted_despite_a_kill(tfrecords, built, tmp_path):
  options = prepare(tmp_path, from_tfrecord=tfrecords)[2:]
  process = start('-c', SLOWLY, *options)

  def finished():
    return list(tmp_path.glob('imagenet2012/incomplete.*/*-of-00008'))

  wait_for(process, lambda: len(finished()) >= 3)
  process.kill()
  finish(process)
  with pytest.raises(FileNotFoundError, match='not prepared'):
    datasets.load('imagenet2012', 'train', tmp_path)
  times = {path.name: path.stat().st_mtime_ns for path in finished()}
  assert 3 <= len(times) < 16

  out, err = run('-m', 'nfnets_jax.data.prepare', *options)
  assert '\n  train: 256 examples\n  validation: 64 examples\n' in out
  assert '320/320' in err
  folder = tmp_path / 'imagenet2012' / '5.1.0'
  for name, mtime in times.items():
    assert (folder / name).stat().st_mtime_ns == mtime  # not made anew
  paths = sorted((tfrecords / 'imagenet2012' / '5.1.0').glob('*.tfrecord-*'))
  assert len(paths) == 16
  for path in paths:
    name = path.name.replace('tfrecord', 'array_record')
    source = array_record_data_source.ArrayRecordDataSource(
      [str(folder / name)]
    )
    converted = [source[i] for i in range(len(source))]
    assert converted == list(read_tfrecord(path))
  assert examples(tmp_path) == examples(built[0])


def test_copy_that_is_loaded_names_a_command_that_works(tfrecords, tmp_path):
  with pytest.raises(ValueError, match='no random access') as error:
    datasets.load('imagenet2012', 'train', tfrecords)
  command = str(error.value).rpartition(': python ')[2]
  command = command.replace('ANOTHER_FOLDER', str(tmp_path))
  run(*command.split())
  assert len(datasets.load('imagenet2012', 'train', tmp_path)) == 256


def test_corrupt_tfrecord_file_is_named(tfrecords, tmp_path):
  for path in tfrecords.rglob('*'):
    if path.is_file():
      copy = tmp_path / 'copy' / path.relative_to(tfrecords)
      copy.parent.mkdir(parents=True, exist_ok=True)
      copy.write_bytes(path.read_bytes())
  name = 'imagenet2012-train.tfrecord-00005-of-00008'
  path = tmp_path / 'copy' / 'imagenet2012' / '5.1.0' / name
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  code, _, err = finish(
    start(*prepare(tmp_path / 'new', from_tfrecord=tmp_path / 'copy'))
  )
  assert code == 1
  assert f'error: cannot read {path}: ' in err and 'corrupted record' in err
