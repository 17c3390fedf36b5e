"""Graceful stop on SIGTERM and SIGINT.

Schedulers send SIGTERM some time before SIGKILL; users press Ctrl-C. After the
first signal the loop finishes its step, saves a checkpoint and stops. The
second signal has its default effect.
"""

import contextlib
import signal
import sys
import threading
import types
from collections.abc import Iterator
from typing import Self

from absl import logging

from nfnets_jax.runtime import progress

# Exit code of an interrupted, resumable run: EX_TEMPFAIL, "try again later".
EXIT_CODE = 75

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StoppedError(Exception):
  """A signal stopped the run after a checkpoint; it can be resumed."""


class Signals:
  """Records the first SIGTERM or SIGINT while it is entered.

  Python handles signals only in the main thread; other threads log a warning.

  Example:
    >>> with Signals() as signals:
    ...   signal.raise_signal(signal.SIGTERM)
    ...   signals.received
    'SIGTERM'
  """

  def __init__(self) -> None:
    self.received: str | None = None
    self._before: dict[signal.Signals, object] = {}

  def __enter__(self) -> Self:
    if threading.current_thread() is not threading.main_thread():
      logging.warning(
        'this run is not in the main thread: SIGTERM and SIGINT do not make it '
        'save its state first'
      )
      return self
    for number in _SIGNALS:
      self._before[number] = signal.signal(number, self._remember)
    return self

  def __exit__(self, *exception: object) -> None:
    for number in list(self._before):
      signal.signal(number, self._before.pop(number))  # type: ignore[arg-type]

  def _remember(self, number: int, frame: types.FrameType | None) -> None:
    del frame
    self.received = signal.Signals(number).name
    self.__exit__()


@contextlib.contextmanager
def exiting() -> Iterator[None]:
  """Exits with `EXIT_CODE` if the run inside was interrupted."""
  try:
    yield
  except StoppedError as error:
    progress.say(str(error), file=sys.stderr)
    sys.exit(EXIT_CODE)
