"""Data sets are found by name or folder, without the code that wrote them."""

import contextlib
import io
import json
import pickle
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import registered

from nfnets_jax.data import datasets, prepare


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  """Data sets of a builder that is not registered, so TFDS cannot find it."""
  with registered.skip_registration():

    class Mine(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version('1.0.0')
      BUILDER_CONFIGS = tuple(tfds.core.BuilderConfig(name=x) for x in 'ab')

      def _info(self):
        features = {
          'image': tfds.features.Image(encoding_format='png'),
          'label': tfds.features.ClassLabel(names=['cat', 'dog']),
          'weight': np.float32,
        }
        return tfds.core.DatasetInfo(
          builder=self, features=tfds.features.FeaturesDict(features)
        )

      def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

      def _generate_examples(self):
        for i in range(3):
          Image.new('RGB', (4, 3), (i, 0, 0)).save(file := io.BytesIO(), 'PNG')
          image = io.BytesIO(file.getvalue())
          yield i, {'image': image, 'label': i % 2, 'weight': i / 2}

    class Single(Mine):
      BUILDER_CONFIGS = Mine.BUILDER_CONFIGS[:1]

  path = tmp_path_factory.mktemp('sets')
  for cls, config in (Mine, 'a'), (Mine, 'b'), (Single, 'a'):
    builder = cls(data_dir=path, config=config)
    builder.download_and_prepare(file_format='array_record')
  shutil.rmtree(path / 'single' / '.config')  # not all copies have it
  with pytest.raises(tfds.core.DatasetNotFoundError):
    tfds.builder_cls('mine')
  return path


@pytest.mark.parametrize(
  'name',
  [
    'mine',
    'mine/a',
    'mine/b:1.0.0',
    'mine/a/1.0.0',
    'single',
    '{}/mine/a/1.0.0',
    '{}/mine/b',
    '{}/single/a',
    './mine/a',
    '~/mine/a/1.0.0',
  ],
)
def test_data_set_without_its_code(name, data_dir, monkeypatch):
  monkeypatch.setenv('HOME', str(data_dir))
  name = name.format(data_dir)
  with contextlib.chdir(data_dir):
    is_path = name[0] in '/.~'
    dataset = datasets.load(name, 'train', None if is_path else data_dir)
    assert prepare.prepare(name, None if is_path else data_dir) is not None
  assert dataset.class_names == ('cat', 'dog')
  examples = [pickle.loads(pickle.dumps(dataset)).source[i] for i in range(3)]
  assert sorted(x['weight'] for x in examples) == [0, 0.5, 1]
  assert all(x['label'] == 2 * x['weight'] % 2 for x in examples)


def test_config_or_version_is_asked_for(data_dir):
  choice = 'give mine/a/1.0.0 or mine/b/1.0.0'
  for name in 'mine/c', 'mine/a:2.0.0', str(data_dir / 'mine'):
    with pytest.raises(ValueError, match='there is no data set') as error:
      datasets.load(name, 'train', data_dir)
    assert name in str(error.value)
    assert str(error.value).endswith(choice)


def test_folder_without_a_data_set_is_named(data_dir):
  for name in f'{data_dir}/other', str(data_dir):
    with pytest.raises(ValueError, match='is not a data set that TFDS has'):
      datasets.load(name, 'train')


def test_corrupt_data_set_without_its_code(data_dir, tmp_path):
  folder = data_dir / 'single' / 'a' / '1.0.0'
  copy = tmp_path / 'single' / 'a' / '1.0.0'
  copy.mkdir(parents=True)
  for path in folder.iterdir():
    (copy / path.name).write_bytes(path.read_bytes())
  (copy / 'single-train.array_record-00000-of-00001').write_bytes(b'')
  remedy = f'\nIf {copy} is corrupt, copy or write it again.'
  for name in 'single/a', str(copy):
    with pytest.raises(ValueError, match='1 of 1 files are missing') as error:
      datasets.load(name, 'train', tmp_path)
    assert str(error.value).endswith(remedy)
  info = copy / 'dataset_info.json'
  info.write_text('{')
  with pytest.raises(ValueError, match=f'{info} is corrupt') as error:
    datasets.load(str(copy), 'train')
  assert str(error.value).endswith(remedy)


def test_other_formats(data_dir, tmp_path):
  shutil.copytree(data_dir / 'single', tmp_path / 'single')
  path = tmp_path / 'single' / 'a' / '1.0.0' / 'dataset_info.json'
  info = json.loads(path.read_text())
  formats = {
    'fileFormat': 'tfrecord',
    'alternativeFileFormats': ['array_record'],
  }
  path.write_text(json.dumps(info | formats))
  assert len(datasets.load('single/a', 'train', tmp_path)) == 3
  path.write_text(json.dumps(info | {'fileFormat': 'parquet'}))
  with pytest.raises(ValueError, match="parquet; write it with file_format='a"):
    datasets.load('single/a', 'train', tmp_path)
