"""Preparing can be repeated, interrupted, and fails with a remedy."""

import importlib.util
import shutil
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import download_manager, extractor

from nfnets_jax.data import datasets, digits
from nfnets_jax.data.prepare import __main__ as command
from nfnets_jax.data.prepare import prepare


class NeedsTensorflow(tfds.core.GeneratorBasedBuilder):
  """Yields arrays, which TFDS encodes with tensorflow."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    image = tfds.features.Image(shape=(2, 2, 1))
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict({'image': image})
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    yield 0, {'image': np.zeros((2, 2, 1), np.uint8)}


class NeedsFiles(NeedsTensorflow):
  """Needs files that cannot be downloaded."""

  MANUAL_DOWNLOAD_INSTRUCTIONS = 'Ask the librarian.'

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(dl_manager.manual_dir)}


class NeedsDownloads(NeedsTensorflow):
  """Takes what `fetch` gives."""

  fetch = None

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(type(self).fetch(dl_manager))}


def run_main(name, data_dir):
  command.main([name, f'--data_dir={data_dir}'])


def contents(folder):
  return {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


def test_command_prepares_then_leaves_alone(tmp_path, capsys):
  run_main('digits', tmp_path)
  folder = tmp_path / 'digits' / '1.0.0'
  sizes = '\n  train: 1,437 examples\n  test: 360 examples\n'
  assert capsys.readouterr().out.endswith(
    f'digits: prepared in {folder}{sizes}'
  )
  before = contents(tmp_path)
  run_main('digits', tmp_path)
  expected = f'digits: already prepared in {folder}{sizes}'
  assert capsys.readouterr().out == expected
  assert contents(tmp_path) == before


def test_preparing_twice_gives_the_same_files(digits_dir, tmp_path):
  prepare('digits', tmp_path)
  for path in (tmp_path / 'digits').rglob('*.array_record*'):
    other = digits_dir / path.relative_to(tmp_path)
    assert path.read_bytes() == other.read_bytes()


def test_interrupted_run_can_be_repeated(tmp_path, monkeypatch):
  generate = digits.Digits._generate_examples

  def interrupted(self, test):
    yield from list(generate(self, test))[:100]
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(digits.Digits, '_generate_examples', interrupted)
    prepare('digits', tmp_path)
  with pytest.raises(FileNotFoundError, match='not prepared'):
    datasets.load('digits', 'train', tmp_path)
  # A killed process cannot clean up after itself.
  leftover = tmp_path / 'digits' / 'incomplete.ABC123_1.0.0'
  leftover.mkdir(parents=True)
  (leftover / 'digits-train.array_record-00000-of-00001').touch()
  prepare('digits', tmp_path)
  assert len(datasets.load('digits', 'train', tmp_path)) == 1437


@pytest.mark.skipif(
  importlib.util.find_spec('tensorflow') is not None,
  reason='tensorflow is installed',
)
def test_missing_tensorflow_has_a_remedy(tmp_path):
  with pytest.raises(
    ModuleNotFoundError, match=r'needs_tensorflow.*pip install tensorflow-cpu'
  ):
    prepare('needs_tensorflow', tmp_path)
  with pytest.raises(SystemExit, match=r'error: .* pip install tensorflow-cpu'):
    run_main('needs_tensorflow', tmp_path)


@pytest.mark.skipif(
  importlib.util.find_spec('tensorflow') is not None,
  reason='tensorflow is installed',
)
def test_archive_that_takes_tensorflow_has_a_remedy(tmp_path, monkeypatch):
  path = tmp_path / 'images.zip'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('1.jpg', b'an image')
  monkeypatch.setattr(NeedsDownloads, 'fetch', lambda x: x.extract(path))
  with pytest.raises(SystemExit, match=r'error: .* pip install tensorflow-cpu'):
    run_main('needs_downloads', tmp_path)


@pytest.mark.parametrize(
  'error',
  [
    tfds.download.DownloadError,
    download_manager.NonMatchingChecksumError,
    extractor.ExtractError,
  ],
)
def test_failed_downloads_are_named(error, tmp_path, monkeypatch):
  def fetch(dl_manager):
    raise error('https://example.org/images.zip is not what it was')

  monkeypatch.setattr(NeedsDownloads, 'fetch', fetch)
  with pytest.raises(SystemExit) as info:
    run_main('needs_downloads', tmp_path)
  assert str(info.value) == (
    "error: cannot download data set 'needs_downloads': "
    'https://example.org/images.zip is not what it was'
  )
  assert not list((tmp_path / 'needs_downloads').glob('*'))


def test_corrupt_description_is_named(digits_dir, tmp_path):
  shutil.copytree(digits_dir / 'digits', tmp_path / 'digits')
  path = tmp_path / 'digits' / '1.0.0' / 'dataset_info.json'
  path.write_text('')
  with pytest.raises(SystemExit, match=f'error: {path} is corrupt: '):
    run_main('digits', tmp_path)


def test_command_refuses_unknown_names(tmp_path):
  with pytest.raises(SystemExit, match="error: unknown data set 'digitz'"):
    run_main('digitz', tmp_path)


@pytest.mark.parametrize('name', ['folder', 'fake'])
def test_nothing_to_prepare(name, tmp_path, capsys):
  run_main(name, tmp_path)
  assert capsys.readouterr().out.startswith(f'{name}: needs no preparation')
  assert prepare(name, tmp_path) is None
  assert not contents(tmp_path)


def test_interrupted_command_says_what_follows(tmp_path, monkeypatch, capsys):
  def interrupted(self, test):
    raise KeyboardInterrupt

  monkeypatch.setattr(digits.Digits, '_generate_examples', interrupted)
  with pytest.raises(SystemExit) as error:
    run_main('digits', tmp_path)
  assert error.value.code == 130
  assert 'the same command starts over' in capsys.readouterr().err
  assert not list(tmp_path.rglob('incomplete.*'))


def test_command_tells_of_leftovers(tmp_path, capsys):
  leftover = tmp_path / 'digits' / 'incomplete.ABC123_1.0.0'
  leftover.mkdir(parents=True)
  for _ in range(2):
    run_main('digits', tmp_path)
    assert f'delete it: rm -r {leftover}\n' in capsys.readouterr().out
  assert leftover.is_dir()


def test_command_leaves_other_folders_alone(tmp_path):
  path = tmp_path / 'digits' / '1.0.0' / 'mine.txt'
  path.parent.mkdir(parents=True)
  path.write_text('mine')
  with pytest.raises(SystemExit, match='exists already and is not a prepared'):
    run_main('digits', tmp_path)
  assert path.read_text() == 'mine'


def test_command_passes_on_what_a_data_set_needs(tmp_path):
  with pytest.raises(
    SystemExit, match=r'(?s)error: Manual directory .*librarian'
  ):
    run_main('needs_files', tmp_path)


def test_tfrecord_copy_is_not_taken_for_prepared(digits_dir, tmp_path):
  shutil.copytree(digits_dir / 'digits', tmp_path / 'digits')
  path = tmp_path / 'digits' / '1.0.0' / 'dataset_info.json'
  path.write_text(path.read_text().replace('"array_record"', '"tfrecord"'))
  with pytest.raises(SystemExit, match='no random access; .*--from_tfrecord='):
    run_main('digits', tmp_path)
