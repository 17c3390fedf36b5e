"""Splits the time of a compiled program by operation, from a profile."""

import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax

from nfnets_jax import hlo

# XLA:CPU names its operations in a profile only if started with this flag.
CPU_FLAG = '--xla_cpu_enable_xprof_traceme=true'


def products(text: str) -> set[str]:
  """Returns the operations of an HLO text that compute a matrix product.

  These are convolutions, dots, calls of cuDNN and cuBLAS, and their fusions.
  """
  computations, _ = hlo.parse(text)

  def is_product(x: hlo.Instruction) -> bool:
    target = r'custom_call_target="(__cudnn\$conv|__cublas)'
    return x.opcode in ('convolution', 'dot') or bool(
      re.search(target, x.attributes)
    )

  hold = {name for name, xs in computations.items() if any(map(is_product, xs))}
  return {
    x.name
    for xs in computations.values()
    for x in xs
    if is_product(x)
    or hold.intersection(re.findall(r'calls=%?([\w.\-]+)', x.attributes))
  }


def split(text: str, run: Callable[[], Any]) -> dict[str, float] | None:
  """Profiles a call and splits its time.

  Args:
    text: HLO text of the compiled program.
    run: runs it once and waits.

  Returns:
    Seconds during which a product ran, alone or beside others (`products`),
    only other operations ran (`rest`), or none that has a name in the profile,
    such as a product that Eigen splits over threads (`unnamed`). None if the
    profile of this backend names no operations.
  """
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      run()
    files = list(pathlib.Path(folder).rglob('*.xplane.pb'))
    if not files:
      return None
    profile = jax.profiler.ProfileData.from_file(str(files[0]))
  of_products = products(text)
  events: list[tuple[float, int, str]] = []
  with warnings.catch_warnings():
    # Python 3.12 warns of a type that jaxlib makes here; as an error, it would
    # abort the process.
    warnings.simplefilter('ignore', DeprecationWarning)
    for name, start, duration in _operations(profile):
      kind = 'products' if name in of_products else 'rest'
      events += [(start, 1, kind), (start + duration, -1, kind)]
  if not events:
    return None
  events.sort()
  seconds = {'products': 0.0, 'rest': 0.0, 'unnamed': 0.0}
  active = {'products': 0, 'rest': 0}
  last = events[0][0]
  for moment, change, kind in events:
    state = next((k for k, count in active.items() if count), 'unnamed')
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
        # A loop spans the operations in it, which have their own names.
        if isinstance(name, str) and not name.startswith(('while', 'call')):
          yield name, event.start_ns, event.duration_ns
