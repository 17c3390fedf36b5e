"""The report of the results so far, `report.md` in the folder of a run.

  python -m experiments.gpu.report FILE.jsonl

prints the report of other results.
"""

import argparse
import math
import pathlib
from typing import Any

from experiments.figures import markdown
from experiments.gpu import common
from nfnets_jax import command_line, paths

# The paper's step time of EfficientNet-B7 divided by F1's.
_B7_GOAL = 8.7
_SPEEDS = {'step': 'A training step', 'training speed': 'Training'}

Result = dict[str, Any]


def _machine(results: list[Result]) -> list[str]:
  lines = []
  for x in results:
    if x['what'] == 'machine':
      versions = ', '.join(f'{k} {v}' for k, v in x['versions'].items())
      driver = f' ({x["nvidia_smi"]})' if x['nvidia_smi'] else ''
      lines.append(
        f'{x["date"]}: {x["devices"]} × {x["device"]}{driver}, {x["cores"]} '
        f'cores, Python {x["python"]}, {versions}.'
        + (' **A dry run: no number here means anything.**' * x['dry_run'])
      )
  return list(dict.fromkeys(lines))


def _checks(results: list[Result]) -> list[str]:
  rows = []
  for x in results:
    if x['part'] == 1 and x['what'] not in ('part', 'failed'):
      bound = f'at least {x["at_least"]:g}' if 'at_least' in x else ''
      if 'limit' in x:
        bound = f'at most {x["limit"]:g}'
      value = f'{x["value"]:.3g}' if 'value' in x else ''
      verdict = {True: 'yes', False: '**no**', None: ''}[x.get('ok')]
      rows.append([x['what'], value, bound, verdict])
  head = ['1. Correctness', 'relative error or value', 'limit', 'ok']
  return [markdown.table(head, rows)] if rows else []


def _steps(results: list[Result]) -> list[Result]:
  """Returns all measured steps, ours and those of peers."""
  steps = []
  for x in results:
    if x['part'] == 2 and x['what'] == 'step':
      steps.append({**x, 'who': x['form']})
    elif x['what'] == 'timm' and x['status'] == 'measured':
      who = f'timm, {x["mode"]}, channels {x["layout"]}'
      steps.append({**x, 'who': who})
  return steps


def _fastest(
  steps: list[Result], model: str, who: str, largest: bool = False
) -> Result | None:
  """Returns the step with the most images per second."""
  candidates = [
    x
    for x in steps
    if (x['model'], x['largest']) == (model, largest)
    and x['who'].startswith(who)
  ]
  return max(candidates, key=lambda x: x['images_per_second'], default=None)


def _peak(results: list[Result]) -> float | None:
  peaks = [x['tflops'] for x in results if x['what'] == 'peak']
  return peaks[-1] if peaks else None


def _speed(results: list[Result]) -> list[str]:
  steps, peak = _steps(results), _peak(results)
  blocks = [f'A large bfloat16 product: {peak:.1f} TFLOP/s.'] if peak else []
  rows = []
  for x in sorted(steps, key=lambda x: (x['model'], x['largest'], x['batch'])):
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
        f'{x["tflops"] / peak:.1%}' if 'tflops' in x and peak else '',
        f'{x["memory"] / 2**30:.2f}' if x['memory'] else '',
        ratio,
      ]
    )
  if rows:
    head = ['2. A training step', 'batch', 'by', 'ms (5 rounds)', 'images/s']
    head += ['of that peak', 'GiB', 'ours ÷ it, by image']
    blocks.append(markdown.table(head, rows))
  absent = {
    x['message']
    for x in results
    if x['what'] == 'timm' and x['status'] == 'absent'
  }
  blocks += [f'timm: absent ({message}).' for message in sorted(absent)]
  blocks += [
    f'{x["model"]}: {x["count"]:.0f} kernels a step, {1e3 * x["seconds"]:.2f} '
    'ms in all.'
    for x in results
    if x['what'] == 'kernels'
  ]
  return blocks


def _effect(results: list[Result]) -> list[str]:
  runs = [x for x in results if x['part'] == 3 and x['what'] == 'run']
  if not runs:
    return []
  cells = {}
  for x in runs:
    text = x['message'] if x['top_1'] is None else f'{x["top_1"]:.2%}'
    if clipping := x['labels'].get('clipping'):
      text += f' (λ {clipping:g})'
    cells[x['labels']['net'], x['labels']['batch']] = text
  nets = dict.fromkeys(net for net, _ in cells)
  batches = sorted({batch for _, batch in cells})
  rows = [[net, *(cells.get((net, x), '') for x in batches)] for net in nets]
  epochs = ', '.join(f'{x:g}' for x in sorted({x['epochs'] for x in runs}))
  head = ['3. Test top-1, by batch', *batches]
  return [markdown.table(head, rows), f'One seed, {epochs} epochs.']


def _record(results: list[Result]) -> list[str]:
  lines = []
  for x in results:
    if x['part'] == 4 and x['what'] in _SPEEDS:
      lines.append(
        f'{_SPEEDS[x["what"]]} on CIFAR-10: {x["images_per_second"]:.0f} '
        'images/s.'
      )
    if x['part'] == 4 and x['what'] == 'cifar10':
      text = f'4. {x["data"]}, {x["epochs"]:g} epochs, {x["status"]}'
      if x['steps'] is not None:
        text += f', last loss {x["last_loss"]:.3g} at step {x["steps"]}'
      if x['top_1'] is not None:
        text += (
          f': {x["top_1"]:.2%} with the average, {x["weights_top_1"]:.2%} with '
          'the weights'
        )
      lines.append(f'{text}, {x["seconds"]:.0f} s.')
  return lines


def goals(results: list[Result]) -> list[str]:
  """Returns a line for each goal that says whether it is met."""
  steps, peak = _steps(results), _peak(results)
  # Goal, value, its format, and the range in which the goal is met.
  rows: list[tuple[str, float | None, str, tuple[float, float]]] = []
  for model, name in (('nfnet_f0', 'F0'), ('nfnet_f1', 'F1')):
    ours = [x for x in steps if x['model'] == model and x['who'] == 'ours']
    best = max((x['tflops'] for x in ours), default=None)
    rows += [
      (
        f'{name} step ÷ the fastest of timm, at most 0.8',
        _quotient(steps, (model, 'ours'), (model, 'timm')),
        '{:.3f}',
        (0.0, 0.8),
      ),
      (
        f'{name}, at least 40 % of the measured peak',
        best / peak if best is not None and peak else None,
        '{:.1%}',
        (0.4, math.inf),
      ),
    ]
  top_1 = {
    (x['labels']['net'], x['labels']['batch']): x['top_1']
    for x in results
    if x['part'] == 3 and x['what'] == 'run' and x['top_1'] is not None
  }
  large, small = top_1.get(('NF + AGC', 4096)), top_1.get(('BN', 256))
  cifar10 = [x['top_1'] for x in results if x['what'] == 'cifar10']
  rows += [
    (
      f'F1 at least {_B7_GOAL} times as fast as EfficientNet-B7',
      _quotient(steps, ('efficientnet_b7', 'ours'), ('nfnet_f1', 'ours')),
      '{:.2f}',
      (_B7_GOAL, math.inf),
    ),
    (
      'AGC at 4096 within a point of BN at 256',
      None if large is None or small is None else 100 * (small - large),
      '{:.2f} points below',
      (-math.inf, 1.0),
    ),
    (
      '96 % on CIFAR-10',
      max(filter(None, cifar10), default=None),
      '{:.2%}',
      (0.96, 1.0),
    ),
  ]
  lines = []
  for goal, value, shown, (low, high) in rows:
    verdict = 'not measured'
    if value is not None:
      met = 'met' if low <= value <= high else 'not met'
      verdict = f'{shown.format(value)}: {met}'
    lines.append(f'* {goal}: {verdict}.')
  return lines


def _quotient(
  steps: list[Result], above: tuple[str, str], below: tuple[str, str]
) -> float | None:
  """Divides the times of two steps, each of a model by someone."""
  a, b = _fastest(steps, *above), _fastest(steps, *below)
  return a['seconds'] / b['seconds'] if a and b else None


def _failed(results: list[Result]) -> list[str]:
  """Returns a line for each failed job without a later result."""
  lines = []
  for index, x in enumerate(results):
    later = {y.get('job') for y in results[index + 1 :]}
    if x['what'] == 'failed' and x['job'] not in later:
      lines.append(f'* part {x["part"]}, {x["job"]}: {x["message"]}')
  return lines


def page(results: list[Result]) -> str:
  """Formats results in Markdown."""
  failed = _failed(results)
  blocks = [
    '# On an accelerator',
    '\n'.join(_machine(results)),
    '\n'.join(goals(results)),
    *_checks(results),
    *_speed(results),
    *_effect(results),
    '\n'.join(_record(results)),
    *(['Failed or not run:', '\n'.join(failed)] if failed else []),
  ]
  return '\n\n'.join(filter(None, blocks)) + '\n'


def write(folder: pathlib.Path) -> None:
  """Writes `report.md` into a folder of results."""
  partial = folder / 'report.tmp'
  partial.write_text(page(common.read(folder / 'results.jsonl')))
  partial.replace(folder / 'report.md')


def main(argv: list[str] | None = None) -> None:
  """Prints the page of a file of results."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.gpu.report',
    description='Prints the report of a file of results.',
  )
  parser.add_argument('results', help='results.jsonl of `make gpu`')
  args = parser.parse_args(argv)
  with command_line.telling():
    print(page(common.read(paths.existing(args.results, 'results', 'file'))))


if __name__ == '__main__':
  main()
