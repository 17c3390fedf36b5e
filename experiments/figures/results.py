"""Rewrites the generated parts of the pages in docs/results.

  python -m experiments.figures.results

A page marks each part with the line `<!-- begin KIND ARGUMENTS -->` before it
and `<!-- end -->` after it. The rest of the page is left as it is. The parts
are made from `experiments/reproduce/small` and `experiments/gpu/results`.
"""

import functools
import pathlib
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from experiments.figures import markdown
from experiments.gpu import common
from experiments.gpu import report as gpu_report
from experiments.reproduce import claim as claims_lib
from experiments.reproduce import results
from experiments.reproduce.claims import CLAIMS, latency

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ROOT / 'docs' / 'results'
_GPU = ROOT / 'experiments' / 'gpu' / 'results'
_PART = re.compile(r'(<!-- begin (.+?) -->\n).*?(<!-- end -->)', re.S)


@functools.cache
def _found(scale: str) -> results.Results:
  return results.read(ROOT / 'experiments' / 'reproduce' / scale)


@functools.cache
def _measured(name: str, scale: str) -> claims_lib.Measured:
  return claims_lib.Measured(CLAIMS[name], scale, _found(scale))


@functools.cache
def _statements(name: str, scale: str) -> list[claims_lib.Statement]:
  if name == 'latency':
    return latency.statements(scale, _found(scale))
  return CLAIMS[name].statements(_measured(name, scale))


def verdicts(scale: str) -> str:
  """Returns the table of all claims at a scale."""
  rows = []
  texts = {name: x.text for name, x in CLAIMS.items()}
  texts['latency'] = latency.TEXT
  for name, text in texts.items():
    statements = _statements(name, scale)
    holds = [x for s in statements for x in s.holds.values()]
    rows.append(
      [
        f'[{name}](#{name})',
        text,
        claims_lib.verdict(statements),
        f'{sum(map(bool, holds))} of {len(holds)}',
      ]
    )
  head = ['claim', 'the paper', f'at {scale}', 'cases that hold']
  return markdown.table(head, rows)


def claim(name: str, scale: str) -> str:
  """Returns the machine, figure, table and verdicts of a claim at a scale."""
  if name == 'latency':
    found = _found(scale)
    used = {
      model: found[latency.name_of(scale, model)]
      for model in latency.MODELS
      if latency.name_of(scale, model) in found
    }
    body, made = _latencies(used), list(used.values())
  else:
    measured = _measured(name, scale)
    body, made = _accuracies(CLAIMS[name], measured), measured.results
  figure = f'../../experiments/reproduce/{scale}/{name}-{scale}.png'
  blocks = [
    f'`make reproduce-{name} SCALE={scale}`. {_machines(made)}',
    f'![{name} at {scale}]({figure})',
    body,
    '\n'.join(_lines(_statements(name, scale))),
  ]
  return '\n\n'.join(blocks)


def _lines(statements: list[claims_lib.Statement]) -> Iterator[str]:
  for x in statements:
    fails = [str(k) for k, hold in x.holds.items() if not hold and k != '']
    where = f' (not at {", ".join(fails)})' if x.verdict[:6] == 'partly' else ''
    yield f'* **{x.verdict.capitalize()}{where}**: {x.text}'


def _machines(made: list[Mapping[str, Any]]) -> str:
  dates = sorted({x['date'] for x in made})
  machines = sorted(
    {
      f'{x["device"]}, {x["cores"]} cores, Python {x["python"]}, jax {x["jax"]}'
      for x in made
    }
  )
  minutes = sum(x['seconds'] for x in made) / 60
  return (
    f'{len(made)} runs, {minutes:.0f} minutes summed over all of them '
    f'({"; ".join(machines)}; {" to ".join(dates)}).'
  )


def _accuracies(claim: claims_lib.Claim, measured: claims_lib.Measured) -> str:
  """Returns the test accuracies, by the claim's axes where that is a grid."""
  along, by = claim.axes
  down = (by, along) if claim.panels else (by,)
  across = claim.panels or along
  if not claim.panels and len({x.labels[by] for x in measured.points}) == 1:
    down, across = (along,), by
  rows: dict[Any, dict[Any, str]] = {}
  for x in measured.points:
    key = tuple(_text(x.labels.get(k, '')) for k in down)
    rows.setdefault(key, {})[x.labels[across]] = _cell(x)
  columns = list(dict.fromkeys(x.labels[across] for x in measured.points))
  if all(isinstance(x, int | float) for x in columns):
    columns.sort()
  head = [*down, *(_name(across, x) for x in columns)]
  lines = [[*k, *(v.get(c, '') for c in columns)] for k, v in rows.items()]
  counts = {len(x.top_1) + len(x.diverged) for x in measured.points}
  seeds = ' or '.join(map(str, sorted(counts)))
  note = f'Test top-1 in %, mean (range) over seeds; seeds: {seeds}.'
  return f'{markdown.table(head, lines)}\n\n{note}'


def _text(value: Any) -> str:
  return f'{value:g}' if isinstance(value, float) else str(value)


def _name(label: str, value: Any) -> str:
  return value if isinstance(value, str) else f'{label} {_text(value)}'


def _cell(point: claims_lib.Point) -> str:
  return re.sub(r', \d+ seeds', '', str(point))


def _latencies(used: Mapping[str, Mapping[str, Any]]) -> str:
  rows = []
  for model, x in used.items():
    theirs = latency.published_ratio(model)
    ratios = x['ratios']
    rows.append(
      [
        model,
        x['size'],
        f'{statistics.median(x["step_seconds"]):.2f}',
        f'{statistics.median(ratios):.2f} ({min(ratios):.2f} to '
        f'{max(ratios):.2f})',
        f'{theirs:.2f}' if theirs else '',
      ]
    )
  head = ['net', 'pixels', 'seconds', '÷ F1 (range)', "paper's ÷ F1, TPUv3"]
  return markdown.table(head, rows)


def gpu(name: str) -> str:
  """Returns goals and tables of a file of results of `make gpu`."""
  page = gpu_report.page(common.read(_GPU / f'{name}.jsonl'))
  # Without the heading and the machine, and the unfinished jobs' messages.
  blocks = page.partition('\n\nFailed or not run:')[0].split('\n\n')[2:]
  return '\n\n'.join(blocks).rstrip()


_KINDS: Mapping[str, Callable[..., str]] = {
  'verdicts': verdicts,
  'claim': claim,
  'gpu': gpu,
}


def render(page: str) -> str:
  """Returns a page with its generated parts made anew.

  Example:
    >>> render('no generated part')
    'no generated part'
  """

  def make(match: re.Match[str]) -> str:
    kind, *arguments = match[2].split()
    return f'{match[1]}\n{_KINDS[kind](*arguments)}\n\n{match[3]}'

  return _PART.sub(make, page)


def main() -> None:
  for path in sorted(PAGES.glob('*.md')):
    old = path.read_text()
    if (new := render(old)) != old:
      path.write_text(new)
      print(path.relative_to(ROOT))


if __name__ == '__main__':
  main()
