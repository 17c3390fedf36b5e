"""What a compiled program spends its time on, from a profile of it."""

import collections
import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax

# XLA for CPU notes its operations in a profile only if it was asked at start.
CPU_FLAG = '--xla_cpu_enable_xprof_traceme=true'

_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) .*\{$')
_OPERATION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = .*')
_CALLED = re.compile(r'calls=%?([\w.\-]+)')
_PRODUCT = re.compile(
  r' (?:convolution|dot)\(|custom_call_target="(?:__cudnn\$conv|__cublas)'
)


def products(hlo: str) -> set[str]:
  """Names the operations of a program that hold a convolution or a product.

  Args:
    hlo: text of the compiled program.

  Returns:
    Their names, fusions among them.
  """
  bodies: dict[str, list[str]] = collections.defaultdict(list)
  body = ''
  for line in hlo.splitlines():
    if match := _COMPUTATION.match(line):
      body = match[1]
    bodies[body].append(line)
  hold = {
    name
    for name, lines in bodies.items()
    if any(_PRODUCT.search(line) for line in lines)
  }
  found = set()
  for lines in bodies.values():
    for line in lines:
      if match := _OPERATION.match(line):
        called = _CALLED.search(line)
        if _PRODUCT.search(line) or (called and called[1] in hold):
          found.add(match[1])
  return found


def split(hlo: str, run: Callable[[], Any]) -> dict[str, float] | None:
  """Profiles a run and tells what its time went to.

  Args:
    hlo: text of the compiled program.
    run: runs it once and waits.

  Returns:
    Seconds of the clock: `products`, in which a convolution or a matrix product
    ran, alone or beside others; `rest`, in which other operations ran;
    `unnamed`, in which none did that has a name in the profile, such as a
    product that Eigen shares out over threads. None if the profile of this
    backend names no operations.
  """
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      run()
    files = list(pathlib.Path(folder).rglob('*.xplane.pb'))
    if not files:
      return None
    profile = jax.profiler.ProfileData.from_file(str(files[0]))
  of_products = products(hlo)
  points: list[tuple[float, int, str]] = []
  with warnings.catch_warnings():
    # jaxlib makes a type here for the first time, and Python 3.12 warns of how;
    # where warnings are errors, the process would be aborted.
    warnings.simplefilter('ignore', DeprecationWarning)
    for name, start, duration in _operations(profile):
      kind = 'products' if name in of_products else 'rest'
      points.append((start, 1, kind))
      points.append((start + duration, -1, kind))
  if not points:
    return None
  points.sort()
  seconds = {'products': 0.0, 'rest': 0.0, 'unnamed': 0.0}
  active = {'products': 0, 'rest': 0}
  last = points[0][0]
  for moment, change, kind in points:
    state = next((k for k in ('products', 'rest') if active[k]), 'unnamed')
    seconds[state] += (moment - last) / 1e9
    active[kind] += change
    last = moment
  return seconds


def _operations(
  profile: jax.profiler.ProfileData,
) -> Iterator[tuple[str, float, float]]:
  """Yields name, start and duration in ns of the operations of a program."""
  for plane in profile.planes:
    for line in plane.lines:
      for event in line.events:
        name = dict(event.stats).get('hlo_op')
        # A loop spans what runs in it, which has names of its own.
        if isinstance(name, str) and not name.startswith(('while', 'call')):
          yield name, event.start_ns, event.duration_ns
