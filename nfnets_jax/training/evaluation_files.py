"""Writes and prints evaluations.

In the workdir, with a name such as 'evaluation-digits-test-16px' for NAME:

* `NAME.json`: everything but the images; a second one is `NAME-2.json`;
* `evaluations.csv`: a line for the weights, and one for their average;
* `NAME-classes.csv` and `NAME-confusion.png`, if asked for: of the average,
  which is what `predict` and `convert` take.
"""

import csv
import datetime
import io
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np

from nfnets_jax import paths
from nfnets_jax.runtime import files
from nfnets_jax.training import evaluate, metrics

_TABLE = 'evaluations.csv'
_COLUMNS = (
  'date',
  'model',
  'weights',
  'step',
  'average',
  'data',
  'data_dir',
  'split',
  'label_sets',
  'classes',
  'image_size',
  'crop',
  'top_1',
  'top_5',
  'loss',
  'ece',
  'images',
  'skipped',
  'dtype',
  'devices',
  'device',
)
# More classes are not named in the picture.
_NAMED_CLASSES = 40


def check(workdir: paths.Path) -> None:
  """Raises a ValueError if `evaluations.csv` has other columns than ours."""
  path = workdir / _TABLE
  if path.exists():
    text = files.read(path).decode()
    header = tuple(next(csv.reader(io.StringIO(text)), ()))
    if header != _COLUMNS:
      different = sorted(set(header) ^ set(_COLUMNS)) or ['their order']
      raise ValueError(
        f'{path} has other columns ({", ".join(different)} differ); move it '
        'away'
      )


def metrics_of(evaluation: evaluate.Evaluation, prefix: str) -> dict[str, Any]:
  """Returns `top_1`, `top_5`, `loss` and `ece` of one set of weights.

  `prefix` is 'eval', or 'ema_eval' for the average.
  """
  names = ('top_1', 'top_5', 'loss')
  values = {x: evaluation.results[f'{prefix}_{x}'] for x in names}
  return {**values, 'ece': evaluation.calibration_error(prefix)}


def write(
  workdir: paths.Path,
  evaluation: evaluate.Evaluation,
  per_class: bool = False,
) -> list[paths.Path]:
  """Writes an evaluation, without overwriting any, and returns its files.

  Args:
    workdir: the folder, made if missing.
    evaluation: of all processes.
    per_class: whether to write accuracies of classes and confusions.
  """
  check(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  date = datetime.datetime.now().astimezone().isoformat(timespec='seconds')
  about = {'date': date, **evaluation.about}
  values = {x: metrics_of(evaluation, x) for x in evaluation.images}
  record = {
    **about,
    **{
      f'{prefix}_{name}': value
      for prefix, each in values.items()
      for name, value in each.items()
    },
    'ece_bins': metrics.BINS,
    'published': [x._asdict() for x in evaluation.published],
  }
  path = _write_new(workdir, _stem(about), record)
  rows = [
    {**about, 'average': prefix == 'ema_eval', **each}
    for prefix, each in values.items()
  ]
  written = [path, _append(workdir / _TABLE, rows)]
  if per_class:
    stem = path.with_suffix('')
    written += [
      _write_classes(stem.with_name(f'{stem.name}-classes.csv'), evaluation),
      _plot(stem.with_name(f'{stem.name}-confusion.png'), evaluation),
    ]
  return written


def _stem(about: Mapping[str, Any]) -> str:
  parts = [_data(about), about['split']]
  if about['label_sets'] is not None:
    parts.append(pathlib.Path(about['label_sets']).stem)
  parts.append(f'{about["image_size"]}px')
  return 'evaluation-' + re.sub(r'[^\w.%+-]+', '_', '-'.join(parts))


def _data(about: Mapping[str, Any]) -> str:
  """Returns the name of the data; of a folder its own."""
  if about['data'] == 'folder':
    return paths.absolute(about['data_dir']).name
  return about['data']


def _write_new(
  workdir: paths.Path, name: str, record: Mapping[str, Any]
) -> paths.Path:
  """Writes JSON to the first name that is free."""
  number = 1
  while True:
    path = workdir / f'{name}{f"-{number}" if number > 1 else ""}.json'
    try:
      files.create(path, (json.dumps(record, indent=2) + '\n').encode())
      return path
    except FileExistsError:
      number += 1


def _append(path: paths.Path, rows: Sequence[Mapping[str, Any]]) -> Any:
  file = io.StringIO()
  writer = csv.DictWriter(
    file, _COLUMNS, extrasaction='ignore', lineterminator='\n'
  )
  if not path.exists():
    writer.writeheader()
  writer.writerows(rows)
  files.append(path, file.getvalue().encode())
  return path


def _best(evaluation: evaluate.Evaluation) -> dict[str, np.ndarray]:
  """Returns the images of the average, or of the only weights there are."""
  return evaluation.images.get('ema_eval', evaluation.images['eval'])


def _confusion(evaluation: evaluate.Evaluation) -> np.ndarray:
  images = _best(evaluation)
  return metrics.confusion(
    images['label'], images['predicted'][:, 0], len(evaluation.class_names)
  )


def _write_classes(
  path: paths.Path, evaluation: evaluate.Evaluation
) -> paths.Path:
  """Writes each class's accuracy, and what it is most often mistaken for."""
  names, images = evaluation.class_names, _best(evaluation)
  counts = metrics.hits_per_class(
    images['label'], images['predicted'], len(names)
  )
  mistakes = _confusion(evaluation)
  np.fill_diagonal(mistakes, 0)
  file = io.StringIO()
  writer = csv.writer(file, lineterminator='\n')
  writer.writerow(
    ('class', 'name', 'images', 'top_1', 'top_5', 'mistaken_for', 'times')
  )
  for k, (total, top_1, top_5) in enumerate(counts.T.tolist()):
    other = int(mistakes[k].argmax())
    times = int(mistakes[k, other])
    writer.writerow(
      (
        k,
        names[k],
        total,
        top_1 / total if total else '',
        top_5 / total if total else '',
        names[other] if times else '',
        times,
      )
    )
  files.create(path, file.getvalue().encode())
  return path


def _plot(path: paths.Path, evaluation: evaluate.Evaluation) -> paths.Path:
  """Plots the fraction of each class's images by prediction."""
  names, counts = evaluation.class_names, _confusion(evaluation)
  fractions = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
  named = len(names) <= _NAMED_CLASSES
  side = 3 + 0.28 * len(names) if named else 11.0
  figure = matplotlib.figure.Figure(figsize=(side, side), layout='constrained')
  axes = figure.subplots()
  image = axes.imshow(fractions, cmap='Blues', vmin=0, vmax=1)
  figure.colorbar(image, ax=axes, shrink=0.6)
  about = evaluation.about
  axes.set_title(
    f'{about["model"]}, {_data(about)} {about["split"]}: '
    f'{about["images"]:,} images'
  )
  axes.set_xlabel('prediction')
  axes.set_ylabel('class')
  if named:
    short = [x if len(x) <= 24 else f'{x[:23]}…' for x in names]
    axes.set_xticks(range(len(names)), short, rotation=90)
    axes.set_yticks(range(len(names)), short)
    for (row, column), count in np.ndenumerate(counts):
      if count:
        dark = fractions[row, column] > 0.5
        axes.text(
          column,
          row,
          f'{count:,}',
          ha='center',
          va='center',
          fontsize=6,
          color='white' if dark else 'black',
        )
  picture = io.BytesIO()
  figure.savefig(picture, dpi=120)
  files.write(path, picture.getvalue())
  return path


def describe(evaluation: evaluate.Evaluation) -> str:
  """Formats an evaluation, with published figures, as a table."""
  about = evaluation.about
  values = [metrics_of(evaluation, x) for x in evaluation.images]
  columns = ['weights', 'EMA'][: len(values)]
  columns += [x.source for x in evaluation.published]

  def row(name: str, cells: Sequence[str]) -> str:
    return f'{name:14}' + ''.join(f'{x:>11}' for x in cells)

  def percent(name: str) -> str:
    cells = [f'{100 * x[name]:.2f} %' for x in values]
    for x in evaluation.published:
      value = getattr(x, name, None)
      cells.append('-' if value is None else f'{value:.2f} %')
    return row(name.replace('_', '-'), cells)

  rows = [row('', columns), percent('top_1')]
  if about['classes'] > 5:  # else top-5 is trivial
    rows.append(percent('top_5'))
  rows += [
    row('loss', [f'{x["loss"]:.4f}' for x in values]),
    row('ECE', [f'{100 * x["ece"]:.2f} %' for x in values]),
    row('images', [f'{about["images"]:,}']),
    row('images/s', [f'{about["images_per_second"]:,.1f}']),
  ]
  rule = '-' * max(map(len, rows))
  step = '' if about['step'] is None else f' after step {about["step"]}'
  notes = [
    f'{about["model"]} of {about["weights"]}{step}; {_data(about)} '
    f'{about["split"]}, {about["image_size"]} px, crop {about["crop"]}, '
    f'{about["dtype"]}'
  ]
  if evaluation.published:
    notes.append('timm, paper: published for the released weights')
  if about['skipped']:
    notes.append(f'skipped: {about["skipped"]:,} images')
  return '\n'.join([rule, *rows, rule, *notes])
