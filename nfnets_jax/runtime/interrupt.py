"""Signals that ask a run to stop: it saves its state first.

Schedulers send SIGTERM some time before they kill, people press Ctrl-C. The
first signal is remembered, and the loop stops after a step and a checkpoint.
The second acts as if there were no handler, for who cannot wait.
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

# The exit code of a run that was stopped and can go on: EX_TEMPFAIL of the BSD
# conventions, "try again later".
EXIT_CODE = 75

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StoppedError(Exception):
  """A run was stopped by a signal after a checkpoint; it can go on."""


class Signals:
  """Remembers the first SIGTERM or SIGINT while it is entered.

  Python lets the main thread alone handle signals. In another thread nothing is
  remembered, which a warning says.

  Example:
    >>> with Signals() as signals:
    ...   signal.raise_signal(signal.SIGTERM)
    ...   signals.received
    'SIGTERM'
  """

  def __init__(self) -> None:
    """Has received nothing yet."""
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
  """Ends the process with `EXIT_CODE` if the run inside was interrupted."""
  try:
    yield
  except StoppedError as error:
    progress.say(str(error), file=sys.stderr)
    sys.exit(EXIT_CODE)
