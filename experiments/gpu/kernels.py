"""Times of the kernels of a training step, from a profile."""

import gzip
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from experiments.gpu import common

_STEPS = 3


def profile(run: Callable[[int], float], model: str) -> pathlib.Path:
  """Profiles a few steps and returns the folder of the profile.

  Args:
    run: runs a number of steps.
    model: name of the net.
  """
  folder = common.scratch() / f'profile-{model}'
  with jax.profiler.trace(str(folder)):
    run(_STEPS)
  return folder


def record(folder: pathlib.Path, compiled: Any, model: str) -> None:
  """Writes the kernels of a profile and the compiled program.

  `kernels-MODEL.json` has a row `[kernel, HLO instruction, microseconds a step,
  launches a step]` for each, longest first. `hlo-MODEL.txt.gz` has the program.

  Args:
    folder: from `profile`.
    compiled: the compiled step.
    model: name of the net.
  """
  totals: dict[tuple[str, str], list[float]] = {}
  for path in folder.rglob('*.xplane.pb'):
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
      if not plane.name.startswith('/device:'):
        continue
      for line in plane.lines:
        if not line.name.startswith('Stream'):  # others repeat them
          continue
        for event in line.events:
          stats = dict(event.stats)
          total = totals.setdefault(
            (event.name, str(stats.get('hlo_op', ''))), [0.0, 0.0]
          )
          total[0] += event.duration_ns / 1e3 / _STEPS
          total[1] += 1 / _STEPS
  rows: list[list[Any]] = [
    [kernel, instruction, round(microseconds, 2), round(launches, 2)]
    for (kernel, instruction), (microseconds, launches) in totals.items()
  ]
  rows.sort(key=lambda row: -row[2])
  (common.output() / f'kernels-{model}.json').write_text(
    json.dumps(rows, indent=0)
  )
  with gzip.open(common.output() / f'hlo-{model}.txt.gz', 'wt') as file:
    file.write(compiled.as_text())
  common.add(
    2,
    'kernels',
    model=model,
    count=sum(row[3] for row in rows),
    seconds=sum(row[2] for row in rows) / 1e6,
  )
