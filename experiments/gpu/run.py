r"""Checks and measures everything on an accelerator, most important first.

  python -m experiments.gpu.run --output=DIR            (or: make gpu)

Four parts, each with a time limit; `--parts` chooses some, and `--seconds` is
the limit of all:

1. correctness: golden values, a step beside the CPU's, a training run killed
   and resumed (2.5 minutes);
2. speed of training steps beside the released formulation and timm (7 minutes,
   with part 1);
3. the paper's main effect: batch sizes with and without AGC (4 minutes);
4. the best CIFAR-10 accuracy of an NFNet in the remaining time.

DIR gets `results.jsonl`, `log.txt` and `report.md`, updated after each job, so
if the machine is taken away, what was done remains; the kernels of F0's and
F1's steps with their time, and their programs; and `cifar10.jsonl`. A failed
job does not stop the others; the exit code is 1. `GPU_DRY_RUN=1` makes
everything tiny, for a CPU.

Nothing is downloaded. On a machine with a network, `make gpu-pack` gathers
CIFAR-10 and the wheels that a machine with jax, torch and timm lacks in the
folder gpu-pack/. They are put on the path of the jobs, not installed into their
Python.

On a machine with commands of ten minutes at most, which carries that folder
along and returns the folder $OUT, run two commands:

  python3 -m experiments.gpu.run --output=$OUT --scratch=/tmp/gpu \
    --parts=1,2 --seconds=440
  python3 -m experiments.gpu.run --output=$OUT --scratch=/tmp/gpu \
    --parts=3,4 --seconds=390
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

from experiments.gpu import common
from experiments.gpu.process import Job
from experiments.gpu.runner import Runner
from nfnets_jax import paths

LIMITS = {1: 150.0, 2: 420.0, 3: 240.0, 4: 600.0}
# Parts that run together: the second compiles beside the first, and measures or
# trains after it.
_GROUPS = ((1, 2), (3, 4))
# Jobs that compile at once in part 2. More of them would disturb each other's
# autotuning.
_COMPILING = 5
# Seconds for the report at the end.
_LAST = 5.0
# Modules that a bare machine may lack.
_PACKAGES = (
  'haiku',
  'jmp',
  'ml_collections',
  'grain',
  'array_record',
  'tensorflow_datasets',
  'simplejpeg',
  'tensorboardX',
  'importlib_resources',
  'tree',
  'immutabledict',
  'promise',
  'simple_parsing',
  'tensorflow_metadata',
  'termcolor',
  'toml',
)
_VERSIONS = ('jax', 'jaxlib', 'numpy', 'dm-haiku', 'torch', 'timm')


def jobs(part: int) -> list[Job]:
  """Returns the jobs of a part, most important first.

  Of part 2, those that compile longest are first, then what the goals need.
  """
  limit = 900.0 if common.dry_run() else LIMITS[part]
  if part == 1:
    words = [
      'agc',
      'f0 float32',
      'f0 bfloat16',
      'step float32',
      'step bfloat16',
      'digits',
      'net nf_resnet50',
      'net resnet50',
      'net nf_regnet_b0',
    ]
    if common.dry_run():  # the others run the same code
      words = words[:2] + words[4:7]
    return [
      Job(part, ('right', *x.split()), limit=limit, tuned=False) for x in words
    ]
  if part == 2:
    words = [
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
    ]
    if common.dry_run():  # the other nets run the same code
      words = [x for x in words if x.split()[1] in ('peak', 'nfnet_f0')]
    return [Job(part, tuple(x.split()), True, limit) for x in words]
  if part == 3:
    count = 2 if common.dry_run() else 9
    return [
      Job(part, ('effect', str(i)), limit=limit, tuned=False)
      for i in range(count)
    ]
  return [Job(part, ('record',), True, limit)]


def install_pack(python: str) -> pathlib.Path | None:
  """Unpacks the wheels of the pack if packages are missing.

  Returns:
    The folder to put on the path; None if nothing is missing.

  Raises:
    SystemExit: if packages are missing and there is no pack.
  """
  missing = [x for x in _PACKAGES if importlib.util.find_spec(x) is None]
  if not missing:
    return None
  wheels = sorted(map(str, (common.pack() / 'wheels').glob('*.whl')))
  if not wheels:
    sys.exit(
      f'error: {python} lacks {", ".join(missing)}, and there are no wheels in '
      f'{common.pack()}/wheels; run make gpu-pack where there is a network, or '
      'make install and give GPU_PYTHON=.venv/bin/python'
    )
  site = common.scratch().absolute() / 'site'
  if site.exists():  # from an earlier command
    return site
  partial = site.with_name('site-partial')
  flags = (
    '--quiet --no-index --no-deps --no-compile --no-cache-dir '
    '--disable-pip-version-check --upgrade --target'
  )
  subprocess.run(
    [python, '-m', 'pip', 'install', *flags.split(), str(partial), *wheels],
    check=True,
  )
  partial.rename(site)
  return site


def unpack_data() -> None:
  """Unpacks the data set of the pack, if there is one."""
  name, folder = common.data_set()
  archive = common.pack() / f'{name}.tar.gz'
  if archive.exists() and not (folder / name).exists():
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as opened:
      opened.extractall(folder, filter='data')


def describe(python: str, site: pathlib.Path | None) -> bool:
  """Records the machine; returns whether it has an accelerator.

  Args:
    python: the interpreter of the jobs.
    site: folder of packages installed from wheels, if any.
  """
  code = (
    'import jax; x = jax.local_devices(); '
    'print(x[0].platform, len(x), x[0].device_kind, sep="\\n")'
  )
  environment = {**os.environ, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
  if common.dry_run():
    environment['JAX_PLATFORMS'] = 'cpu'
  done = subprocess.run(
    [python, '-c', code], capture_output=True, text=True, env=environment
  )
  if done.returncode:
    sys.exit(f'error: jax finds no device: {done.stderr.strip()[-500:]}')
  where, count, kind = done.stdout.splitlines()[-3:]
  common.add(
    0,
    'machine',
    platform=where,
    devices=int(count),
    device=kind,
    nvidia_smi=_nvidia_smi(),
    cores=len(os.sched_getaffinity(0)),
    versions=versions(site),
    python=platform.python_version(),
    dry_run=common.dry_run(),
    date=datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  )
  return where != 'cpu'


def versions(site: pathlib.Path | None) -> dict[str, str | None]:
  """Returns versions of packages, those in `site` before the machine's."""
  path = [str(site or ''), *sys.path]
  return {
    name: next(
      (
        found.version
        for found in importlib.metadata.distributions(name=name, path=path)
      ),
      None,
    )
    for name in _VERSIONS
  }


def _nvidia_smi() -> str | None:
  fields = 'name,driver_version,memory.total,power.limit'
  command = ['nvidia-smi', f'--query-gpu={fields}', '--format=csv,noheader']
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
  except (OSError, subprocess.TimeoutExpired):
    return None  # no NVIDIA GPU
  return done.stdout.strip() or None


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.gpu.run',
    description='Checks and measures everything on an accelerator.',
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
  parser.add_argument('--parts', default='1,2,3,4', help='such as 1,2')
  parser.add_argument(
    '--seconds', type=float, default=870.0, help='limit of all parts'
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
  # As an interrupt, so that no job outlives this command.
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
  site = install_pack(sys.executable)
  if not describe(sys.executable, site) and not common.dry_run():
    sys.exit(
      'error: jax finds no accelerator here; GPU_DRY_RUN=1 tries it on a CPU'
    )
  unpack_data()
  runner = Runner(sys.executable, site)
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
