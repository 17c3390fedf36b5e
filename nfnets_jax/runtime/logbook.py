"""Run logs: `metrics.jsonl`, TensorBoard events and curves.

A bucket has no append, so there both logs are written to local disk and copied
whole, now and then and before each checkpoint: a resumed run writes the lines
after its checkpoint again. One object per line would be slow to read, and one
that is rewritten with each line exceeds the limit of Google Cloud Storage, one
write a second.
"""

import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any, Self

import matplotlib.figure
from etils import epath
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from nfnets_jax import paths
from nfnets_jax.runtime import files

# Between copies to a bucket.
_SECONDS = 30.0


class Writer:
  """Writes metrics to `metrics.jsonl` and to TensorBoard event files."""

  def __init__(self, workdir: paths.Path, step: int):
    """Opens the files of a run and removes entries after `step`."""
    kept = [line for line in read(workdir) if line['step'] <= step]
    text = ''.join(json.dumps(line) + '\n' for line in kept).encode()
    files.write(workdir / 'metrics.jsonl', text)
    self._stack = contextlib.ExitStack()
    self._workdir = self._folder = workdir
    if paths.in_bucket(workdir):
      name = tempfile.TemporaryDirectory(prefix='nfnets_jax-')
      self._folder = epath.Path(self._stack.enter_context(name))
      files.write(self._folder / 'metrics.jsonl', text)
    (self._folder / 'tensorboard').mkdir(exist_ok=True)
    # Unlike tensorboardX.SummaryWriter, without a thread that lags behind.
    self._events = event_file_writer.EventsWriter(
      os.fspath(self._folder / 'tensorboard' / 'events'),
      filename_suffix=f'.{step}',  # names have seconds only
    )
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write_event(step + 1, session_log=start)  # hides later steps
    self._stack.callback(self.flush)
    self._stack.callback(self._events.close)
    self._copied = time.monotonic()

  def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
    """Writes the values of one step; `split` is 'train' or 'test'."""
    line = json.dumps({'step': step, 'split': split, **values}) + '\n'
    files.append(self._folder / 'metrics.jsonl', line.encode())
    for name, value in values.items():
      scalar = summary.scalar(f'{split}/{name}', value)
      self._write_event(step, summary=scalar)
    self._events.flush()
    if time.monotonic() - self._copied > _SECONDS:
      self.flush()

  def flush(self) -> None:
    """Copies the files to the bucket of the run, if it is in one."""
    if self._folder == self._workdir:
      return
    for name in ('metrics.jsonl', *self._event_files()):
      files.write(self._workdir / name, (self._folder / name).read_bytes())
    self._copied = time.monotonic()

  def _write_event(self, step: int, **fields: Any) -> None:
    event = event_pb2.Event(step=step, wall_time=time.time(), **fields)
    self._events.write_event(event)

  def _event_files(self) -> list[str]:
    folder = self._folder / 'tensorboard'
    return [f'tensorboard/{path.name}' for path in folder.iterdir()]

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self._stack.close()


def read(workdir: paths.Path) -> list[dict[str, Any]]:
  """Reads `metrics.jsonl`: one dict per line, empty if there is no file.

  Skips an incomplete last line, left by a killed process; raises a ValueError
  if any other line is not JSON.
  """
  path = workdir / 'metrics.jsonl'
  if not path.exists():
    return []
  lines = files.read(path).decode().splitlines(keepends=True)
  if lines and not lines[-1].endswith('\n'):
    lines.pop()
  metrics = []
  for number, line in enumerate(lines, start=1):
    try:
      metrics.append(json.loads(line))
    except json.JSONDecodeError as error:
      raise ValueError(
        f'{path}, line {number}, is not JSON: {line!r}'
      ) from error
  return metrics


def totals(workdir: paths.Path) -> dict[str, Any]:
  """Returns a run's median `images_per_second`, `skipped` and `nonfinite`."""
  lines = read(workdir)
  speeds = [x['images_per_second'] for x in lines if 'images_per_second' in x]
  return {
    'images_per_second': statistics.median(speeds) if speeds else None,
    'skipped': sum(x.get('skipped', 0) for x in lines),
    'nonfinite': sum(x.get('nonfinite', 0) for x in lines),
  }


def plot_curves(workdir: paths.Path) -> None:
  """Plots loss, top-1 accuracy in % and learning rate to `curves.png`.

  The title is the run's name, the last component of `workdir`.
  """
  metrics = read(workdir)
  panels = (
    (
      'loss (nats)',
      (
        ('train', 'loss', 'training'),
        ('test', 'eval_loss', 'test'),
        ('test', 'ema_eval_loss', 'test, EMA'),
      ),
    ),
    (
      'top-1 accuracy (%)',
      (
        ('train', 'top_1', 'training'),
        ('test', 'eval_top_1', 'test'),
        ('test', 'ema_eval_top_1', 'test, EMA'),
      ),
    ),
    ('learning rate', (('train', 'learning_rate', None),)),
  )
  figure = matplotlib.figure.Figure(figsize=(12, 3.7), layout='constrained')
  figure.suptitle(paths.absolute(workdir).name)
  for axes, (title, curves) in zip(
    figure.subplots(1, len(panels)), panels, strict=True
  ):
    for split, name, label in curves:
      lines = [x for x in metrics if x['split'] == split and name in x]
      scale = 100 if name.endswith('top_1') else 1
      axes.plot(
        [x['step'] for x in lines],
        [scale * x[name] for x in lines],
        marker='.' if len(lines) == 1 else None,  # one point is no line
        label=label,
      )
    axes.set_title(title)
    axes.set_xlabel('step')
    axes.grid(alpha=0.3)
    if curves[0][2] is not None:
      axes.legend()
  file = io.BytesIO()
  figure.savefig(file, dpi=100)
  files.write(workdir / 'curves.png', file.getvalue())
