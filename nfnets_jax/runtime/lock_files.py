"""The file of a lock, on a disk or in a bucket, and how to take it.

A file is free if it is missing, its holder is known to have ended, or it did
not change for `lapse` seconds.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Protocol

import fsspec

from nfnets_jax.runtime import holder as holders
from nfnets_jax.runtime import progress

# errno of flock on file systems without support.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class InUseError(RuntimeError):
  """Another process holds the lock; the message names it."""


class File(Protocol):
  """A lock file."""

  path: str

  def read(self) -> holders.Holder:
    """Returns the recorded holder, or {}."""

  def write(self, data: bytes) -> None:
    """Replaces the content."""

  def remove(self) -> None:
    """Removes the file, and its folder if it is empty."""


class _DiskFile:
  """A lock file on a disk, opened and perhaps locked."""

  def __init__(self, path: pathlib.Path, descriptor: int):
    self.path = str(path)
    self._descriptor = descriptor

  def read(self) -> holders.Holder:
    # By its name: another process may have replaced the file.
    try:
      return holders.decode(pathlib.Path(self.path).read_bytes())
    except FileNotFoundError:
      return {}

  def write(self, data: bytes) -> None:
    os.pwrite(self._descriptor, data, 0)
    os.ftruncate(self._descriptor, len(data))  # the old content may be longer
    os.fsync(self._descriptor)

  def remove(self) -> None:
    path = pathlib.Path(self.path)
    path.unlink(missing_ok=True)  # while still locked
    with contextlib.suppress(OSError):  # not empty
      path.parent.rmdir()


@contextlib.contextmanager
def on_disk(
  folder: os.PathLike[str],
  name: str,
  me: holders.Holder,
  beat: float,
  lapse: float,
) -> Iterator[_DiskFile]:
  """Takes the lock file in a folder on a disk, which is created."""
  path = pathlib.Path(folder, name)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
      raise PermissionError('it is not writable')
  except OSError as error:
    raise OSError(f'cannot write to {path.parent}: {error}') from error
  descriptor, contested = _open(path, beat, lapse)
  try:
    file = _DiskFile(path, descriptor)
    file.write(holders.encode(me, time.time()))
    if contested:
      _settle(file, me, beat)
    yield file
  finally:
    os.close(descriptor)


def _open(path: pathlib.Path, beat: float, lapse: float) -> tuple[int, bool]:
  """Opens the free file; also returns whether another host may take it too."""
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
      file = _DiskFile(path, descriptor)
      locked = _flock(file, descriptor)
      previous = file.read()
      ended = locked and previous.get('kernel') == holders.kernel()
      if previous and not ended:
        _wait_for(file, previous, beat, lapse)
      # The previous holder may have removed the file since it was opened.
      with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), path.stat()):
          return descriptor, not locked or bool(previous and not ended)
    except BaseException:
      os.close(descriptor)
      raise
    os.close(descriptor)


def _flock(file: _DiskFile, descriptor: int) -> bool:
  """Locks an open file; returns whether the file system supports it."""
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise InUseError(_refusal(file.path, file.read())) from None
  except OSError as error:
    if error.errno not in _UNSUPPORTED:
      raise
    return False
  return True


class _BucketFile:
  """A lock file in a bucket."""

  def __init__(self, folder: str, name: str):
    self.path = f'{folder.rstrip("/")}/{name}'
    # Without a cache: other processes write here.
    self._store, self._key = fsspec.core.url_to_fs(
      self.path, use_listings_cache=False
    )

  def create(self, data: bytes) -> bool:
    """Creates the file; returns False if it exists."""
    try:
      self._store.pipe_file(self._key, data, mode='create')
    except FileExistsError:
      return False
    return True

  def read(self) -> holders.Holder:
    try:
      data = self._store.cat_file(self._key)
    except FileNotFoundError:
      return {}
    if not (holder := holders.decode(data)):  # no write is partial here
      raise ValueError(f'{self.path} is not a lock; move it away')
    return holder

  def write(self, data: bytes) -> None:
    self._store.pipe_file(self._key, data)

  def remove(self) -> None:
    with contextlib.suppress(FileNotFoundError):
      self._store.rm_file(self._key)


@contextlib.contextmanager
def in_bucket(
  folder: os.PathLike[str],
  name: str,
  me: holders.Holder,
  beat: float,
  lapse: float,
) -> Iterator[_BucketFile]:
  """Takes the lock file in a bucket."""
  file = _BucketFile(os.fspath(folder), name)
  took_over = False
  while True:
    # Not by `create` alone, whose condition some stores ignore.
    if previous := file.read():
      _wait_for(file, previous, beat, lapse)
      # Another process may do the same; the last to write keeps it.
      if file.read() == previous:
        file.remove()
      took_over = True
    elif file.create(holders.encode(me, time.time())):
      break
  _settle(file, me, beat if took_over else 0.0)
  yield file


def _wait_for(
  file: File, holder: holders.Holder, beat: float, lapse: float
) -> None:
  """Returns once the holder is dead; raises if it is alive."""
  if holders.is_dead(holder):
    return
  progress.say(
    f'{file.path} names {holders.describe(holder)}; waiting {lapse:.0f} s for '
    'a heartbeat'
  )
  deadline = time.monotonic() + lapse
  while time.monotonic() < deadline:
    time.sleep(min(beat, lapse) / 2)
    current = file.read()
    if not current:
      return
    if current != holder:
      raise InUseError(_refusal(file.path, current))
  progress.say(
    f'no heartbeat of {holders.describe(holder)}; this process takes over'
  )


def _settle(file: File, me: holders.Holder, seconds: float) -> None:
  """Raises unless this process wrote last, of several that took the lock."""
  time.sleep(seconds)
  current = file.read()
  if not holders.same(current, me):
    raise InUseError(_refusal(file.path, current))


def _refusal(path: str, holder: holders.Holder) -> str:
  return (
    f'{path.rpartition("/")[0]} is in use by {holders.describe(holder)}; wait '
    'until it has ended, or use another folder'
  )
