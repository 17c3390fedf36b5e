"""Files of a run, on disk or in a bucket.

A bucket has no rename and no append, and an object appears only when all of it
is there. Functions take an `epath.Path` or a `pathlib.Path`.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from nfnets_jax import paths

# Written last into a folder of several objects, by Orbax too.
COMMITTED = 'commit_success.txt'


def write(path: paths.Path, data: bytes) -> None:
  """Writes a file atomically."""
  if paths.in_bucket(path):
    path.write_bytes(data)
  else:
    partial = path.with_suffix('.tmp')
    partial.write_bytes(data)
    partial.replace(path)


def read(path: paths.Path) -> bytes:
  """Reads a file that another process may replace meanwhile."""
  if not paths.in_bucket(path):
    return path.read_bytes()
  # By one request: an open file in S3 is of the version that it was opened at.
  return _file_system(path).cat_file(os.fspath(path))


def create(path: paths.Path, data: bytes) -> None:
  """Writes a new file; raises a FileExistsError if it exists."""
  if not paths.in_bucket(path):
    with open(path, 'xb') as file:  # noqa: PTH123
      file.write(data)
  elif path.exists():
    raise FileExistsError(f'{path} already exists')
  else:  # refused by the bucket if another process was faster
    _file_system(path).pipe_file(os.fspath(path), data, mode='create')


def append(path: paths.Path, data: bytes) -> None:
  """Appends to a file, which may be missing; in a bucket, rewrites it."""
  if paths.in_bucket(path):
    path.write_bytes((read(path) if path.exists() else b'') + data)
  else:
    with path.open('ab') as file:
      file.write(data)


def is_committed(folder: paths.Path) -> bool:
  """Returns whether a checkpoint is complete.

  A folder on disk gets its name when it is; in a bucket, it gets a marker.
  """
  return not paths.in_bucket(folder) or (folder / COMMITTED).exists()


def upload(folder: paths.Path, target: paths.Path) -> None:
  """Copies a local folder to a bucket, and commits it."""
  system = _file_system(target)
  system.put(f'{os.fspath(folder)}/', f'{os.fspath(target)}/', recursive=True)
  (target / COMMITTED).write_bytes(b'')


def remove(folder: paths.Path) -> None:
  """Removes a folder of a bucket, first its marker."""
  (folder / COMMITTED).unlink(missing_ok=True)
  if folder.exists():
    epath.Path(folder).rmtree(missing_ok=True)


def move(folder: paths.Path, target: paths.Path) -> None:
  """Renames a folder; in a bucket, copies its objects and removes it."""
  if not paths.in_bucket(folder):
    folder.rename(target)
    return
  system = _file_system(folder)
  source, copy = (
    system._strip_protocol(os.fspath(x)) for x in (folder, target)
  )
  for name in system.find(source):
    system.cp_file(name, copy + name.removeprefix(source))
  remove(folder)


@contextlib.contextmanager
def downloaded(folder: paths.Path) -> Iterator[epath.Path]:
  """Yields a temporary local copy of a folder of a bucket."""
  with tempfile.TemporaryDirectory(prefix='nfnets_jax-') as name:
    system = _file_system(folder)
    system.get(f'{os.fspath(folder)}/', f'{name}/', recursive=True)
    yield epath.Path(name)


def _file_system(path: paths.Path) -> Any:
  import fsspec

  return fsspec.core.url_to_fs(os.fspath(path))[0]
