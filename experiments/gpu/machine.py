"""Records the accelerator of the machine and the versions of packages.

The standard library alone, as `run` imports it before packages are installed.
"""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys

from experiments.gpu import common

_PACKAGES = ('jax', 'jaxlib', 'numpy', 'dm-haiku', 'torch', 'timm')


def record(site: pathlib.Path | None) -> bool:
  """Records the machine, and returns whether it has an accelerator.

  Args:
    site: folder of unpacked wheels, if any.
  """
  code = (
    'import jax; x = jax.local_devices(); '
    'print(x[0].platform, len(x), x[0].device_kind, sep="\\n")'
  )
  environment = {**os.environ, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
  if common.dry_run():
    environment['JAX_PLATFORMS'] = 'cpu'
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    env=environment,
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
  """Returns the versions of packages, first looked for in `site`."""
  path = [str(site or ''), *sys.path]
  found = {}
  for name in _PACKAGES:
    installed = importlib.metadata.distributions(name=name, path=path)
    found[name] = next((x.version for x in installed), None)
  return found


def _nvidia_smi() -> str | None:
  fields = 'name,driver_version,memory.total,power.limit'
  command = ['nvidia-smi', f'--query-gpu={fields}', '--format=csv,noheader']
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
  except (OSError, subprocess.TimeoutExpired):
    return None  # no NVIDIA GPU
  return done.stdout.strip() or None
