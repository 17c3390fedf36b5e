"""Progress of a run: a bar or plain lines."""

import sys
import time
from typing import Self, TextIO

import jax
import tqdm

# Metrics to show; `metrics.jsonl` has the rest.
_SHOWN = (
  'loss',
  'top_1',
  'learning_rate',
  'images_per_second',
  'data_share',
  'eval_top_1',
  'ema_eval_top_1',
  'eval_loss',
  'ema_eval_loss',
)


class Progress:
  """A progress bar on a terminal, plain lines elsewhere."""

  def __init__(self, start: int, total: int, batch_size: int):
    self._start, self._total = start, total
    self._began: float | None = None
    self._bar = None
    if sys.stderr.isatty() and jax.process_index() == 0:
      self._bar = tqdm.tqdm(
        total=total,
        initial=start,
        unit=' images',
        unit_scale=batch_size,
        dynamic_ncols=True,
      )

  def advance(self) -> None:
    """Counts a step; the ETA excludes the first, which loads the program."""
    if self._began is None:
      self._start += 1
      self._began = time.monotonic()
    if self._bar is not None:
      self._bar.update()

  def show(self, step: int, epoch: float, values: dict[str, float]) -> None:
    """Prints the latest values."""
    text = ', '.join(
      f'{name} {_format(values[name])}' for name in _SHOWN if name in values
    )
    if self._bar is not None:
      self._bar.write(f'step {step}, epoch {epoch:.1f}: {text}')
    else:
      say(
        f'step {step}/{self._total}, epoch {epoch:.1f}: {text}{self._eta(step)}'
      )

  def _eta(self, step: int) -> str:
    if self._began is None or step <= self._start:  # no step was timed
      return ''
    seconds = time.monotonic() - self._began
    eta = seconds / (step - self._start) * (self._total - step)
    return f', ETA {eta:.0f} s'

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    if self._bar is not None:
      self._bar.close()


def say(text: str, file: TextIO | None = None) -> None:
  """Prints a line from process 0, to standard output by default."""
  if jax.process_index() == 0:
    print(text, file=file, flush=True)


def _format(value: float) -> str:
  return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'
