"""Data sets are found, sliced and refused with a remedy."""

import concurrent.futures
import io
import itertools
import json
import multiprocessing
import pickle
import shutil

import cloudpickle
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source
from tensorflow_datasets.core import file_adapters

from nfnets_jax.data import builders, datasets, decode, prepare
from nfnets_jax.data.prepare import imagenet, tfrecord


class NoLabels(tfds.core.GeneratorBasedBuilder):
  """A data set without images."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {'x': tfds.features.Scalar(np.int32)}
      ),
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    yield 0, {'x': 0}


class CorruptImages(tfds.core.GeneratorBasedBuilder):
  """Images that cannot be decoded, with names, as ImageNet has them."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = {
      'image': tfds.features.Image(encoding_format='jpeg'),
      'mask': tfds.features.Image(encoding_format='png'),
      'label': tfds.features.ClassLabel(num_classes=2),
      'file_name': tfds.features.Text(),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    yield (
      0,
      {
        'image': io.BytesIO(b'no image'),
        'mask': io.BytesIO(b'no image either'),
        'label': 1,
        'file_name': 'bad.jpg',
      },
    )


def labels(dataset):
  return [dataset.source[i]['label'] for i in range(len(dataset))]


def test_dataset_describes_itself(digits_dir):
  dataset = datasets.load('digits', 'test', digits_dir)
  assert (dataset.name, dataset.split) == ('digits', 'test')
  assert len(dataset) == len(dataset.source) == 360
  assert dataset.num_classes == 10
  assert dataset.class_names == tuple('0123456789')
  example = dataset.source[0]
  assert example['image'].startswith(b'\x89PNG')
  assert isinstance(example['label'], int)


def test_slices_cover_a_split(digits_dir):
  whole, head, tail, both = (
    labels(datasets.load('digits', split, digits_dir))
    for split in ('train', 'train[:25%]', 'train[25%:]', 'test+train')
  )
  assert len(head) == 359
  assert head + tail == whole
  assert both[360:] == whole


@pytest.mark.parametrize(
  ('name', 'split'),
  [
    ('digits', 'validation'),
    ('digits', 'train[2000:]'),
    ('digits', 'train[:0]'),
    ('digits', 'train[5:3]'),
    ('digits', 'train+'),
    ('fake', 'test'),
    ('fake', 'train['),
  ],
)
def test_bad_split_is_named(name, split, digits_dir):
  with pytest.raises(ValueError, match='split') as error:
    datasets.load(name, split, digits_dir)
  assert split in str(error.value)


def test_slice_out_of_range_says_how_many_examples_there_are(digits_dir):
  with pytest.raises(ValueError, match='examples: train 1,437, test 360'):
    datasets.load('digits', 'train[10000:]', digits_dir)


def test_data_dir_is_only_read(digits_dir, tmp_path):
  shutil.copytree(digits_dir / 'digits', tmp_path / 'digits')
  paths = [tmp_path, *tmp_path.rglob('*')]
  modes = {path: path.stat().st_mode for path in paths}
  for path in paths:
    path.chmod(modes[path] & 0o555)
  before = {path: path.stat() for path in paths}
  try:
    dataset = datasets.load('digits', 'train', tmp_path)
    assert len(labels(dataset)) == 1437
    after = {path: path.stat() for path in [tmp_path, *tmp_path.rglob('*')]}
  finally:
    for path in paths:
      path.chmod(modes[path])
  assert after.keys() == before.keys()
  for path in paths:  # as root, the modes alone would prevent nothing
    assert after[path].st_mtime_ns == before[path].st_mtime_ns


def test_unprepared_data_set_names_folder_and_remedy(tmp_path):
  with pytest.raises(FileNotFoundError) as error:
    datasets.load('digits', 'train', tmp_path)
  assert str(tmp_path / 'digits' / '1.0.0') in str(error.value)
  command = f'python -m nfnets_jax.data.prepare digits --data_dir={tmp_path}'
  assert str(error.value).endswith(command)


@pytest.mark.parametrize('name', ['imagenet2012', 'imagenet2012:5.1.0'])
@pytest.mark.filterwarnings('ignore')
def test_unprepared_imagenet_names_commands_that_work(tmp_path, name):
  """As they stand, but for the folder of the archives."""
  with pytest.raises(FileNotFoundError) as error:
    datasets.load(name, 'train', tmp_path)
  text = str(error.value)
  assert f'make imagenet IMAGENET_DIR=FOLDER DATA_DIR={tmp_path}\n' in text
  command = f'{name} --imagenet_dir=FOLDER --data_dir={tmp_path})'
  assert f'python -m nfnets_jax.data.prepare {command}' in text
  assert 'ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar' in text
  with pytest.raises(FileNotFoundError) as error:
    datasets.load(name, 'train', tmp_path / 'my data')
  assert f"'DATA_DIR={tmp_path}/my data'" in str(error.value)
  with pytest.raises(ValueError, match='make imagenet` takes them as IMAGENET'):
    prepare.prepare(name, tmp_path)


def test_other_versions_are_named(digits_dir, tmp_path):
  shutil.copytree(digits_dir / 'digits' / '1.0.0', tmp_path / 'digits/0.9.0')
  path = tmp_path / 'digits' / '0.9.0' / 'dataset_info.json'
  info = json.loads(path.read_text())
  path.write_text(json.dumps({**info, 'version': '0.9.0'}))
  shutil.copytree(path.parent, tmp_path / 'digits' / 'incomplete.1_1.0.0')
  with pytest.raises(FileNotFoundError, match="only 'digits:0.9.0'; prep"):
    datasets.load('digits', 'train', tmp_path)
  assert len(datasets.load('digits:0.9.0', 'train', tmp_path)) == 1437
  with pytest.raises(ValueError, match=r'at version 0.8.0, only: 1.0.0'):
    datasets.load('digits:0.8.0', 'train', tmp_path)


def test_data_dir_may_begin_with_a_tilde(digits_dir, monkeypatch):
  monkeypatch.setenv('HOME', str(digits_dir.parent))
  data_dir = f'~/{digits_dir.name}'
  assert len(datasets.load('digits', 'test', data_dir)) == 360


@pytest.mark.parametrize('pickler', [pickle, cloudpickle])
@pytest.mark.parametrize('name', ['digits', 'fake', 'folder'])
def test_data_sets_can_be_pickled(name, pickler, digits_dir, tmp_path):
  data_dir = digits_dir
  if name == 'folder':
    data_dir = tmp_path
    for path in 'cat/1.jpg', 'dog/2.png':
      (tmp_path / 'train' / path).parent.mkdir(parents=True)
      (tmp_path / 'train' / path).write_bytes(path.encode())
  dataset = datasets.load(name, 'train[1:]', data_dir)
  copy = pickle.loads(pickler.dumps(dataset))
  assert (copy.name, copy.split) == (name, 'train[1:]')
  assert copy.class_names == dataset.class_names
  assert len(copy) == len(dataset)
  for i in 0, len(dataset) - 1:
    np.testing.assert_equal(copy.source[i], dataset.source[i])


def test_worker_process_can_read(digits_dir):
  dataset = datasets.load('digits', 'test', digits_dir)
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
    found = pool.submit(labels, dataset).result()
  assert found == labels(dataset)


def test_corrupt_image_leaves_the_rest_of_the_example(tmp_path):
  builder = tfds.builder('corrupt_images', data_dir=tmp_path)
  builder.download_and_prepare(file_format='array_record')
  dataset = datasets.load('corrupt_images', 'train', tmp_path)
  assert dataset.source[0] == {
    'image': b'no image',
    'mask': b'no image either',
    'label': 1,
    'file_name': b'bad.jpg',
  }


def test_unknown_data_set_is_named_with_a_hint(tmp_path):
  with pytest.raises(ValueError, match="unknown data set 'cifar_10'") as error:
    datasets.load('cifar_10', 'train', tmp_path)
  assert str(tmp_path) in str(error.value)
  assert 'did you mean cifar10' in str(error.value)


def test_missing_package_is_named(tmp_path, monkeypatch):
  def builder(*args, **kwargs):
    raise ModuleNotFoundError("No module named 'huggingface_hub'")

  monkeypatch.setattr(tfds, 'builder', builder)
  with pytest.raises(
    ValueError, match="'huggingface:mnist' needs .*'huggingface_hub'"
  ):
    datasets.load('huggingface:mnist', 'train', tmp_path)


SHARD_LENGTHS = [500, 500, 437]


@pytest.fixture
def shards(digits_dir, tmp_path):
  """A folder in which the training images of `digits` fill three files."""
  folder = tmp_path / 'digits' / '1.0.0'
  shutil.copytree(digits_dir / 'digits' / '1.0.0', folder)
  (path,) = folder.glob('digits-train.*')
  source = array_record_data_source.ArrayRecordDataSource([str(path)])
  records = iter([source[i] for i in range(len(source))])
  path.unlink()
  adapter = file_adapters.ArrayRecordFileAdapter
  for i, length in enumerate(SHARD_LENGTHS):
    adapter.write_examples(
      folder / f'digits-train.array_record-{i:05d}-of-00003',
      enumerate(itertools.islice(records, length)),
    )
  path = folder / 'dataset_info.json'
  info = json.loads(path.read_text())
  (train,) = (x for x in info['splits'] if x['name'] == 'train')
  train['shardLengths'] = list(map(str, SHARD_LENGTHS))
  path.write_text(json.dumps(info))
  assert len(datasets.load('digits', 'train', tmp_path)) == 1437
  return folder


def corrupt(folder, split='train'):
  data_dir = folder.parents[1]
  with pytest.raises(ValueError) as error:
    datasets.load('digits', split, data_dir)
  reason, remedy = str(error.value).rsplit('\n', 1)
  assert remedy == (
    f'If {folder} is corrupt, delete it and prepare it again with: python -m '
    f'nfnets_jax.data.prepare digits --data_dir={data_dir}'
  )
  return reason


def test_missing_and_empty_files_are_named(shards):
  first, second, third = sorted(shards.glob('digits-train.*'))
  second.write_bytes(b'')
  assert corrupt(shards) == (
    f'1 of 3 files are missing or empty in {shards}: {second.name}'
  )
  third.unlink()
  reason = corrupt(shards, 'train[1:]+train[:5]+test')
  assert f'2 of 4 files are missing or empty in {shards}' in reason
  # What a slice does not need may be missing.
  assert len(datasets.load('digits', 'train[:500]', shards.parents[1])) == 500
  first.unlink()
  assert corrupt(shards).endswith(
    f': {first.name}, {second.name}, {third.name}'
  )


@pytest.mark.parametrize('which', [0, 2])
@pytest.mark.parametrize('how', ['truncated', 'half', 'zeroed', 'half zeroed'])
def test_corrupt_files_are_named(how, which, shards):
  path = sorted(shards.glob('digits-train.*'))[which]
  data = path.read_bytes()
  half = len(data) // 2
  path.write_bytes(
    {
      'truncated': data[:-1000],
      'half': data[:half],
      'zeroed': bytes(len(data)),
      'half zeroed': data[:half] + bytes(half),
    }[how]
  )
  assert corrupt(shards).startswith(f'cannot read {path}: ')
  assert len(datasets.load('digits', 'test', shards.parents[1])) == 360


@pytest.mark.parametrize('content', ['', '{"name": "dig', '\0' * 300])
def test_corrupt_description_is_named(content, shards):
  path = shards / 'dataset_info.json'
  path.write_text(content)
  assert corrupt(shards).startswith(f'{path} is corrupt: ')


def test_data_set_without_images_is_refused(tmp_path):
  builder = tfds.builder('no_labels', data_dir=tmp_path)
  builder.download_and_prepare(file_format='array_record')
  with pytest.raises(ValueError, match="'no_labels' is not for image") as error:
    datasets.load('no_labels', 'train', tmp_path)
  assert "'x'" in str(error.value)


def test_format_without_random_access_is_refused(digits_dir, tmp_path):
  shutil.copytree(digits_dir / 'digits', tmp_path / 'digits')
  info_path = tmp_path / 'digits' / '1.0.0' / 'dataset_info.json'
  info = json.loads(info_path.read_text())
  info_path.write_text(json.dumps({**info, 'fileFormat': 'tfrecord'}))
  with pytest.raises(ValueError, match='no random access') as error:
    datasets.load('digits', 'train', tmp_path)
  folder = tmp_path / 'digits' / '1.0.0'
  assert str(error.value).endswith(
    'python -m nfnets_jax.data.prepare digits '
    f'--from_tfrecord={folder} --data_dir=ANOTHER_FOLDER'
  )


def test_fake_images_are_a_function_of_their_index():
  train = datasets.load('fake', 'train')
  validation = datasets.load('fake', 'validation')
  assert (len(train), len(validation)) == (1_281_167, 50_000)
  assert train.num_classes == 1000
  tail = datasets.load('fake', 'train[1000:]+validation[:3]')
  assert len(tail) == 1_281_167 - 1000 + 3
  for mine, other in (
    (tail.source[7], train.source[1007]),
    (tail.source[len(tail) - 1], validation.source[2]),
  ):
    np.testing.assert_array_equal(mine['image'], other['image'])
    assert mine['label'] == other['label']
  first, second = train.source[0]['image'], train.source[1]['image']
  assert first.shape == (256, 256, 3) and first.dtype == np.uint8
  assert (first != second).mean() > 0.99
  assert (first != validation.source[0]['image']).mean() > 0.99


def test_data_set_known_from_its_files_alone(shared):
  data_dir = shared / 'data' / 'tfds'
  if not data_dir.is_dir():
    pytest.skip('no prepared CIFAR-10 beside the checkout')
  dataset = datasets.load('cifar10_jpeg', 'train[10000:]', data_dir)
  assert (len(dataset), dataset.num_classes) == (40_000, 10)
  example = dataset.source[39_999]
  assert decode.decode(example['image']).shape == (32, 32, 3)
  assert 0 <= example['label'] < 10


def test_kept_examples_are_those_that_were_read(digits_dir):
  plain = datasets.load('digits', 'train[:5]', digits_dir)
  kept = datasets.keep_in_memory(plain)
  assert len(kept) == 5 and kept.class_names == plain.class_names
  for index in (3, 3, 0):
    expected = decode.decode(plain.source[index]['image'])
    np.testing.assert_array_equal(kept.source[index]['image'], expected)
    assert kept.source[index]['label'] == plain.source[index]['label']
  assert kept.source[3] is kept.source[3]


class Unlabelled(tfds.core.GeneratorBasedBuilder):
  """A split with labels and one without, as in `imagenet2012`."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = {
      'image': tfds.features.Image(encoding_format='png'),
      'label': tfds.features.ClassLabel(num_classes=2),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {
      'train': self._generate_examples([0, 1, 1]),
      'late': self._generate_examples([0, 1, -1]),
      'test': self._generate_examples([-1, -1, -1]),
    }

  def _generate_examples(self, labels=()):
    for i, label in enumerate(labels):
      yield i, {'image': io.BytesIO(b'no image'), 'label': label}


@pytest.fixture(scope='module')
def unlabelled(tmp_path_factory):
  path = tmp_path_factory.mktemp('unlabelled')
  builder = tfds.builder('unlabelled', data_dir=path)
  builder.download_and_prepare(file_format='array_record')
  return path


def test_split_without_labels_is_refused_at_once(unlabelled):
  message = (
    'unlabelled split test: example 0 has the label -1, and labels are '
    'integers from 0 to 1; a split without labels has -1'
  )
  with pytest.raises(datasets.LabelError, match=message):
    datasets.load('unlabelled', 'test', unlabelled)
  assert len(datasets.load('unlabelled', 'train', unlabelled)) == 3


def test_selected_classes_have_labels(unlabelled):
  dataset = datasets.load('unlabelled', 'train+late', unlabelled)
  with pytest.raises(datasets.LabelError, match='example . has the label -1'):
    datasets.select_classes(dataset, '0-0')
  dataset = datasets.load('unlabelled', 'train', unlabelled)
  assert len(datasets.select_classes(dataset, '1-1')) == 2


class Floats(tfds.core.GeneratorBasedBuilder):
  """Images whose float32 bits TFDS packs into the channels of a PNG."""

  VERSION = tfds.core.Version('1.0.0')
  dtype = np.uint8  # to prepare it, which takes tensorflow otherwise

  def _info(self):
    image = tfds.features.Image(shape=(4, 4, 1), dtype=self.dtype)
    features = {
      'image': image,
      'label': tfds.features.ClassLabel(num_classes=2),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    yield 0, {'image': io.BytesIO(b'no image'), 'label': 0}


def test_images_in_floating_point_are_refused(tmp_path, monkeypatch):
  builder = tfds.builder('floats', data_dir=tmp_path)
  builder.download_and_prepare(file_format='array_record')
  assert len(datasets.load('floats', 'train', tmp_path)) == 1
  monkeypatch.setattr(Floats, 'dtype', np.float32)
  with pytest.raises(ValueError, match="'floats' has images of float32, of"):
    datasets.load('floats', 'train', tmp_path)


PATTERNS = ['a[b]', 'lr=[0.1]', 'path[0:10]', 'a*b', 'a?b', 'a\\b', 'a\nb']


@pytest.mark.parametrize('name', [*PATTERNS, 'a\udcffb'])
def test_characters_that_tfds_reads_as_patterns_are_refused(name, tmp_path):
  data_dir = tmp_path / name / 'data'
  for use in builders.find, prepare.prepare:
    with pytest.raises(
      ValueError, match='(?s)^data_dir=.* has .*; use letters'
    ):
      use('digits', data_dir)
  with pytest.raises(ValueError, match='(?s)^data_dir=.* has .*; use letters'):
    datasets.load('digits', 'train', data_dir)
  with pytest.raises(
    ValueError, match='(?s)^from_tfrecord=.* has .*; use letters'
  ):
    tfrecord.convert('digits', data_dir, tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'name', ['a{b}', '{a,b}', 'a@3', 'a:b', 'a b', 'a%20b', 'ü', '-x', "a'b", '~']
)
def test_other_characters_in_the_path_work(name, digits_dir, tmp_path):
  data_dir = tmp_path / name
  shutil.copytree(digits_dir / 'digits', data_dir / 'digits')
  dataset = datasets.load('digits', 'test', data_dir)
  assert 0 <= dataset.source[359]['label'] < 10


def test_default_folder(digits_dir, tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(digits_dir))
  assert len(datasets.load('digits', 'test')) == 360
  monkeypatch.setenv('HOME', str(digits_dir.parent))
  monkeypatch.setenv('TFDS_DATA_DIR', f'~/{digits_dir.name}')
  assert len(datasets.load('digits', 'test')) == 360
  home = tmp_path / 'home'
  shutil.copytree(digits_dir / 'digits', home / 'tensorflow_datasets/digits')
  monkeypatch.setenv('HOME', str(home))
  for value in '', ' ', None:
    if value is None:
      monkeypatch.delenv('TFDS_DATA_DIR')
    else:
      monkeypatch.setenv('TFDS_DATA_DIR', value)
    assert len(datasets.load('digits', 'test')) == 360
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'a[b]'))
  with pytest.raises(ValueError, match=r'^\$TFDS_DATA_DIR=.* has .\[.'):
    datasets.load('digits', 'test')


def test_missing_home_is_named(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.delenv('HOME')
  monkeypatch.delenv('TFDS_DATA_DIR', raising=False)
  monkeypatch.setattr('os.getuid', lambda: 2**31 - 7)  # of no account
  for options, name in (
    ({}, r'\$TFDS_DATA_DIR'),
    ({'data_dir': '~/data'}, 'data_dir'),
  ):
    for use in builders.find, prepare.prepare:
      with pytest.raises(ValueError, match=f'^{name}=~.*; set HOME, or give a'):
        use('digits', **options)
  with pytest.raises(ValueError, match='imagenet_dir=~.*; set HOME'):
    imagenet.check('~/tars', [])
  assert not list(tmp_path.iterdir())
