"""A lock on a run's folder, so that two processes never write the same run.

The lock is a file in the folder that names its holder. The kernel locks it too
(`flock`) and frees it when the process ends, however it ends: on the same host
a killed run can be resumed at once. A heartbeat in the file tells whether a
holder on another host is alive: the newcomer waits for the next beat, and takes
over if there is none for `LAPSE` seconds.
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
# Seconds between heartbeats, and without one after which a holder is dead.
BEAT = 5.0
LAPSE = 60.0

# What flock raises where a file system does not support it.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
# The file is overwritten in one piece of this many bytes, so that no reader
# sees half of it.
_SIZE = 512
_FIELDS = {'host', 'pid', 'since', 'kernel'}


class InUseError(RuntimeError):
  """Another process writes to this folder; the message names it."""


@contextlib.contextmanager
def hold(
  folder: pathlib.Path,
  name: str = NAME,
  beat: float = BEAT,
  lapse: float = LAPSE,
) -> Iterator[None]:
  """Holds the lock on a run's folder while it is entered.

  Args:
    folder: of the run; made if it does not exist, and removed again if nothing
      is in it at the end.
    name: of the file, for a folder that several may write different parts of.
    beat: seconds between heartbeats.
    lapse: seconds without a heartbeat after which a holder on another host is
      dead; several times `beat`.

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
      # Of two that found the file free at once, the one that wrote last stays.
      time.sleep(beat)
      if not _is_of(path, about):
        raise InUseError(_refusal(path, _read(path)))
    stop = threading.Event()
    heart = threading.Thread(
      target=_beat, args=(file, about, stop, beat), daemon=True
    )
    heart.start()
    try:
      yield
    finally:
      stop.set()
      heart.join()
      if _is_of(path, about):  # and no process has taken over
        path.unlink(missing_ok=True)  # while it is still locked
      with contextlib.suppress(OSError):  # it is not empty
        folder.rmdir()
  finally:
    os.close(file)


def _acquire(path: pathlib.Path, beat: float, lapse: float) -> tuple[int, bool]:
  """Opens the lock file, held by nobody; says whether the kernel locks it."""
  while True:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
      locked = _flock(path, file)
      _wait_for(path, locked, beat, lapse)
      # Whoever held it may have removed the file since it was opened.
      with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file), path.stat()):
          return file, locked
    except BaseException:
      os.close(file)
      raise
    os.close(file)


def _flock(path: pathlib.Path, file: int) -> bool:
  """Locks an open file; returns whether its file system can."""
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
  """Returns once the holder that a file names is dead; raises if it lives."""
  holder = _read(path)
  if not holder or (locked and holder.get('kernel') == _kernel()):
    return
  progress.say(
    f'{path} names {_describe(holder)}; waiting {lapse:.0f} s for a heartbeat'
  )
  deadline = time.monotonic() + lapse
  while time.monotonic() < deadline:
    time.sleep(min(beat, lapse) / 2)
    now = _read(path)
    if not now:
      return
    if now != holder:
      raise InUseError(_refusal(path, now))
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
  os.ftruncate(file, _SIZE)  # what was there may have been longer
  os.fsync(file)


def _read(path: pathlib.Path) -> dict[str, Any]:
  """Returns what the file says of its holder, {} if it names none."""
  try:
    about = json.loads(path.read_bytes())
  except (FileNotFoundError, ValueError):
    # Empty before the first beat, or what a host that crashed has left.
    return {}
  return about if isinstance(about, dict) and about.keys() >= _FIELDS else {}


def _is_of(path: pathlib.Path, about: dict[str, Any]) -> bool:
  return about.items() <= _read(path).items()


def _kernel() -> str:
  """Returns what tells this host's kernel from all others since its boot."""
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
