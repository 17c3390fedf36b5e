"""Data sets that are copied from buckets."""

import os

import pytest

from nfnets_jax.data import builders, fetch

pytestmark = pytest.mark.thorough

FILES = {
  'toy/1.0.0/dataset_info.json': b'{}',
  'toy/1.0.0/toy-train.array_record-00000-of-00002': os.urandom(3000),
  'toy/1.0.0/toy-train.array_record-00001-of-00002': os.urandom(2000),
}


def _contents(folder):
  files = [x for x in folder.rglob('*') if x.is_file()]
  return {str(x.relative_to(folder)): x.read_bytes() for x in files}


def test_fetch(bucket, tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match='no prepared data set'):
    fetch.fetch(bucket, 'toy', tmp_path)
  for name, data in FILES.items():
    (bucket / name).write_bytes(data)

  # The second file arrives corrupt; the first stays, and there is no data set.
  md5 = fetch._md5
  with monkeypatch.context() as patch:
    patch.setattr(fetch, '_THREADS', 1)
    patch.setattr(
      fetch,
      '_md5',
      lambda info: '0' * 32 if info['size'] == 2000 else md5(info),
    )
    with pytest.raises(OSError, match='the copy of .* same command again'):
      fetch.fetch(bucket, 'toy', tmp_path)
  first = list(FILES)[1]
  assert _contents(tmp_path) == {first: FILES[first]}
  inode = (tmp_path / first).stat().st_ino

  assert fetch.fetch(bucket, 'toy', tmp_path) == tmp_path / 'toy'
  assert _contents(tmp_path) == FILES
  assert (tmp_path / first).stat().st_ino == inode  # not copied again

  (tmp_path / first).write_bytes(b'mine')
  with pytest.raises(FileExistsError, match='has 4 bytes, and 3,000 in the'):
    fetch.fetch(bucket, 'toy', tmp_path)
  assert (tmp_path / first).read_bytes() == b'mine'


def test_data_sets_are_not_read_in_buckets():
  with pytest.raises(ValueError, match='data_dir=gs://b/a: .*data.fetch gs:'):
    builders.resolve('gs://b/a')
