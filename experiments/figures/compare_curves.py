"""Plots the curves of several runs.

python -m experiments.figures.compare_curves --output=curves.png NAME=WORKDIR …
"""

import argparse
import pathlib

import matplotlib.figure

from nfnets_jax import paths
from nfnets_jax.runtime import logbook


def draw(runs: dict[str, pathlib.Path], output: pathlib.Path) -> None:
  """Plots training loss and test accuracy against steps.

  Args:
    runs: work directories by label.
    output: a PNG file.

  Raises:
    ValueError: if a work directory has no evaluated run.
  """
  figure = matplotlib.figure.Figure(figsize=(9, 3.5), layout='constrained')
  loss, accuracy = figure.subplots(1, 2)
  for name, workdir in runs.items():
    lines = logbook.read(workdir)
    train = [x for x in lines if x['split'] == 'train']
    test = [x for x in lines if x['split'] == 'test']
    if not train or not test:
      raise ValueError(f'there is no evaluated run in {workdir}; train first')
    loss.plot([x['step'] for x in train], [x['loss'] for x in train])
    top_1 = [100 * x['eval_top_1'] for x in test]
    accuracy.plot([x['step'] for x in test], top_1, marker='o', label=name)
  loss.set(title='training loss', xlabel='step', ylabel='nats')
  accuracy.set(title='test top-1', xlabel='step', ylabel='%')
  accuracy.legend()
  for axes in (loss, accuracy):
    axes.grid(alpha=0.3)
  output.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(output, dpi=80)


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='python -m experiments.figures.compare_curves',
    description='Compares the curves of runs.',
  )
  parser.add_argument('--output', type=paths.argument, default='curves.png')
  parser.add_argument('runs', nargs='+', metavar='NAME=WORKDIR')
  args = parser.parse_args()
  runs = {}
  try:
    for run in args.runs:
      name, _, workdir = run.partition('=')
      if not workdir:
        parser.error(f'{run!r} is not of the form NAME=WORKDIR')
      runs[name] = paths.expand(workdir, name)
    draw(runs, args.output)
  except ValueError as error:
    parser.error(str(error))
  print(args.output)


if __name__ == '__main__':
  main()
