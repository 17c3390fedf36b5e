"""A lock on the run folder, so that only one process writes to a run.

The lock is a file that names its holder, who rewrites it at every heartbeat. A
second process is refused while the first lives. It takes the lock over
  * at once, if the holder ran on this host and has ended;
  * else after `LAPSE` seconds without a heartbeat. A holder that was silent
    for that long, but lives, finds out in `Lock.check`.

On a disk, the kernel also locks the file (`flock`). In a bucket, the file is
created only if it does not exist. That is atomic in Google Cloud Storage and
S3; where a store ignores the condition, of two processes that start in the same
moment the first finds out at its next heartbeat.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator

from absl import logging

from nfnets_jax import paths
from nfnets_jax.runtime import holder as holders
from nfnets_jax.runtime import lock_files
from nfnets_jax.runtime.lock_files import InUseError as InUseError

NAME = 'lock'
# Seconds between heartbeats, and until a silent holder counts as dead.
BEAT = 10.0
LAPSE = 60.0


class LostError(RuntimeError):
  """Another process has taken the lock over; the message names it."""


class Lock:
  """A lock that this process holds."""

  def __init__(self, file: lock_files.File, me: holders.Holder):
    self._file, self._me = file, me

  def check(self) -> None:
    """Raises a LostError if another process has taken the lock over.

    Call it before each write that the new holder must not find.
    """
    current = self._file.read()
    if not holders.same(current, self._me):
      new = holders.describe(current) if current else 'nobody'
      raise LostError(
        f'this process has lost the lock {self._file.path}, which is now held '
        f'by {new}: it made no heartbeat for some time, or the file was '
        'removed. It ends and writes nothing more; do not start it again while '
        'another process trains in this folder'
      )

  def keep(self, stop: threading.Event, seconds: float) -> None:
    """Makes heartbeats until stopped, or until the lock is lost."""
    while not stop.wait(seconds):
      try:
        if not holders.same(self._file.read(), self._me):
          return  # `check` raises
        self._file.write(holders.encode(self._me, time.time()))
      except Exception as error:  # each store has its own types
        logging.warning('cannot write the heartbeat of this run: %s', error)


@contextlib.contextmanager
def hold(
  folder: os.PathLike[str],
  name: str = NAME,
  beat: float = BEAT,
  lapse: float = LAPSE,
) -> Iterator[Lock]:
  """Holds the lock on a run folder while it is entered.

  Args:
    folder: run folder, on a disk or in a bucket; on a disk, it is created if
      missing, and removed at the end if empty.
    name: file name, for folders where several processes write different parts.
    beat: seconds between heartbeats.
    lapse: seconds without a heartbeat after which a holder on another host
      counts as dead; several times `beat`.

  Yields:
    The lock, to be checked before each write.

  Raises:
    InUseError: if another process, or another thread of this one, holds it.
    OSError: if the folder cannot be written to.
  """
  me = holders.this_process()
  in_bucket = paths.in_bucket(folder)
  open_file = lock_files.in_bucket if in_bucket else lock_files.on_disk
  with open_file(folder, name, me, beat, lapse) as file:
    lock = Lock(file, me)
    stop = threading.Event()
    heartbeat = threading.Thread(
      target=lock.keep, args=(stop, beat), daemon=True
    )
    heartbeat.start()
    try:
      yield lock
    finally:
      stop.set()
      heartbeat.join()
      _release(file, me)


def _release(file: lock_files.File, me: holders.Holder) -> None:
  try:
    if holders.same(file.read(), me):  # else another process took over
      file.remove()
  except Exception as error:  # must not hide an error of the run
    logging.warning('cannot remove %s, which lapses: %s', file.path, error)
