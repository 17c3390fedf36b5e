"""What the jobs of `run` are told, and where they write.

The standard library alone: `run` uses it before the packages are installed.
"""

import json
import os
import pathlib
import time
from typing import Any

from nfnets_jax import paths


def dry_run() -> bool:
  """Whether sizes are tiny, to try everything on a CPU."""
  return os.environ.get('GPU_DRY_RUN', '') not in ('', '0')


def output() -> pathlib.Path:
  """The folder of the results: few files, small enough to carry home."""
  return paths.from_environment('GPU_OUTPUT', 'runs/gpu')


def scratch() -> pathlib.Path:
  """The folder of runs, compiled programs and installed wheels."""
  return paths.from_environment('GPU_SCRATCH', output() / 'scratch')


def pack() -> pathlib.Path:
  """The folder of wheels and data that `pack` gathers."""
  return paths.from_environment('GPU_PACK', 'gpu-pack')


def seconds_left() -> float:
  """Seconds until this job is stopped."""
  return float(os.environ['GPU_DEADLINE']) - time.time()


def add(part: int, what: str, **values: Any) -> None:
  """Appends a result to `results.jsonl`, on disk before this returns.

  Args:
    part: 1 to 4; 0 for the machine.
    what: was measured.
    **values: JSON values.
  """
  line = json.dumps({'part': part, 'what': what, **values})
  with (output() / 'results.jsonl').open('a') as file:
    file.write(f'{line}\n')  # one write: several jobs append
    file.flush()
    os.fsync(file.fileno())
  print(line, flush=True)


def check(part: int, what: str, value: float, limit: float) -> None:
  """Records a value that must not be above a limit; NaN is."""
  add(part, what, value=value, limit=limit, ok=bool(value <= limit))


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Returns all results of a folder; a line that was cut off is skipped."""
  path = folder / 'results.jsonl'
  found = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      found.append(json.loads(line))
    except json.JSONDecodeError:
      continue  # the machine was taken away in the middle of it
  return found


def data_set() -> tuple[str, pathlib.Path]:
  """What CIFAR-10 is called, and the folder of data sets that it is in."""
  name = os.environ.get('GPU_DATA_NAME') or 'cifar10_jpeg'
  return name, paths.from_environment('GPU_DATA_DIR', scratch() / 'tfds')
