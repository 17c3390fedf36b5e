"""A lock on the run folder, so that only one process writes to a run.

The lock file names its holder. The kernel also locks it (`flock`) and releases
it when the process ends, so a killed run can resume at once on the same host.
Holders on other hosts are detected by a heartbeat in the file: a new process
waits for the next beat and takes over after `LAPSE` seconds without one.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from absl import logging

from nfnets_jax.runtime import progress

NAME = 'lock'
# Seconds between heartbeats, and until a silent holder counts as dead.
BEAT = 5.0
LAPSE = 60.0

# errno of flock on file systems without support.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
# Bytes of the file, written in one call so that no reader sees a partial write.
_SIZE = 512
_FIELDS = {'host', 'pid', 'since', 'kernel'}


class InUseError(RuntimeError):
  """Another process holds the lock; the message names it."""


@contextlib.contextmanager
def hold(
  folder: pathlib.Path,
  name: str = NAME,
  beat: float = BEAT,
  lapse: float = LAPSE,
) -> Iterator[None]:
  """Holds the lock on a run folder while it is entered.

  Args:
    folder: run folder; created if missing, and removed at the end if empty.
    name: file name, for folders where several processes write different parts.
    beat: seconds between heartbeats.
    lapse: seconds without a heartbeat after which a holder on another host
      counts as dead; several times `beat`.

  Raises:
    InUseError: if another process, or another thread of this one, holds it.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
      raise PermissionError('it is not writable')
  except OSError as error:
    raise OSError(f'cannot write to {folder}: {error}') from error
  path = folder / name
  file, locked = _acquire(path, beat, lapse)
  try:
    about = {
      'host': socket.gethostname(),
      'pid': os.getpid(),
      'since': _now(),
      'kernel': _kernel(),
    }
    _write(file, about)
    if not locked:
      # If two processes took it at once, the last writer keeps it.
      time.sleep(beat)
      if not _is_of(path, about):
        raise InUseError(_refusal(path, _read(path)))
    stop = threading.Event()
    heartbeat = threading.Thread(
      target=_beat, args=(file, about, stop, beat), daemon=True
    )
    heartbeat.start()
    try:
      yield
    finally:
      stop.set()
      heartbeat.join()
      if _is_of(path, about):  # else another process took over
        path.unlink(missing_ok=True)  # while still locked
      with contextlib.suppress(OSError):  # not empty
        folder.rmdir()
  finally:
    os.close(file)


def _acquire(path: pathlib.Path, beat: float, lapse: float) -> tuple[int, bool]:
  """Opens the free lock file; also returns whether flock is supported."""
  while True:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
      locked = _flock(path, file)
      _wait_for(path, locked, beat, lapse)
      # The previous holder may have removed the file since it was opened.
      with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file), path.stat()):
          return file, locked
    except BaseException:
      os.close(file)
      raise
    os.close(file)


def _flock(path: pathlib.Path, file: int) -> bool:
  """Locks an open file; returns whether the file system supports it."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise InUseError(_refusal(path, _read(path))) from None
  except OSError as error:
    if error.errno not in _UNSUPPORTED:
      raise
    return False
  return True


def _wait_for(
  path: pathlib.Path, locked: bool, beat: float, lapse: float
) -> None:
  """Returns once the holder is dead; raises if it is alive."""
  holder = _read(path)
  if not holder or (locked and holder.get('kernel') == _kernel()):
    return
  progress.say(
    f'{path} names {_describe(holder)}; waiting {lapse:.0f} s for a heartbeat'
  )
  deadline = time.monotonic() + lapse
  while time.monotonic() < deadline:
    time.sleep(min(beat, lapse) / 2)
    current = _read(path)
    if not current:
      return
    if current != holder:
      raise InUseError(_refusal(path, current))
  progress.say(f'no heartbeat of {_describe(holder)}; this process takes over')


def _beat(
  file: int, about: dict[str, Any], stop: threading.Event, seconds: float
) -> None:
  while not stop.wait(seconds):
    try:
      _write(file, about)
    except OSError as error:
      logging.warning('cannot write the heartbeat of this run: %s', error)


def _write(file: int, about: dict[str, Any]) -> None:
  text = json.dumps({**about, 'beat': time.time()})
  os.pwrite(file, f'{text:{_SIZE - 1}}\n'.encode(), 0)
  os.ftruncate(file, _SIZE)  # the old content may be longer
  os.fsync(file)


def _read(path: pathlib.Path) -> dict[str, Any]:
  """Returns the recorded holder, or {}."""
  try:
    about = json.loads(path.read_bytes())
  except (FileNotFoundError, ValueError):
    # Empty before the first beat, or corrupt after a host crash.
    return {}
  return about if isinstance(about, dict) and about.keys() >= _FIELDS else {}


def _is_of(path: pathlib.Path, about: dict[str, Any]) -> bool:
  return about.items() <= _read(path).items()


def _kernel() -> str:
  """Returns an ID of this host and boot."""
  path = pathlib.Path('/proc/sys/kernel/random/boot_id')
  return path.read_text().strip() if path.exists() else socket.gethostname()


def _now() -> str:
  now = datetime.datetime.now().astimezone()
  return now.isoformat(sep=' ', timespec='seconds')


def _describe(holder: dict[str, Any]) -> str:
  if not holder:
    return 'a process that is starting'
  return f'process {holder["pid"]} on {holder["host"]}, since {holder["since"]}'


def _refusal(path: pathlib.Path, holder: dict[str, Any]) -> str:
  return (
    f'{path.parent} is in use by {_describe(holder)}; wait until it has ended, '
    'or use another folder'
  )
