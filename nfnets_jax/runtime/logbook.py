"""Run logs: `metrics.jsonl`, TensorBoard events and curves."""

import json
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any, Self

import matplotlib.figure
import tensorboardX


class Writer:
  """Writes metrics to `metrics.jsonl` and to TensorBoard event files."""

  def __init__(self, workdir: pathlib.Path, step: int):
    """Opens the files of a run and removes entries after `step`."""
    self._path = workdir / 'metrics.jsonl'
    kept = [line for line in read(workdir) if line['step'] <= step]
    partial = self._path.with_suffix('.tmp')
    partial.write_text(''.join(json.dumps(line) + '\n' for line in kept))
    partial.replace(self._path)
    self._events = tensorboardX.SummaryWriter(
      str(workdir / 'tensorboard'), purge_step=step + 1, flush_secs=10
    )

  def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
    """Writes the values of one step; `split` is 'train' or 'test'."""
    with self._path.open('a') as file:
      file.write(json.dumps({'step': step, 'split': split, **values}) + '\n')
    for name, value in values.items():
      self._events.add_scalar(f'{split}/{name}', value, step)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self._events.close()


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Reads `metrics.jsonl`: one dict per line, empty if there is no file.

  Skips an incomplete last line, left by a killed process; raises a ValueError
  if any other line is not JSON.
  """
  path = workdir / 'metrics.jsonl'
  if not path.exists():
    return []
  lines = path.read_text().splitlines(keepends=True)
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


def totals(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns a run's median `images_per_second`, `skipped` and `nonfinite`."""
  lines = read(workdir)
  speeds = [x['images_per_second'] for x in lines if 'images_per_second' in x]
  return {
    'images_per_second': statistics.median(speeds) if speeds else None,
    'skipped': sum(x.get('skipped', 0) for x in lines),
    'nonfinite': sum(x.get('nonfinite', 0) for x in lines),
  }


def plot_curves(workdir: pathlib.Path) -> None:
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
  figure.suptitle(workdir.resolve().name)
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
  figure.savefig(workdir / 'curves.png', dpi=100)
