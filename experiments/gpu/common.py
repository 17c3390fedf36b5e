"""Settings of the jobs of `run`, from its environment, and their results.

The standard library alone, as `run` imports it before packages are installed.
"""

import json
import os
import pathlib
import sys
import time
from typing import Any

from nfnets_jax import paths


def dry_run() -> bool:
  """Returns whether to try everything in tiny sizes on a CPU."""
  return os.environ.get('GPU_DRY_RUN', '') not in ('', '0')


def output() -> pathlib.Path:
  """Returns the folder of the results, a few small files."""
  return paths.from_environment('GPU_OUTPUT', 'runs/gpu')


def scratch() -> pathlib.Path:
  """Returns the folder of runs, compiled programs and installed wheels."""
  return paths.from_environment('GPU_SCRATCH', output() / 'scratch')


def pack() -> pathlib.Path:
  """Returns the folder of wheels and data made by `pack`."""
  return paths.from_environment('GPU_PACK', 'gpu-pack')


def seconds_left() -> float:
  """Returns the seconds until this job is stopped."""
  return float(os.environ['GPU_DEADLINE']) - time.time()


def wait_for_turn() -> None:
  """Waits until this job has the device to itself, to measure."""
  print('ready', flush=True)
  if not sys.stdin.readline():
    sys.exit('standard input ended before the turn of this job')


def end_turn() -> None:
  """Leaves the device to the next job; what follows is not measured."""
  print('measured', flush=True)


def add(part: int, what: str, **values: Any) -> None:
  """Appends a result to `results.jsonl`, and waits until it is on disk.

  It has the name of this job, too, if `run` started it.

  Args:
    part: 1 to 4, or 0 for the machine.
    what: name of the measurement.
    **values: JSON values.
  """
  name = os.environ.get('GPU_JOB')
  job = {'job': name} if name else {}
  line = json.dumps({'part': part, 'what': what, **job, **values})
  with (output() / 'results.jsonl').open('a') as file:
    file.write(f'{line}\n')  # in one write, as several jobs append
    file.flush()
    os.fsync(file.fileno())
  print(line, flush=True)


def check(part: int, what: str, value: float, limit: float) -> None:
  """Records a value, and whether it is within the limit; NaN is not."""
  add(part, what, value=value, limit=limit, ok=bool(value <= limit))


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns all results of a file; skips truncated lines."""
  results = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      results.append(json.loads(line))
    except json.JSONDecodeError:
      continue  # the machine was taken away while it was written
  return results


def data_set() -> tuple[str, pathlib.Path]:
  """Returns the name of the CIFAR-10 data set, and the folder it is in."""
  name = os.environ.get('GPU_DATA_NAME') or 'cifar10_jpeg'
  return name, paths.from_environment('GPU_DATA_DIR', scratch() / 'tfds')
