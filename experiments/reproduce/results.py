"""What was run: a JSON object a line, in one file or one for each machine."""

import datetime
import json
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax

# By the name of the run.
Results = Mapping[str, Mapping[str, Any]]


def read(output: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns what has been run, by name; the newest counts.

  Args:
    output: folder of the results.

  Returns:
    The results; none if there is no file.

  Raises:
    ValueError: if a line is damaged, other than the last of a file: that may be
      what a killed process left, and its run is made again.
  """
  results: dict[str, dict[str, Any]] = {}
  for path in sorted(output.glob('results*.jsonl')):
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
      try:
        result = json.loads(line)
      except json.JSONDecodeError as error:
        if number == len(lines):
          continue
        raise ValueError(f'{path}:{number} is no JSON: {error}') from error
      results[result['name']] = result
  return results


def append(path: pathlib.Path, result: Mapping[str, Any]) -> None:
  """Adds a result to a file, in one write.

  Args:
    path: of the file; made if it is not there.
    result: with `name`; what `machine` tells is added.
  """
  if path.exists():
    # What a killed process has left of its line is no result.
    whole = path.read_bytes().rpartition(b'\n')
    if whole[2]:
      os.truncate(path, len(whole[0] + whole[1]))
  with path.open('a') as file:
    file.write(f'{json.dumps({**result, **machine()})}\n')


def machine() -> dict[str, Any]:
  """Returns what a result was made with."""
  return {
    'device': f'{jax.device_count()} × {jax.devices()[0].device_kind}',
    'cores': os.cpu_count(),
    'jax': jax.__version__,
    'python': platform.python_version(),
    'date': datetime.date.today().isoformat(),
  }
