"""What the jobs of `run` share: settings, their turn to measure, results.

The standard library alone, as `run` imports it before packages are installed.
"""

import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from nfnets_jax import paths

_ROUNDS = 5
# Minimum length of a round.
_SECONDS = 0.3


def dry_run() -> bool:
  """Returns whether to run everything in tiny sizes on a CPU."""
  return os.environ.get('GPU_DRY_RUN', '') not in ('', '0')


def output() -> pathlib.Path:
  """Returns the folder of the results."""
  return paths.from_environment('GPU_OUTPUT', 'runs/gpu')


def scratch() -> pathlib.Path:
  """Returns the folder of runs, compiled programs and unpacked wheels."""
  return paths.from_environment('GPU_SCRATCH', output() / 'scratch')


def pack() -> pathlib.Path:
  """Returns the folder of wheels and data made by `pack`."""
  return paths.from_environment('GPU_PACK', 'gpu-pack')


def seconds_left() -> float:
  """Returns the seconds until this job is stopped."""
  return float(os.environ['GPU_DEADLINE']) - time.time()


def wait_for_turn() -> None:
  """Waits until this job has the device to itself."""
  print('ready', flush=True)
  if not sys.stdin.readline():
    sys.exit('standard input ended before this job could measure')


def end_turn() -> None:
  """Frees the device for the next job."""
  print('measured', flush=True)


def measure_steps(run: Callable[[int], float]) -> dict[str, Any]:
  """Times training steps in several rounds.

  Args:
    run: runs a number of steps and returns the seconds of one.

  Returns:
    `seconds` of a step, the median of its `rounds`.
  """
  count = max(1, round(_SECONDS / run(1)))
  rounds = [run(count) for _ in range(_ROUNDS)]
  return {'seconds': statistics.median(rounds), 'rounds': rounds}


def add(part: int, what: str, **values: Any) -> None:
  """Appends a result to `results.jsonl` and syncs it to disk.

  The result has the name of this job, if `run` started it.

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
  """Records a value, and whether it is at most the limit; NaN is not."""
  add(part, what, value=value, limit=limit, ok=bool(value <= limit))


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the results in a file, without truncated lines."""
  results = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      results.append(json.loads(line))
    except json.JSONDecodeError:
      continue  # the machine was lost during the write
  return results


def data_set() -> tuple[str, pathlib.Path]:
  """Returns the name of the CIFAR-10 data set and its folder."""
  name = os.environ.get('GPU_DATA_NAME') or 'cifar10'
  return name, paths.from_environment('GPU_DATA_DIR', scratch() / 'tfds')
