"""Results on disk: one JSON object per line, one file per machine."""

import datetime
import functools
import hashlib
import json
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax

# What was written down before claims were run; see protocol.py.
PREREGISTERED = pathlib.Path(__file__).parent / 'preregistered'

# By name of the run.
Results = Mapping[str, Mapping[str, Any]]


def read(output: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns the results in a folder, by name; the last of a name counts.

  An incomplete last line, left by a killed process, is skipped.

  Raises:
    ValueError: if any other line is not JSON.
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
        raise ValueError(f'{path}:{number} is not JSON: {error}') from error
      results[result['name']] = result
  return results


def append(path: pathlib.Path, result: Mapping[str, Any]) -> None:
  """Appends a result, `machine` and `digests` to a file, in one write.

  Removes an incomplete last line, left by a killed process.
  """
  if path.exists():
    whole = path.read_bytes().rpartition(b'\n')
    if whole[2]:
      os.truncate(path, len(whole[0] + whole[1]))
  with path.open('a') as file:
    line = {**result, **machine(), 'preregistered': digests()}
    file.write(f'{json.dumps(line)}\n')


@functools.cache
def digests() -> dict[str, str]:
  """Returns 12 hexadecimal digits of the text of each claim."""
  return {
    path.stem: hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    for path in sorted(PREREGISTERED.glob('*.md'))
  }


def machine() -> dict[str, Any]:
  """Returns the hardware, versions and date that a result depends on."""
  return {
    'device': f'{jax.device_count()} × {jax.devices()[0].device_kind}',
    'cores': os.cpu_count(),
    'jax': jax.__version__,
    'python': platform.python_version(),
    'date': datetime.date.today().isoformat(),
  }
