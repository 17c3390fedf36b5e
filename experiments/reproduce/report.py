"""Writes the report: a verdict, a figure and the numbers of each claim.

  python -m experiments.reproduce.report --output=runs/reproduce

`report.html` needs no other file; `report.md` is the same beside the figures,
which are PNGs. At `small` a claim is judged by the rule that was written down
before (protocol.py), elsewhere by its statements.
"""

import argparse
import collections
import pathlib
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.reproduce import claim as claims_lib
from experiments.reproduce import (
  cost,
  figures,
  latency_table,
  overview,
  page,
  protocol,
  results,
  scales,
)
from experiments.reproduce.claims import CLAIMS, latency
from nfnets_jax import paths

_TITLE = 'The claims of the paper, reproduced'
_SOURCE = (
  'Brock et al. 2021, https://arxiv.org/abs/2102.06171. Below the scale paper '
  "the nets and the data are not the paper's: compare effects, not accuracies. "
  'Intervals are 95 % t intervals over seeds.'
)
_ESTIMATES = (
  'Compilers: for v3 the sum of cycles, which is above the times of the paper '
  'for EfficientNets and below them for NFNets; for H100 the memory traffic at '
  'peak bandwidth, a lower bound.'
)
_REHEARSAL = 'A rehearsal: no number here means anything.'


def _statements(
  statements: Sequence[claims_lib.Statement],
) -> Iterator[page.Block]:
  """Yields the verdict and the statements of a scale without a protocol."""
  yield page.Text([page.Verdict(claims_lib.verdict(statements))])
  lines: list[Sequence[page.Cell]] = [('statement', 'verdict', 'where')]
  for x in statements:
    where = []
    if len(set(x.holds.values())) > 1:
      for value, word in ((True, 'holds'), (False, 'fails'), (None, 'not run')):
        names = [str(k) for k, holds in x.holds.items() if holds is value]
        where += [f'{word}: {", ".join(names)}'] if names else []
    lines.append((x.text, page.Verdict(x.verdict), '; '.join(where)))
  yield page.Table(lines)
  yield page.Text(
    [
      'A net beats another if its worst seed is above the best of the other, '
      'and matches it if their ranges overlap.'
    ]
  )


def _hypotheses(
  text: protocol.Protocol,
  points: claims_lib.Points,
  used: Sequence[Mapping[str, Any]],
) -> Iterator[page.Block]:
  """Yields the verdicts by the rule written down before."""
  lines: list[Sequence[page.Cell]] = [
    ('hypothesis', 'rule', 'effect (95 %)', 'seeds', 'verdict')
  ]
  judged = text.judge(points)
  for each, found in zip(text.hypotheses, judged, strict=True):
    verdict = page.Verdict(found.verdict)
    lines.append(
      (each.text, each.rule, found.effect, f'{found.seeds}', verdict)
    )
  yield page.Table(lines)
  curves = points.at(**text.overfits).curves if text.overfits else []
  if curves:
    yield page.Text([_overfitting(text.overfits, curves)])
  note = (
    f'The rule is in preregistered/{text.name}.md (digest {text.digest}), with '
    'the setting and its reasons.'
  )
  others = collections.Counter(
    digest
    for x in used
    if (digest := x['preregistered'][text.name]) != text.digest
  )
  for digest, count in others.items():
    note += (
      f' {count} of {len(used)} results were made when its digest was {digest}.'
    )
  yield page.Text([note])


def _overfitting(
  labels: protocol.Labels, curves: Sequence[Sequence[Mapping[str, Any]]]
) -> str:
  name = ', '.join(map(str, labels.values()))
  train = ', '.join(f'{100 * x[-1]["train_top_1"]:.1f}' for x in curves)
  least = statistics.fmean(min(y['loss'] for y in x) for x in curves)
  last = statistics.fmean(x[-1]['loss'] for x in curves)
  return (
    f'{name} should overfit: final training accuracies {train} %; test loss '
    f'{least:.2f} at its least and {last:.2f} at the end.'
  )


def _machines(used: Sequence[Mapping[str, Any]]) -> str:
  machines = collections.Counter(
    f'{x["device"]}, {x["cores"]} cores, jax {x["jax"]}, Python {x["python"]}, '
    f'{x["date"]}'
    for x in used
  )
  minutes = sum(x['seconds'] for x in used) / 60
  runs = '; '.join(f'{count} runs on {x}' for x, count in machines.items())
  return f'{runs}; {minutes:.0f} minutes summed over all runs.'


def _section(
  name: str,
  scale: str,
  text: str,
  source: str,
  parts: Sequence[page.Block],
) -> page.Section:
  head = [
    page.Text([f'{text} ({source})']),
    page.Text([page.Code(f'make reproduce-{name} SCALE={scale}')]),
  ]
  return page.Section(f'{name}, {scale}', [*head, *parts])


def claim_section(
  claim: claims_lib.Claim,
  scale: str,
  found: results.Results,
  output: pathlib.Path,
) -> page.Section | None:
  """Returns a claim's section and writes its figure; None without results."""
  measured = claims_lib.Measured(claim, scale, found)
  if not measured.points:
    return None
  judged = (
    _hypotheses(protocol.read(claim.name), measured, measured.results)
    if scale == 'small'
    else _statements(claim.statements(measured))
  )
  labels = list(dict.fromkeys(k for x in measured.points for k in x.labels))
  lines = [
    (*labels, 'test top-1, %'),
    *(
      (*(str(x.labels.get(k, '')) for k in labels), str(x))
      for x in measured.points
    ),
  ]
  caption = 'Points are means over seeds, bars their range.'
  curve = claim.paper(scale) if claim.paper else None
  if curve and curve.top_1:
    caption += f' Dashed: the paper, {curve.note}'
    caption += '.' if scale == 'paper' else ', in the units of the right axis.'
    if None in curve.top_1.values():
      caption += ' ▽: it fails.'
  missing = f' {measured.missing} runs are missing.' if measured.missing else ''
  parts: list[page.Block] = [
    *judged,
    page.picture(
      lambda: figures.draw(claim, measured),
      output / f'{claim.name}-{scale}.png',
      caption,
    ),
    page.Table(lines, 'Results'),
    page.Text([f'{_machines(measured.results)}{missing}']),
  ]
  if claim.words:
    parts.append(page.Text([f'The paper: {claim.words}']))
  if claim.table:
    parts.append(page.Table(claim.table, "The paper's numbers"))
  return _section(claim.name, scale, claim.text, claim.source, parts)


def latency_section(
  scale: str, found: results.Results, output: pathlib.Path
) -> page.Section | None:
  """Returns the section of `latency` and writes its figure, or None."""
  names = {x: latency.name_of(scale, x) for x in latency.MODELS}
  used = {model: found[x] for model, x in names.items() if x in found}
  if not used:
    return None
  ratios = {
    model: statistics.median(x['ratios'])
    for model, x in used.items()
    if 'ratios' in x
  }
  results_used = list(used.values())
  batch = results_used[0]['labels']['batch']
  points = overview.latency_points(scale, found)
  judged = (
    _hypotheses(protocol.read('latency'), points, results_used)
    if scale == 'small'
    else _statements(latency.statements(scale, found))
  )
  parts: list[page.Block] = [
    *judged,
    page.picture(
      lambda: figures.draw_latency(ratios, scale),
      output / f'latency-{scale}.png',
      'Dashed: the latencies of the paper. All accuracies are its own.',
    ),
    page.Table(latency_table.table(scale, used)),
    page.Text([f'{_machines(results_used)} Batches of {batch}.']),
    page.Text([_ESTIMATES]),
  ]
  return _section('latency', scale, latency.TEXT, latency.SOURCE, parts)


def _compiled() -> dict[str, str]:
  """Returns the compilers' estimates of effects, by claim."""
  parts = []
  for topology in latency.TOPOLOGIES:
    f1, b7 = (
      latency_table.estimated_ms(x, topology)
      for x in (latency.REFERENCE, 'efficientnet_b7')
    )
    if f1 is not None and b7 is not None:
      parts.append(f'{topology}: B7 {b7 / f1:.2f} times as slow as F1')
  return {'latency': ', '.join(parts) or 'not compiled'}


def write(output: pathlib.Path) -> pathlib.Path:
  """Writes the page, as HTML and as Markdown, and the figures.

  Args:
    output: folder with results.

  Returns:
    The page of HTML.

  Raises:
    FileNotFoundError: if the folder has no results.
  """
  found = results.read(output)
  sections = []
  for scale in scales.SCALES:
    if not any(name.startswith(f'{scale}/') for name in found):
      continue
    sections += [
      claim_section(claim, scale, found, output) for claim in CLAIMS.values()
    ]
    sections.append(latency_section(scale, found, output))
  drawn = [section for section in sections if section is not None]
  if not drawn:
    raise FileNotFoundError(
      f'no results in {output}; make some with make reproduce-batch-size '
      'SCALE=small'
    )
  notes = [_SOURCE]
  if any(x.get('rehearsal') for x in found.values()):
    notes.insert(0, _REHEARSAL)
  anchors = {section.anchor for section in drawn}
  costs = {name: str(cost.cost(name)) for name in CLAIMS}
  table = overview.table(found, anchors, _compiled(), costs)
  first = page.Section('Overview', [page.Text(notes), *table])
  html = output / 'report.html'
  html.write_text(page.as_html(_TITLE, [first, *drawn]))
  html.with_suffix('.md').write_text(page.as_markdown(_TITLE, [first, *drawn]))
  return html


def main(argv: list[str] | None = None) -> None:
  """Writes the page of the results that the command line, or `argv`, names."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.reproduce.report',
    description='Write report.html and .md: every claim with results.',
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
