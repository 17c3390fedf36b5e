r"""Runs all checks and measurements on an accelerator, most important first.

  python -m experiments.gpu.run --output=DIR            (or: make gpu)

Each of the four parts has a time limit:

1. correctness: golden values, a step compared with the CPU's, a training run
   killed and resumed (2.5 minutes);
2. speed of training steps, compared with the released formulation and timm (7
   minutes, with part 1);
3. the paper's main effect: batch sizes with and without AGC (4 minutes);
4. the best CIFAR-10 accuracy of an NFNet in the remaining time.

`results.jsonl`, `log.txt` and `report.md` in DIR are updated after each job, so
what was done is kept if the machine is lost. DIR also gets the kernels of F0's
and F1's steps with their times, their programs, and `cifar10.jsonl`. If a job
fails, the others go on, and the exit code is 1. With `GPU_DRY_RUN=1` everything
is tiny, for a CPU.

Nothing is downloaded. Where there is a network, `make gpu-pack` puts CIFAR-10
and the wheels that a machine with jax, torch and timm lacks into gpu-pack/.
They go on the path of the jobs and are not installed.

Where a command may take ten minutes at most, run two:

  python3 -m experiments.gpu.run --output=$OUT --scratch=/tmp/gpu \
    --parts=1,2 --seconds=440
  python3 -m experiments.gpu.run --output=$OUT --scratch=/tmp/gpu \
    --parts=3,4 --seconds=390
"""

import argparse
import math
import os
import re
import signal
import sys
import tempfile
import time

from experiments.gpu import common, machine, pack
from experiments.gpu.process import Job
from experiments.gpu.runner import Runner
from nfnets_jax import paths

LIMITS = {1: 150.0, 2: 420.0, 3: 240.0, 4: 600.0}
# Parts that run together: the second compiles in parallel with the first, and
# measures or trains after it.
_GROUPS = ((1, 2), (3, 4))
# How many jobs of part 2 compile at once; more would disturb each other's
# autotuning.
_COMPILING = 5
# Seconds for the final report.
_LAST = 5.0
# Most important first. Of part 2, those that compile longest are first, then
# what the goals need.
_JOBS: dict[int, tuple[str, ...]] = {
  1: (
    'right agc',
    'right f0 float32',
    'right f0 bfloat16',
    'right step float32',
    'right step bfloat16',
    'right digits',
    'right net nf_resnet50',
    'right net resnet50',
    'right net nf_regnet_b0',
  ),
  2: (
    'speed efficientnet_b7 32 ours',
    'speed nfnet_f1 32 ours',
    'peer nfnet_f1 compiled',
    'speed nfnet_f0 32 ours',
    'speed peak',
    'peer nfnet_f0 compiled',
    'peer nfnet_f0 eager',
    'peer nfnet_f1 eager',
    'speed nfnet_f0 largest ours',
    'speed nfnet_f0 32 released',
    'peer nfnet_f0 largest',
    'speed nf_resnet50 32 ours',
    'speed resnet50 32 ours',
    'peer nf_resnet50 eager',
    'peer resnet50 eager',
    'speed nfnet_f1 largest ours',
    'speed nfnet_f1 32 released',
    'peer nfnet_f1 largest',
  ),
  3: tuple(f'effect {number}' for number in range(9)),
  4: ('record',),
}
# Jobs of a dry run; the others run the same code.
_DRY_RUN = re.compile(
  'right (agc|f0 float32|step bfloat16|digits|net nf_resnet50)'
  '|(speed|peer) (peak|nfnet_f0 .*)|effect [01]|record'
)


def jobs(part: int) -> list[Job]:
  """Returns the jobs of a part, most important first."""
  names, limit = _JOBS[part], LIMITS[part]
  if common.dry_run():
    names, limit = tuple(filter(_DRY_RUN.fullmatch, names)), math.inf
  measures = part in (2, 4)
  return [
    Job(part, tuple(name.split()), measures, limit, tuned=measures)
    for name in names
  ]


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.gpu.run',
    description='Runs all checks and measurements on an accelerator.',
  )
  parser.add_argument(
    '--output',
    default=os.environ.get('GPU_OUTPUT') or 'runs/gpu',
    help='folder of the results (default: $GPU_OUTPUT or runs/gpu)',
  )
  parser.add_argument(
    '--scratch',
    default=os.environ.get('GPU_SCRATCH') or None,
    help='folder of runs and compiled programs (default: a temporary one)',
  )
  parser.add_argument(
    '--parts', default='1,2,3,4', help='as in 1,2 (default: all)'
  )
  parser.add_argument(
    '--seconds',
    type=float,
    default=870.0,
    help='time limit of all parts (default: %(default)g)',
  )
  parser.add_argument('--pack', help='folder of the pack (default: gpu-pack)')
  parser.add_argument('--data_dir', help="folder of TFDS's data sets")
  parser.add_argument('--data_name', help='name of CIFAR-10 there')
  args = parser.parse_args(argv)
  try:
    args.parts = sorted({int(x) for x in args.parts.split(',')})
    if not set(args.parts) <= set(LIMITS):
      raise ValueError(args.parts)
  except ValueError:
    parser.error(f'--parts={args.parts}: give some of 1,2,3,4')
  return args


def main(argv: list[str] | None = None) -> None:
  """Runs the parts and prints what failed."""
  began = time.time()
  args = parse(sys.argv[1:] if argv is None else argv)
  # As for an interrupt, so that no job outlives this command.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  output = paths.local_literal(args.output, '--output')
  output.mkdir(parents=True, exist_ok=True)
  scratch = args.scratch or tempfile.mkdtemp(prefix='nfnets-gpu-')
  settings = {
    'GPU_OUTPUT': str(output),
    'GPU_SCRATCH': str(paths.local_literal(scratch, '--scratch')),
    'GPU_PACK': args.pack,
    'GPU_DATA_DIR': args.data_dir,
    'GPU_DATA_NAME': args.data_name,
  }
  os.environ.update({k: v for k, v in settings.items() if v})
  common.scratch().mkdir(parents=True, exist_ok=True)
  site = pack.install()
  if not machine.record(site) and not common.dry_run():
    sys.exit(
      'error: jax finds no accelerator; GPU_DRY_RUN=1 makes a dry run on a CPU'
    )
  pack.unpack_data()
  runner = Runner(site)
  end = began + args.seconds - _LAST
  cores = max(2, len(os.sched_getaffinity(0)))
  for group in _GROUPS:
    chosen = [job for part in group if part in args.parts for job in jobs(part)]
    if chosen:
      runner.run(chosen, cores, min(_COMPILING, cores), end)
  log = runner.log
  log.update_report()
  log.info((output / 'report.md').read_text())
  log.info(f'{time.time() - began:.0f} s in all; results in {output}')
  wrong = [
    x['what']
    for x in common.read(output / 'results.jsonl')
    if x.get('ok') is False
  ]
  for text in [*log.failed, *(f'check failed: {x}' for x in wrong)]:
    log.info(f'error: {text}')
  if log.failed or wrong:
    sys.exit(1)


if __name__ == '__main__':
  main()
