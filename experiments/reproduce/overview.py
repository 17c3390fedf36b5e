"""The table at the top of the report: each claim and all evidence for it.

GPU results come from `experiments/gpu/results`, those at `small` from the
folder of results.
"""

import json
import pathlib
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from experiments.reproduce import claim as claims_lib
from experiments.reproduce import page, protocol, results
from experiments.reproduce.claims import CLAIMS, latency

_GPU = pathlib.Path(__file__).parents[1] / 'gpu' / 'results'


def table(
  found: results.Results,
  anchors: Collection[str],
  compiled: Mapping[str, str],
  costs: Mapping[str, str],
) -> list[page.Block]:
  """Returns the table, a row for each claim.

  Args:
    found: results by name.
    anchors: of the sections that the page has.
    compiled: the compilers' estimate of an effect, by claim.
    costs: device-days at the scale `paper`, by claim; latency has none.
  """
  head = (
    'claim',
    'the paper',
    'small scale',
    'effect (95 %)',
    'others',
    'compilers',
    'one GPU',
    'paper scale',
    'its device-days',
  )
  rows: list[Sequence[page.Cell]] = [head]
  texts = {name: x.text for name, x in CLAIMS.items()}
  texts['latency'] = latency.TEXT
  gpu = gpu_results()
  for name, text in texts.items():
    anchor = f'{name}-small'
    first, *others = small(name, found)
    rows.append(
      (
        page.Link(name, anchor if anchor in anchors else 'overview', text),
        protocol.read(name).paper,
        page.Verdict(first.verdict),
        first.effect,
        _counts(others),
        compiled.get(name, '–'),
        gpu.get(name, 'not run'),
        page.Code(f'make reproduce-{name} SCALE=paper'),
        costs.get(name, '–'),
      )
    )
  note = (
    "Verdict and effect are those of a claim's first hypothesis; the others "
    'are counted.'
  )
  return [page.Table(rows), page.Text([note])]


def small(name: str, found: results.Results) -> list[protocol.Judgement]:
  """Returns the verdicts on a claim's hypotheses at `small`."""
  text = protocol.read(name)
  points: claims_lib.Points
  if name == 'latency':
    points = latency_points('small', found)
  else:
    points = claims_lib.Measured(CLAIMS[name], 'small', found)
  return text.judge(points)


def latency_points(scale: str, found: results.Results) -> claims_lib.Points:
  """Returns each net's time over F1's, by round in place of the seed."""
  points = []
  for model in latency.MODELS:
    result = found.get(latency.name_of(scale, model), {})
    if 'ratios' in result:
      by_seed: dict[int, float | None] = dict(enumerate(result['ratios']))
      points.append(claims_lib.Point({'model': model}, by_seed=by_seed))
  return claims_lib.Points(points, len(latency.MODELS) - len(points))


def _counts(judged: list[protocol.Judgement]) -> str:
  kinds = ('seen', 'not seen', 'undecided', 'incomplete')
  counts = {kind: sum(x.verdict == kind for x in judged) for kind in kinds}
  return ', '.join(f'{n} {kind}' for kind, n in counts.items() if n)


def gpu_results() -> dict[str, str]:
  """Returns what was measured on one GPU, by claim."""
  shown: dict[str, str] = {}
  for path in sorted(_GPU.glob('*.jsonl')):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    device = re.sub(r'-\d{4}-.*', '', path.stem).upper()
    if text := _gpu_batches(lines):
      shown['batch-size'] = f'{device}: {text}'
    if text := _gpu_latency(lines):
      shown['latency'] = f'{device}: {text}'
  return shown


def _gpu_batches(lines: list[Mapping[str, Any]]) -> str:
  top_1: dict[tuple[str, int], list[float]] = {}
  for x in lines:
    if x['what'] == 'run' and x.get('top_1') is not None:
      key = x['labels']['net'], x['labels']['batch']
      top_1.setdefault(key, []).append(100 * x['top_1'])
  parts = []
  for net, batch in sorted(top_1, key=lambda x: x[1]):
    if net == 'NF + AGC' and ('BN', batch) in top_1:
      mean = statistics.fmean(top_1[net, batch])
      lead = mean - statistics.fmean(top_1['BN', batch])
      parts.append(f'{lead:+.1f} at {batch}'.replace('-', '−'))
  return f'NF + AGC − BN {", ".join(parts)}' if parts else ''


def _gpu_latency(lines: list[Mapping[str, Any]]) -> str:
  steps = {
    x['model']: x['seconds']
    for x in lines
    if x['what'] == 'step' and x.get('form') == 'ours' and x['batch'] == 32
  }
  f1, b7 = steps.get('nfnet_f1'), steps.get('efficientnet_b7')
  if f1 is None:
    return ''
  if b7 is None:
    return f'F1 {1e3 * f1:.1f} ms a step, B7 not measured'
  return f'B7 / F1 {b7 / f1:.2f}'
