"""The platform that jax computes on: chosen by the environment, started here.

Where a platform is missing, jax raises a bare assertion or a long traceback;
every command starts jax through this module instead. It also knows how much
memory a device has.
"""

import os
import pathlib
import re
import sys
from collections.abc import Iterator

import jax

# What installs the support of a platform.
_EXTRAS = {
  'cuda': 'jax[cuda13]',
  'gpu': 'jax[cuda13]',
  'rocm': 'jax[rocm7-local]',
  'tpu': 'jax[tpu]',
}


def start() -> None:
  """Starts jax on the platforms that the environment names.

  Processes of one run join the others first; see `training.distributed`.

  Raises:
    ValueError: if a platform of `$JAX_PLATFORMS` is missing, or jax's own
      choice fails; the message names the variable and the remedy.

  Example:
    >>> start()
  """
  # jax would look for a platform called ' ' or 'CPU'.
  names = (name.strip().lower() for name in (_chosen() or '').split(','))
  text = ','.join(filter(None, names))
  if text != (_chosen() or ''):
    jax.config.update('jax_platforms', text or None)
  # jax skips cuda of 'cuda,cpu' without a word where it sees no GPU.
  for platform in text.split(',') if text else [None]:
    try:
      jax.devices(platform)
    except (AssertionError, RuntimeError) as error:
      raise ValueError(_explain(platform, text, str(error))) from error


def start_or_exit() -> None:
  """As `start`, for commands: prints the error and exits with code 1."""
  try:
    start()
  except ValueError as error:
    sys.exit(f'error: {error}')


def _explain(platform: str | None, text: str, reason: str) -> str:
  # jax starts all of them when it is asked for one.
  blamed = re.search(r"backend '([^']*)'", reason)
  if blamed and blamed[1] in text.split(','):
    platform = blamed[1]
  # The rest of jax's message is advice that is given below.
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
    f'{" and ".join(_available())}; {install}unset {name} to use what is there'
    + (f'\n{reason}' if reason else '')
  )


def _chosen() -> str | None:
  name = 'jax_platforms'  # which the types of some versions of jax lack
  return getattr(jax.config, name)


def _available() -> list[str]:
  """Returns the platforms that jax finds by itself."""
  before = _chosen()
  jax.config.update('jax_platforms', None)
  try:
    return sorted({jax.default_backend(), 'cpu'})
  except (AssertionError, RuntimeError):  # another one is broken
    return ['cpu']
  finally:
    jax.config.update('jax_platforms', before)


def memory(device: jax.Device | None = None) -> int:
  """Returns the bytes of memory that a device of this process can use.

  An accelerator says how much it lets jax allocate. On CPU the devices share
  the machine's memory, or what its control group leaves of it, evenly.

  Args:
    device: the first by default.

  Raises:
    ValueError: if the device does not say; the message says what to set.

  Example:
    >>> memory() > 2**20
    True
  """
  device = device or jax.local_devices()[0]
  limit = known_memory(device)
  if limit is None:
    raise ValueError(
      f'{device.device_kind} does not say how much memory it has, so the '
      'number of micro-batches cannot be chosen; set config.micro_batches'
    )
  return limit


def known_memory(device: jax.Device | None = None) -> int | None:
  """As `memory`, but None if the device does not say."""
  device = device or jax.local_devices()[0]
  if device.platform == 'cpu':
    return _host_memory() // jax.local_device_count()
  limit = (device.memory_stats() or {}).get('bytes_limit')
  return int(limit) if limit else None


def _host_memory(groups: pathlib.Path = pathlib.Path('/sys/fs/cgroup')) -> int:
  """Bytes that this process can have: the machine's, or its control group's."""
  machine = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  return min([machine, *_group_limits(groups)])


def _group_limits(groups: pathlib.Path) -> Iterator[int]:
  # The names of the second and of the first version of control groups.
  for name in ('memory.max', 'memory/memory.limit_in_bytes'):
    path = groups / name
    if path.is_file() and (text := path.read_text().strip()) != 'max':
      yield int(text)
