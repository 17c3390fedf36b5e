"""Starts jax on the platform chosen by the environment.

If a platform is missing, jax raises a bare assertion or a long traceback, so
every command starts jax through this module. It also returns the memory of a
device.
"""

import os
import pathlib
import re
import sys
from collections.abc import Iterator

import jax

# The pip extra of each platform.
_EXTRAS = {
  'cuda': 'jax[cuda13]',
  'gpu': 'jax[cuda13]',
  'rocm': 'jax[rocm7-local]',
  'tpu': 'jax[tpu]',
}


def start() -> None:
  """Starts jax on the platforms that the environment selects.

  With several processes, join the others first; see `runtime.processes`.

  Raises:
    ValueError: if a platform of `$JAX_PLATFORMS` is missing, or jax's own
      choice fails; the message names the variable and the remedy.

  Example:
    >>> start()
  """
  # jax would look for platforms named ' ' or 'CPU'.
  names = (name.strip().lower() for name in (_chosen() or '').split(','))
  text = ','.join(filter(None, names))
  if text != (_chosen() or ''):
    jax.config.update('jax_platforms', text or None)
  # Without a GPU, jax silently skips cuda in 'cuda,cpu'.
  for platform in text.split(',') if text else [None]:
    try:
      jax.devices(platform)
    except (AssertionError, RuntimeError) as error:
      raise ValueError(_explain(platform, text, str(error))) from error


def start_or_exit() -> None:
  """Calls `start`, but prints the error and exits with code 1."""
  try:
    start()
  except ValueError as error:
    sys.exit(f'error: {error}')


def _explain(platform: str | None, text: str, reason: str) -> str:
  # jax starts all platforms even if asked for one.
  backend = re.search(r"backend '([^']*)'", reason)
  if backend and backend[1] in text.split(','):
    platform = backend[1]
  # The rest of jax's message is advice that is repeated below.
  reason = reason.partition(' (set JAX_PLATFORMS')[0].partition('\n')[0]
  name = 'JAX_PLATFORMS'
  if platform is None:
    name = 'JAX_PLATFORM_NAME'
    platform = text = os.environ.get(name, '')
  if not text:
    return f'jax does not start; JAX_PLATFORMS=cpu runs on the CPU\n{reason}'
  extra = _EXTRAS.get(platform)
  install = f"its support comes with: pip install '{extra}'; or " * bool(extra)
  return (
    f'{name}={text}, but jax finds no {platform!r} device here, only '
    f'{" and ".join(_available())}; {install}unset {name} to use those'
    + (f'\n{reason}' if reason else '')
  )


def _chosen() -> str | None:
  name = 'jax_platforms'  # missing from the types of some versions of jax
  return getattr(jax.config, name)


def _available() -> list[str]:
  """Returns the platforms that jax detects."""
  before = _chosen()
  jax.config.update('jax_platforms', None)
  try:
    return sorted({jax.default_backend(), 'cpu'})
  except (AssertionError, RuntimeError):  # another platform is broken
    return ['cpu']
  finally:
    jax.config.update('jax_platforms', before)


def memory(device: jax.Device | None = None) -> int:
  """Returns the usable memory of a device of this process in bytes.

  An accelerator reports how much jax may allocate. CPU devices share the memory
  of the machine, or of its control group, evenly. The default is the first
  local device.

  Raises:
    ValueError: if it is unknown.

  Example:
    >>> memory() > 2**20
    True
  """
  device = device or jax.local_devices()[0]
  limit = known_memory(device)
  if limit is None:
    raise ValueError(
      f'{device.device_kind} does not report its memory, from which the number '
      'of micro-batches follows; set config.micro_batches'
    )
  return limit


def known_memory(device: jax.Device | None = None) -> int | None:
  """Returns the same as `memory`, but None if it is unknown."""
  device = device or jax.local_devices()[0]
  if device.platform == 'cpu':
    return _host_memory() // jax.local_device_count()
  limit = (device.memory_stats() or {}).get('bytes_limit')
  return int(limit) if limit else None


def _host_memory(groups: pathlib.Path = pathlib.Path('/sys/fs/cgroup')) -> int:
  """Returns the bytes available to the machine or its control group."""
  machine = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  return min([machine, *_group_limits(groups)])


def _group_limits(groups: pathlib.Path) -> Iterator[int]:
  # File names of control groups version 2 and 1.
  for name in ('memory.max', 'memory/memory.limit_in_bytes'):
    path = groups / name
    if path.is_file() and (text := path.read_text().strip()) != 'max':
      yield int(text)
