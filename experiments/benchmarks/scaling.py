"""Prints the expected efficiency of data parallelism on many devices.

    python -m experiments.benchmarks.scaling
    python -m experiments.benchmarks.scaling --compiled runs/compiled/*.json

Arithmetic, not measurement, from parameters, multiply-accumulates, and the
stated speeds of devices and links. Latency, input, sums other than the
gradient's and stragglers are ignored, so a real run is slower than the
overlapped figure, and may be slower than the other.

A step has 6 operations for each multiply-accumulate of the forward pass: 2
forward, 4 backward. Its float32 gradient is summed by rings: a reduce-scatter
inside each node, an all-reduce of each device's shard between nodes, and an
all-gather inside the node.

With `--compiled`, arithmetic and collectives are the compiler's estimates, from
the JSON of `nfnets_jax.compile` or the cells of `compile_table`; collectives
that overlap with work in the compiled program are separated from the others.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.figures import markdown
from nfnets_jax import command_line, paths, summary
from nfnets_jax.devices import start_or_exit
from nfnets_jax.models import variants

MODELS = tuple(f'nfnet_f{n}' for n in range(7))
DEVICES = (8, 64, 512, 4096)
_HEADS = [f'{n:,} devices' for n in DEVICES]

_GRADIENT_BYTES = 4  # per parameter, float32
_OPERATIONS_PER_MAC = 6


class System(NamedTuple):
  """Devices and the links between them; all speeds are assumptions.

  Attributes:
    name: heading.
    flops: operations per second of a device, at the assumed utilisation.
    node: number of devices that fast links join; 1 if all links are equal.
    inside: bytes per second that a device sends inside its node.
    outside: bytes per second that a device sends to other nodes while all do.
    source: origin of the speeds.
  """

  name: str
  flops: float
  node: int
  inside: float
  outside: float
  source: str


_H100 = System(
  'H100, NVLink and 400 Gbit/s per GPU',
  flops=0.35 * 989e12,
  node=8,
  inside=450e9,
  outside=50e9,
  source='H100: 989 TFLOP/s dense bfloat16 at 35 % utilisation (assumed); 450 '
  'GB/s inside a node of 8, 50 GB/s per GPU between nodes',
)
SYSTEMS = (
  _H100,
  _H100._replace(
    name='H100, NVLink and 100 Gbit/s Ethernet per node',
    outside=12.5e9 / 8,
    source=_H100.source.replace(
      '50 GB/s per GPU', '12.5 GB/s per node, or 1.6 GB/s per GPU,'
    ),
  ),
  System(
    'TPUv3 cores, torus',
    flops=0.34 * 61.5e12,
    node=1,
    inside=140e9,
    outside=140e9,
    source="TPUv3 core: 61.5 TFLOP/s at 34 %, as the paper's F1 reached (32 "
    'images in 158.5 ms); a bidirectional ring over links of 70 GB/s each '
    '(assumed); a pod has 2,048 cores, so 4,096 is an extrapolation',
  ),
)


class Work(NamedTuple):
  """A variant, the bytes of its gradient, and operations per image."""

  name: str
  gradient: int
  flops: int


def work(name: str) -> Work:
  """Counts the work of a variant at its training size."""
  params, macs = summary.count(name, variants.get(name).train_size)
  return Work(name, _GRADIENT_BYTES * params, _OPERATIONS_PER_MAC * macs)


def ring_bytes(size: float, devices: int) -> float:
  """Returns the bytes that each device sends in a ring all-reduce.

  Example:
    >>> ring_bytes(1000, devices=4)
    1500.0
  """
  return 2 * (devices - 1) / devices * size


def compute_seconds(work: Work, system: System, images: int) -> float:
  """Returns the time of a step's arithmetic on one device."""
  return images * work.flops / system.flops


def reduce_seconds(size: float, system: System, devices: int) -> float:
  """Returns the time to sum `size` bytes over all devices.

  Raises:
    ValueError: if the last node is not full.
  """
  node = min(system.node, devices)
  if devices % node:
    raise ValueError(f'{devices} devices do not make whole nodes of {node}')
  inside = ring_bytes(size, node) / system.inside
  return inside + ring_bytes(size / node, devices // node) / system.outside


def efficiency(compute: float, reduce: float) -> tuple[float, float]:
  """Returns the fraction of time spent on arithmetic.

  Takes the seconds of arithmetic and all-reduce in a step; returns the fraction
  if one follows the other, and if they fully overlap.

  Example:
    >>> efficiency(3.0, 1.0)
    (0.75, 1.0)
  """
  overlapped = min(1.0, compute / reduce) if reduce else 1.0
  return compute / (compute + reduce), overlapped


def report(works: Sequence[Work], images: int) -> str:
  """Returns the tables for a per-device batch of `images`, in Markdown."""
  batches = ', '.join(f'{images * n:,}' for n in DEVICES)
  ends = (DEVICES[0], DEVICES[-1])
  head = ['variant', 'gradient, MB', *(f'sent, ring of {n:,}' for n in ends)]
  head += ['GFLOP an image', 'TFLOP a step', 'H100, ms', 'TPUv3 core, ms']
  rows = [
    (
      _short(x.name),
      f'{x.gradient / 1e6:,.1f}',
      *(f'{ring_bytes(x.gradient, n) / 1e6:,.1f}' for n in ends),
      f'{x.flops / 1e9:,.1f}',
      f'{images * x.flops / 1e12:,.2f}',
      *(
        f'{1000 * compute_seconds(x, system, images):,.1f}'
        for system in (SYSTEMS[0], SYSTEMS[-1])
      ),
    )
    for x in works
  ]
  sections = [
    'Calculated, not measured (`python -m experiments.benchmarks.scaling '
    f'--images={images}`). With {images} images per device, the batch sizes '
    f"are {batches}; the paper's 4,096 images are {4096 / images:g} devices. "
    'Latency and input are ignored.',
    markdown.table(head, rows),
    'Expected efficiency in %, with the all-reduce after the arithmetic / '
    'fully overlapped with it, and the time of the all-reduce in ms. With '
    'several micro-batches, the all-reduce follows the last one, so the first '
    'figure applies. At a lower utilisation, arithmetic takes longer and the '
    'all-reduce matters less.',
  ]
  for system in SYSTEMS:
    sections += [
      f'**{system.name}.** {system.source}.',
      markdown.table(
        ['variant', *_HEADS],
        [[_short(x.name), *_efficiencies(x, system, images)] for x in works],
      ),
    ]
  return '\n\n'.join(sections) + '\n'


def _efficiencies(work: Work, system: System, images: int) -> list[str]:
  cells = []
  for devices in DEVICES:
    reduce = reduce_seconds(work.gradient, system, devices)
    both = efficiency(compute_seconds(work, system, images), reduce)
    after, overlapped = (f'{100 * x:.1f}' for x in both)
    cells.append(f'{after} / {overlapped} ({1000 * reduce:.1f} ms)')
  return cells


def system_of(topology: str) -> System:
  """Returns the devices and links of a topology of `nfnets_jax.compile`.

  Raises:
    ValueError: if the speed of its links is unknown.

  Example:
    >>> system_of('v3:4x4').name
    'TPUv3 cores, torus'
  """
  if topology.startswith('h100'):
    return SYSTEMS[0]
  if topology.startswith('v3:'):
    return SYSTEMS[-1]
  raise ValueError(
    f'the links of {topology} are not known here; give results for v3 or h100'
  )


def compiled_report(results: Sequence[dict[str, Any]]) -> str:
  """Returns the table of steps compiled by `nfnets_jax.compile --json`.

  Collectives without work during them follow the arithmetic; the others
  overlap with it.

  Raises:
    ValueError: if a step does not fit, or its links are unknown.
  """
  rows = []
  for result in results:
    name, topology = result['model'], result['topology']
    if not result['fits']:
      raise ValueError(f'{name} does not fit on {topology}')
    system, step = system_of(topology), result['training']
    seconds = step['cycle_seconds'] or step['seconds']
    total, overlapped = step['collective_bytes'], step['overlapped_bytes']
    row = [
      f'{_short(name)} on {topology}',
      result['per_device_batch'],
      f'{1000 * seconds:,.1f}',
      f'{total / 1e6:,.1f} ({overlapped / 1e6:,.1f})',
    ]
    for devices in DEVICES:
      beside = reduce_seconds(overlapped, system, devices)
      after = reduce_seconds(total - overlapped, system, devices)
      fraction = seconds / (max(seconds, beside) + after)
      row.append(f'{100 * fraction:.1f} % ({1000 * (beside + after):.1f} ms)')
    rows.append(row)
  head = ['step', 'images a device', 'arithmetic, ms']
  head += ['collectives, MB (overlapped)', *_HEADS]
  return markdown.table(head, rows) + '\n'


def read_compiled(path: str) -> dict[str, Any]:
  """Reads a result of `nfnets_jax.compile --json`, or of `compile_table`.

  Raises:
    ValueError: if it is neither.
  """
  message = f'{path} is not a result of nfnets_jax.compile --json'
  text = paths.existing(path, '--compiled').read_text()
  try:
    result = json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(message) from error
  if isinstance(result, dict):
    result = result.get('result', result)
  if not isinstance(result, dict) or not {'topology', 'fits'} <= result.keys():
    raise ValueError(message)
  return result


def _short(name: str) -> str:
  return name.removeprefix('nfnet_').upper()


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog='python -m experiments.benchmarks.scaling',
    description='Expected efficiency of many devices, by arithmetic.',
  )
  parser.add_argument(
    '--images', type=int, default=32, help='per-device batch (default: 32)'
  )
  parser.add_argument(
    '--compiled',
    nargs='+',
    metavar='FILE',
    help='results of nfnets_jax.compile --json, for their estimates',
  )
  args = parser.parse_args(argv)
  if args.images < 1:
    parser.error(f'--images is {args.images}; give 1 or more')
  if args.compiled:
    with command_line.telling():
      print(compiled_report([read_compiled(x) for x in args.compiled]), end='')
    return
  start_or_exit()
  print(report([work(name) for name in MODELS], args.images), end='')


if __name__ == '__main__':
  main()
