r"""Runs the trainings of one claim of the paper, or of all.

  python -m experiments.reproduce.sweep --row=batch-size --scale=small \
    --output=runs/reproduce --data_name=cifar10 --data_dir=DIR

Finished runs are skipped and interrupted ones resumed, also those that another
claim shares. Results go to `results*.jsonl`, one JSON object per run. With
`--slice=2/4` a machine makes its quarter and writes a file of its own to the
same folder.

On CPU there are as many runs at a time as cores, each on a core of its own:
small nets gain little from a second one.

`--rehearse` makes every run with a few images of one epoch: minutes for all
claims, into a folder of its own.
"""

import argparse
import os
import pathlib
import sys
from typing import Any

import jax

from experiments.reproduce import claim, results, runner, scales
from experiments.reproduce.claims import CLAIMS, latency
from nfnets_jax import devices, paths
from nfnets_jax.data import datasets
from nfnets_jax.runtime import interrupt


def _slice(text: str) -> tuple[int, int]:
  number, _, count = text.partition('/')
  if not (number.isdigit() and count.isdigit()) or not (
    1 <= int(number) <= int(count)
  ):
    raise argparse.ArgumentTypeError(
      f"'{text}' is not a slice, such as 1/4 to 4/4"
    )
  return int(number), int(count)


def _parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog='python -m experiments.reproduce.sweep',
    description="Run the paper's claims.",
  )
  parser.add_argument(
    '--row', choices=['all', *CLAIMS, 'latency'], default='all'
  )
  parser.add_argument('--scale', choices=scales.SCALES, default='small')
  parser.add_argument(
    '--output',
    type=paths.literal_argument,
    default=pathlib.Path('runs/reproduce'),
  )
  parser.add_argument(
    '--data_dir', type=paths.literal_argument, help='folder of TFDS data sets'
  )
  parser.add_argument(
    '--data_name',
    help='name of CIFAR-10 there; at paper of what stands in for JFT-300M, '
    'where folder:DIR is a folder of photographs',
  )
  parser.add_argument(
    '--latency_steps',
    type=int,
    help='timed steps of a net; default: 100 at gpu, 5,000 at paper',
  )
  parser.add_argument('--num_workers', type=int, help='workers that decode')
  parser.add_argument(
    '--jobs', type=int, help='runs at a time; default: the cores on CPU, else 1'
  )
  parser.add_argument(
    '--slice', type=_slice, default=(1, 1), help='1/4 is the first quarter'
  )
  parser.add_argument(
    '--minutes',
    type=float,
    help='start no run of a claim after so many; the same command resumes',
  )
  parser.add_argument(
    '--rehearse', action='store_true', help='make tiny runs, not results'
  )
  parser.add_argument(
    '--list', action='store_true', help='list the runs and exit'
  )
  return parser.parse_args(argv)


def _print_runs(names: list[str], scale: str, output: pathlib.Path) -> None:
  made = results.read(output)
  for name in names:
    if name in CLAIMS:
      for run in CLAIMS[name].runs(scale, made):
        done = claim.find(run, made) is not None
        print(run.name, 'done' if done else 'to make')


def _execute(
  names: list[str], args: argparse.Namespace, sweep: runner.Runner
) -> int:
  """Returns the number of runs left to other slices."""
  left = 0
  with interrupt.exiting(), sweep.alone():
    try:
      for name in names:
        if name != 'latency':
          left += sweep.execute(CLAIMS[name], args.scale)
        elif args.slice[0] == 1:
          if args.rehearse:
            print('latency has no rehearsal')
          else:
            latency.execute(args.output, args.scale, steps=args.latency_steps)
    except KeyboardInterrupt as error:  # the workers have saved their runs
      raise interrupt.StoppedError(
        'stopped; the same command resumes'
      ) from error
  return left


def main(argv: list[str] | None = None) -> None:
  """Runs the sweep that the command line, or `argv`, asks for."""
  args = _parse(argv)
  names = [*CLAIMS, 'latency'] if args.row == 'all' else [args.row]
  fields: dict[str, Any] = {
    'name': args.data_name,
    'data_dir': args.data_dir and str(args.data_dir.absolute()),
    'num_workers': args.num_workers,
  }
  data = {key: value for key, value in fields.items() if value is not None}
  devices.start_or_exit()
  jobs = args.jobs
  if jobs is None:
    on_cpu = jax.default_backend() == 'cpu'
    jobs = len(os.sched_getaffinity(0)) if on_cpu else 1
  if args.list:
    _print_runs(names, args.scale, args.output)
    return
  if args.scale != 'paper' and names != ['latency']:
    name = args.data_name or runner.CIFAR10
    try:
      datasets.load(name, 'train', data.get('data_dir'))
    except (OSError, ValueError) as error:
      sys.exit(f'error: {error}')
  runner.start()
  try:
    sweep = runner.Runner(
      args.output, data, args.slice, jobs, args.minutes, args.rehearse
    )
  except ValueError as error:
    sys.exit(f'error: {error}')
  left = _execute(names, args, sweep)
  if left:
    print(
      f'{left} runs are left; repeat this command, after other slices if there '
      'are any, as more runs may depend on them'
    )
  if sweep.refused:
    reasons = [f'{name}: {why}' for name, why in sweep.refused.items()]
    sys.exit(
      '\n  '.join(['error: these runs cannot be made here:', *reasons])
      + '\nlog.txt has the errors; `make report` draws the other runs'
    )
  if left:
    sys.exit(3)


if __name__ == '__main__':
  main()
