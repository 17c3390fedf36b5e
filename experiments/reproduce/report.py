"""Draws every claim that has results, beside the paper's numbers.

  python -m experiments.reproduce.report --output=runs/reproduce

writes `report.html`, which needs no other file, and a PNG for each figure.
"""

import argparse
import base64
import collections
import html
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure

from experiments.reproduce import latency, paper, results, rows
from nfnets_jax import paths
from nfnets_jax.models import variants

Table = Sequence[Sequence[str]]

_STYLE = """\
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { border: 1px solid #ccc; padding: 0.2em 0.6em; text-align: left; }
img { max-width: 100%; }
code { background: #f3f3f3; padding: 0.1em 0.3em; }
"""


class Point:
  """The runs that differ by the seed alone.

  Attributes:
    labels: what they share.
    top_1: test accuracy of those that finished, in %.
    diverged: how many did not.
    messages: how.
  """

  def __init__(self, labels: Mapping[str, Any]):
    """Has no runs yet.

    Args:
      labels: without the seed.
    """
    self.labels = dict(labels)
    self.top_1: list[float] = []
    self.diverged = 0
    self.messages: list[str] = []

  def add(self, result: Mapping[str, Any]) -> None:
    """Adds a run."""
    if result['status'] == 'finished':
      self.top_1.append(100 * result['top_1'])
    else:
      self.diverged += 1
      self.messages.append(result['message'])

  @property
  def mean(self) -> float | None:
    """Mean accuracy in %, None if a run diverged."""
    if self.diverged or not self.top_1:
      return None
    return statistics.fmean(self.top_1)

  def __str__(self) -> str:
    """Mean, least and largest, and how many runs."""
    text = ''
    if self.top_1:
      low, high = min(self.top_1), max(self.top_1)
      text = f'{statistics.fmean(self.top_1):.1f}'
      if len(self.top_1) > 1:
        text += f' ({low:.1f} to {high:.1f}, {len(self.top_1)} seeds)'
    if self.diverged:
      text += f'{"; " if text else ""}{self.diverged} diverged'
    return text


def points(
  row: rows.Row, scale: str, found: results.Results
) -> tuple[list[Point], list[Mapping[str, Any]], int]:
  """Gathers a row's results.

  Args:
    row: of `rows.ROWS`.
    scale: one of `rows.SCALES`.
    found: all results.

  Returns:
    The points, the results in them, and how many runs are not made yet.
  """
  grouped: dict[tuple, Point] = {}
  used, missing = [], 0
  for run in row.runs(scale, found):
    result = rows.find(run, found)
    if result is None:
      missing += 1
      continue
    used.append(result)
    if run.labels.get('part') is not None:  # only prepares another
      continue
    labels = {k: v for k, v in run.labels.items() if k != 'seed'}
    grouped.setdefault(tuple(labels.items()), Point(labels)).add(result)
  return list(grouped.values()), used, missing


def draw(
  row: rows.Row, found: Sequence[Point], title: str
) -> matplotlib.figure.Figure:
  """Draws the points: means, from least to largest, and crosses at the bottom.

  Args:
    row: whose `axes` say what is along x, by colour and by panel.
    found: its points.
    title: of the figure.

  Returns:
    The figure.
  """
  along, by = row.axes
  panels = list(dict.fromkeys(p.labels.get(row.panels or '') for p in found))
  figure = matplotlib.figure.Figure(
    figsize=(max(6.0, 4.5 * len(panels)), 4.0), layout='constrained'
  )
  axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
  figure.suptitle(title)
  series = list(dict.fromkeys(p.labels.get(by) for p in found))
  colors = {
    name: matplotlib.colormaps['tab10'](i % 10) for i, name in enumerate(series)
  }
  for axis, panel in zip(axes, panels, strict=True):
    here = [p for p in found if p.labels.get(row.panels or '') == panel]
    places = list(dict.fromkeys(p.labels[along] for p in here))
    numbers = all(isinstance(x, int | float) for x in places)
    if numbers:
      places.sort()
    for name in series:
      line = [p for p in here if p.labels.get(by) == name]
      line.sort(key=lambda p: places.index(p.labels[along]))
      sound = [p for p in line if p.mean is not None]
      xs = [places.index(p.labels[along]) for p in sound]
      means = [p.mean or 0.0 for p in sound]
      below = [m - min(p.top_1) for m, p in zip(means, sound, strict=True)]
      above = [max(p.top_1) - m for m, p in zip(means, sound, strict=True)]
      axis.errorbar(
        xs,
        means,
        yerr=[below, above],
        linestyle='-' if numbers else 'none',  # names have no order
        marker='o',
        ms=4,
        capsize=2,
        color=colors[name],
        label=str(name),
      )
      failed = [places.index(p.labels[along]) for p in line if p.diverged]
      axis.plot(failed, [10.0] * len(failed), 'x', color=colors[name], ms=9)
    ticks = axis.set_xticks(range(len(places)), [str(x) for x in places])
    if max(len(str(x)) for x in places) > 8:
      for tick in ticks:
        tick.label1.set(rotation=30, ha='right', rotation_mode='anchor')
    axis.set_xlabel(along)
    axis.grid(alpha=0.3)
    if row.panels is not None:
      axis.set_title(f'{row.panels} {panel}', fontsize=10)
  axes[0].set_ylabel('test top-1, % (× diverged)')
  axes[-1].legend(fontsize=8)
  return figure


def published(name: str) -> Table | None:
  """Returns the paper's numbers for a row, with a line of headings."""
  if name == 'batch-size':
    return [
      ('top-1, %', *map(str, paper.BATCH_SIZES)),
      *(
        (net, *('fails' if x is None else f'{x}' for x in line))
        for net, line in paper.BATCH_SIZE.items()
      ),
    ]
  if name == 'ablation':
    return [
      ('top-1, %', 'F0', 'F1', 'F2', 'F3'),
      *((row, *map(str, line)) for row, line in paper.ABLATION.items()),
    ]
  if name == 'transfer':
    return [
      ('top-1, %', '224 px', '320 px', '384 px'),
      *((net, *map(str, line)) for net, line in paper.TRANSFER.items()),
    ]
  if name == 'regularisation':
    names = [f'nfnet_f{n}' for n in range(7)]
    return [
      ('net', 'dropout', 'top-1, %', 'with SAM'),
      *(
        (
          model,
          str(variants.get(model).settings.drop_rate),
          f'{paper.LATENCY[model].top_1}' if model in paper.LATENCY else '',
          str(paper.SAM.get(model, '')),
        )
        for model in names
      ),
    ]
  if name == 'microbatch':
    return [
      ('top-1, %', 'batch of 4'),
      *((net, str(x)) for net, x in paper.MICROBATCH.items()),
    ]
  return None


def _table(lines: Table) -> str:
  head, *body = lines
  cells = ''.join(f'<th>{html.escape(x)}</th>' for x in head)
  text = [f'<table><tr>{cells}</tr>']
  for line in body:
    cells = ''.join(f'<td>{html.escape(x)}</td>' for x in line)
    text.append(f'<tr>{cells}</tr>')
  return '\n'.join([*text, '</table>'])


def _picture(figure: matplotlib.figure.Figure, path: pathlib.Path) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=100)
  data = base64.b64encode(path.read_bytes()).decode()
  return f'<img alt="{path.stem}" src="data:image/png;base64,{data}">'


def _made_with(used: Sequence[Mapping[str, Any]]) -> str:
  machines = collections.Counter(
    f'{x["device"]}, {x["cores"]} cores, jax {x["jax"]}, Python {x["python"]}, '
    f'{x["date"]}'
    for x in used
  )
  minutes = sum(x['seconds'] for x in used) / 60
  return (
    '; '.join(f'{count} runs on {name}' for name, count in machines.items())
    + f'; the times of these runs add up to {minutes:.0f} minutes'
  )


def section(
  row: rows.Row,
  scale: str,
  found: results.Results,
  output: pathlib.Path,
) -> list[str]:
  """Returns a row's part of the page, and writes its figure.

  Args:
    row: of `rows.ROWS`.
    scale: one of `rows.SCALES`.
    found: all results.
    output: folder of the PNG.

  Returns:
    Lines of HTML; none if there is no result.
  """
  grouped, used, missing = points(row, scale, found)
  if not grouped:
    return []
  labels = list(dict.fromkeys(k for p in grouped for k in p.labels))
  lines = [
    (*labels, 'test top-1, %'),
    *((*(str(p.labels.get(k, '')) for k in labels), str(p)) for p in grouped),
  ]
  figure = draw(row, grouped, f'{row.name}, {scale}')
  beside = published(row.name)
  return [
    f'<h2 id="{row.name}-{scale}">{row.name}, {scale}</h2>',
    f'<p>{html.escape(row.claim)} <em>({html.escape(row.source)})</em></p>',
    f'<p><code>make reproduce-{row.name} SCALE={scale}</code></p>',
    _picture(figure, output / f'{row.name}-{scale}.png'),
    _table(lines),
    f'<p>{html.escape(_made_with(used))}.'
    + (f' {missing} runs are not made yet.' if missing else '')
    + '</p>',
    f'<p>The paper: {html.escape(paper.WORDS.get(row.name, "in numbers"))}</p>',
    *([_table(beside)] if beside else []),
  ]


def latency_section(
  scale: str, found: results.Results, output: pathlib.Path
) -> list[str]:
  """Returns the latencies' part of the page, and writes its figure."""
  used = [
    found[name]
    for model in latency.MODELS
    if (name := latency.name_of(scale, model)) in found
  ]
  if not used:
    return []
  lines = [
    (
      'net',
      "parameters, M (paper's)",
      "GMACs at test size (paper's)",
      'pixels',
      'seconds',
      '÷ F1, least to largest',
      "paper's ÷ F1 (TPUv3, ms)",
      "paper's top-1, %",
    )
  ]
  figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout='constrained')
  axis = figure.subplots()
  for result in used:
    model = result['labels']['model']
    known = paper.LATENCY.get(model)
    theirs = latency.published_ratio(model)
    took, ratio = result.get('message', ''), ''
    if 'ratios' in result:
      middle = statistics.median(result['ratios'])
      took = f'{statistics.median(result["step_seconds"]):.2f}'
      ratio = (
        f'{middle:.2f} ({min(result["ratios"]):.2f} to '
        f'{max(result["ratios"]):.2f})'
      )
      if known is not None:
        color = 'tab:blue' if 'nfnet' in model else 'tab:orange'
        axis.plot(middle, known.top_1, 'o', color=color)
        axis.annotate(model, (middle, known.top_1), fontsize=7)
    lines.append(
      (
        model,
        f'{result["params"] / 1e6:.2f}'
        + (f' ({known.params})' if known else ''),
        f'{result["gmacs_test"]:.2f}' + (f' ({known.gmacs})' if known else ''),
        str(result['size']),
        took,
        ratio,
        f'{theirs:.2f} ({known.tpu_ms})' if known else '',
        f'{known.top_1}' if known else '',
      )
    )
  axis.set(
    xscale='log',
    xlabel="forward and backward pass ÷ NFNet-F1's, measured here",
    ylabel="the paper's top-1, %",
    title=f'latency, {scale}',
  )
  axis.grid(alpha=0.3)
  return [
    f'<h2 id="latency-{scale}">latency, {scale}</h2>',
    '<p>NFNets train faster than EfficientNets of their accuracy: F1 is 8.7 '
    'times as fast as B7. <em>(table 3, figure 1; the ratio in the table is '
    '8.81)</em></p>',
    f'<p><code>make reproduce-latency SCALE={scale}</code></p>',
    _picture(figure, output / f'latency-{scale}.png'),
    _table(lines),
    f'<p>Batches of {used[0]["labels"]["batch"]}. {_made_with(used)}.</p>',
  ]


def write(output: pathlib.Path) -> pathlib.Path:
  """Writes the page and the figures.

  Args:
    output: folder with results.

  Returns:
    The page.

  Raises:
    FileNotFoundError: if there are none.
  """
  found = results.read(output)
  body = []
  for scale in rows.SCALES:
    for row in rows.ROWS.values():
      body += section(row, scale, found, output)
    body += latency_section(scale, found, output)
  if not body:
    raise FileNotFoundError(
      f'there are no results in {output}; make some, as by '
      'make reproduce-batch-size SCALE=small'
    )
  page = output / 'report.html'
  page.write_text(
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<title>NFNets: the claims of the paper, reproduced</title>'
    f'<style>{_STYLE}</style><h1>The claims of the paper, reproduced</h1>'
    '<p>Brock et al. 2021, <a href="https://arxiv.org/abs/2102.06171">'
    "arXiv:2102.06171</a>. Below each claim what was measured, and the paper's "
    'numbers, which are of ImageNet and of other nets where the scale is not '
    '<em>paper</em>: effects compare, accuracies do not.</p>'
    + '\n'.join(body)
    + '</html>\n'
  )
  return page


def main(argv: list[str] | None = None) -> None:
  """Parses the command line and writes the page.

  Args:
    argv: arguments; None takes those of the process.
  """
  parser = argparse.ArgumentParser(
    prog='python -m experiments.reproduce.report',
    description='The claims that have results, as a page.',
  )
  parser.add_argument(
    '--output', type=paths.argument, default=pathlib.Path('runs/reproduce')
  )
  args = parser.parse_args(argv)
  try:
    print(write(args.output))
  except (FileNotFoundError, ValueError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  main()
