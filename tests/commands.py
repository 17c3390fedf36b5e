"""Commands of the repository, run from its root as processes of their own.

They have the eight devices and the fast compilation of the tests.
"""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def run(
  module: str, *arguments: object, timeout: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
  """Runs `python -m MODULE ARGUMENTS`, with additional environment variables.

  Returns:
    The exit code, and what was printed.
  """
  return subprocess.run(
    [sys.executable, '-m', module, *map(str, arguments)],
    cwd=ROOT,
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    timeout=timeout,
  )


def output(module: str, *arguments: object) -> str:
  """Returns the standard output of a command, which must succeed."""
  done = run(module, *arguments)
  assert done.returncode == 0, done.stderr
  return done.stdout
