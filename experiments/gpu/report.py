"""Writes `report.md` from what there is of the results.

python -m experiments.gpu.report DIR
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from experiments.gpu import common

_NOT_MEASURED = 'not measured'
# Of the paper: F1's step is so many times as fast as EfficientNet-B7's.
_B7_GOAL = 8.7


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
  """Returns the lines of a table."""
  cells = [head, ['---'] * len(head), *rows]
  return [f'| {" | ".join(map(str, row))} |' for row in cells] + ['']


def _machine(results: list[dict[str, Any]]) -> list[str]:
  lines = []
  for x in results:
    if x['what'] == 'machine':
      versions = ', '.join(f'{k} {v}' for k, v in x['versions'].items())
      told = f' ({x["nvidia_smi"]})' if x['nvidia_smi'] else ''
      lines.append(
        f'{x["date"]}: {x["devices"]} × {x["device"]}{told}, {x["cores"]} '
        f'cores, Python {x["python"]}, {versions}.'
        + (' **A dry run: no number here means anything.**' * x['dry_run'])
      )
  return [*dict.fromkeys(lines), '']


def _checks(results: list[dict[str, Any]]) -> list[str]:
  rows = []
  for x in results:
    if x['part'] == 1 and x['what'] not in ('part', 'failed'):
      if 'limit' in x:
        bound = f'at most {x["limit"]:g}'
      else:
        bound = f'at least {x["at_least"]:g}' if 'at_least' in x else ''
      value = f'{x["value"]:.3g}' if 'value' in x else ''
      verdict = {True: 'yes', False: '**no**', None: ''}[x.get('ok')]
      rows.append([x['what'], value, bound, verdict])
  if not rows:
    return []
  head = ['1. Is it right?', 'relative error or value', 'limit', 'ok']
  return table(head, rows)


def _steps(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """All measured steps, ours and others', fastest layout by fastest."""
  found = []
  for x in results:
    if x['what'] == 'step':
      found.append({**x, 'who': x['form']})
    elif x['what'] == 'timm' and x['status'] == 'measured':
      who = f'timm, {x["mode"]}, channels {x["layout"]}'
      found.append({**x, 'who': who})
  return found


def _fastest(
  steps: list[dict[str, Any]], model: str, who: str, largest: bool = False
) -> dict[str, Any] | None:
  """The fastest step of a net by images per second, of ours or of timm."""
  some = [
    x
    for x in steps
    if (x['model'], x['largest']) == (model, largest)
    and x['who'].startswith(who)
  ]
  return max(some, key=lambda x: x['images_per_second'], default=None)


def _speed(results: list[dict[str, Any]]) -> list[str]:
  steps = _steps(results)
  peaks = [x['tflops'] for x in results if x['what'] == 'peak']
  rows = []
  for x in sorted(steps, key=lambda x: (x['model'], x['largest'], x['batch'])):
    share = memory = ''
    if 'tflops' in x and peaks:
      share = f'{x["tflops"] / peaks[-1]:.1%}'
    if x['memory']:
      memory = f'{x["memory"] / 2**30:.2f}'
    ours = _fastest(steps, x['model'], 'ours', x['largest'])
    ratio = ''
    if ours and x is not ours:
      ratio = f'{x["images_per_second"] / ours["images_per_second"]:.3f}'
    rounds = [1e3 * seconds for seconds in x['rounds']]
    rows.append(
      [
        x['model'],
        x['batch'],
        x['who'],
        f'{1e3 * x["seconds"]:.2f} ({min(rounds):.2f} to {max(rounds):.2f})',
        f'{x["images_per_second"]:.0f}',
        share,
        memory,
        ratio,
      ]
    )
  lines = []
  if peaks:
    lines += [f'A large bfloat16 product: {peaks[-1]:.1f} TFLOP/s.', '']
  if rows:
    head = [
      '2. A training step',
      'batch',
      'by',
      'ms (5 rounds)',
      'images/s',
      'of that peak',
      'GiB',
      'ours ÷ it, by image',
    ]
    lines += table(head, rows)
  absent = {
    x['message']
    for x in results
    if x['what'] == 'timm' and x['status'] == 'absent'
  }
  lines += [f'timm: absent ({message}).\n' for message in sorted(absent)]
  return lines


def _effect(results: list[dict[str, Any]]) -> list[str]:
  runs = [x for x in results if x['part'] == 3 and x['what'] == 'run']
  if not runs:
    return []
  batches = sorted({x['labels']['batch'] for x in runs})
  rows = []
  for net in dict.fromkeys(x['labels']['net'] for x in runs):
    row = [net]
    for batch in batches:
      cell = ''
      for x in runs:
        if (x['labels']['net'], x['labels']['batch']) == (net, batch):
          told = x['message'] if x['top_1'] is None else f'{x["top_1"]:.2%}'
          clipping = x['labels'].get('clipping')
          cell = told + (f' (λ {clipping:g})' if clipping else '')
      row.append(cell)
    rows.append(row)
  lines = table(['3. Test top-1, by batch', *map(str, batches)], rows)
  epochs = sorted({x['epochs'] for x in runs})
  return [
    *lines,
    f'One seed, {", ".join(f"{x:g}" for x in epochs)} epochs.',
    '',
  ]


def _record(results: list[dict[str, Any]]) -> list[str]:
  lines = []
  for x in results:
    if x['part'] == 4 and x['what'] == 'input pipeline':
      lines.append(
        f'Input pipeline: {x["images_per_second"]:.0f} images/s on '
        f'{x["cores"]} cores.'
      )
    if x['part'] == 4 and x['what'] == 'cifar10':
      lines.append(
        f'4. {x["data"]}, {x["epochs"]:g} epochs, {x["status"]}: '
        f'{x["top_1"]:.2%} with the average, {x["weights_top_1"]:.2%} with the '
        f'weights, {x["seconds"]:.0f} s.'
      )
  return [*lines, ''] if lines else []


def goals(results: list[dict[str, Any]]) -> list[str]:
  """Returns a line for each goal: what was measured, and whether it is met."""
  steps = _steps(results)
  peaks = [x['tflops'] for x in results if x['what'] == 'peak']
  lines = []

  def say(goal: str, value: float | None, shown: str, met: bool) -> None:
    verdict = (
      _NOT_MEASURED
      if value is None
      else (f'{shown}: {"met" if met else "not met"}')
    )
    lines.append(f'* {goal}: {verdict}.')

  def quotient(a: Any, b: Any) -> float | None:
    return None if a is None or b is None else a['seconds'] / b['seconds']

  for model, name in (('nfnet_f0', 'F0'), ('nfnet_f1', 'F1')):
    ours = _fastest(steps, model, 'ours')
    ratio = quotient(ours, _fastest(steps, model, 'timm'))
    say(
      f'{name} step ÷ the fastest of timm, at most 0.8',
      ratio,
      f'{ratio or 0:.3f}',
      (ratio or 9) <= 0.8,
    )
    shares = [
      x['tflops'] / peaks[-1]
      for x in steps
      if x['model'] == model and x['who'] == 'ours' and peaks
    ]
    best = max(shares, default=None)
    say(
      f'{name}, at least 40 % of the measured peak',
      best,
      f'{best or 0:.1%}',
      (best or 0) >= 0.4,
    )
  ratio = quotient(
    _fastest(steps, 'efficientnet_b7', 'ours'),
    _fastest(steps, 'nfnet_f1', 'ours'),
  )
  say(
    f'F1 at least {_B7_GOAL} times as fast as EfficientNet-B7',
    ratio,
    f'{ratio or 0:.2f}',
    (ratio or 0) >= _B7_GOAL,
  )
  top_1 = {
    (x['labels']['net'], x['labels']['batch']): x['top_1']
    for x in results
    if x['part'] == 3 and x['what'] == 'run' and x['top_1'] is not None
  }
  pair = top_1.get(('NF + AGC', 4096)), top_1.get(('BN', 256))
  short = None if None in pair else 100 * (pair[1] - pair[0])  # type: ignore[operator]
  say(
    'AGC at 4096 within a point of BN at 256',
    short,
    f'{short or 0:.2f} points below',
    short is not None and short <= 1,
  )
  best = max(
    (x['top_1'] for x in results if x['what'] == 'cifar10'), default=None
  )
  say('96 % on CIFAR-10', best, f'{best or 0:.2%}', (best or 0) >= 0.96)
  return [*lines, '']


def write(folder: pathlib.Path) -> None:
  """Writes `report.md` into a folder of results."""
  results = common.read(folder)
  failed = [
    f'* part {x["part"]}, {x["job"]}: {x["message"]}'
    for x in results
    if x['what'] == 'failed'
  ]
  lines = [
    '# On an accelerator',
    '',
    *_machine(results),
    *goals(results),
    *_checks(results),
    *_speed(results),
    *_effect(results),
    *_record(results),
    *(['What failed or was not done:', '', *failed, ''] if failed else []),
  ]
  partial = folder / 'report.tmp'
  partial.write_text('\n'.join(lines))
  partial.replace(folder / 'report.md')


if __name__ == '__main__':
  write(pathlib.Path(sys.argv[1]))
  print((pathlib.Path(sys.argv[1]) / 'report.md').read_text())
