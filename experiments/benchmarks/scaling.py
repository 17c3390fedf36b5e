"""Prints what data-parallel training should gain from more devices.

    python -m experiments.benchmarks.scaling
    python -m experiments.benchmarks.scaling --compiled runs/compiled/*.json

This is arithmetic, nothing is measured: it follows from the number of
parameters, the multiply-accumulates, and stated speeds of devices and links.
Latency, input, batch-wide sums other than the gradient's, and
slow devices that others wait for count as nothing, so a real run does worse
than the overlapped figure, and may do worse than the other.

A step's arithmetic is 6 operations for each multiply-accumulate of the forward
pass: 2 forwards, 4 backwards. Its gradient, in float32, is summed in three
parts: inside each node the devices reduce it so that each holds its share of
the sum; with its fellows in the other nodes each reduces that share; inside the
node all shares are gathered. Each part is a ring.

With `--compiled`, the time of the arithmetic and the bytes that are summed are
the compiler's estimates instead, from the JSON of `nfnets_jax.compile` or the
cells of `compile_table`, and what overlaps with work in the compiled program is
set apart from what does not.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from nfnets_jax import command_line, paths, summary
from nfnets_jax.devices import start_or_exit
from nfnets_jax.models import variants

MODELS = tuple(f'nfnet_f{n}' for n in range(7))
DEVICES = (8, 64, 512, 4096)

_GRADIENT_BYTES = 4  # of a parameter, float32
_OPERATIONS_PER_MAC = 6


class System(NamedTuple):
  """Devices and the links between them; all speeds are assumptions.

  Attributes:
    name: for the heading.
    flops: operations a second of a device, at the utilisation assumed.
    node: devices with the fast links between them; 1 if all links are equal.
    inside: bytes a second that a device sends inside its node.
    outside: bytes a second that a device sends to other nodes while all do.
    source: where the speeds are from.
  """

  name: str
  flops: float
  node: int
  inside: float
  outside: float
  source: str


_H100 = 'H100: 989 TFLOP/s dense bfloat16 at 35 % utilisation (assumed)'

SYSTEMS = (
  System(
    'H100, NVLink and 400 Gbit/s a GPU',
    flops=0.35 * 989e12,
    node=8,
    inside=450e9,
    outside=50e9,
    source=f'{_H100}; 450 GB/s inside a node of 8, 50 GB/s a GPU between nodes',
  ),
  System(
    'H100, NVLink and 100 Gbit/s Ethernet a node',
    flops=0.35 * 989e12,
    node=8,
    inside=450e9,
    outside=12.5e9 / 8,
    source=f'{_H100}; 450 GB/s inside a node of 8, 12.5 GB/s a node, that is '
    '1.6 GB/s a GPU, between nodes',
  ),
  System(
    'TPUv3 cores, torus',
    flops=0.34 * 61.5e12,
    node=1,
    inside=140e9,
    outside=140e9,
    source="TPUv3 core: 61.5 TFLOP/s at 34 %, as the paper's F1 reached (32 "
    'images in 158.5 ms); a ring in both directions over links of 70 GB/s each '
    '(assumed); a pod has 2,048 cores, so 4,096 is as if a pod went on',
  ),
)


class Work(NamedTuple):
  """What a step of a network asks for on each device.

  Attributes:
    name: of the variant.
    gradient: bytes of the gradient.
    flops: operations for one image, forwards and backwards.
  """

  name: str
  gradient: int
  flops: int


def work(name: str) -> Work:
  """Counts what a step of a variant asks for, at its training size.

  Args:
    name: of the variant, which is only traced.

  Returns:
    The bytes of its gradient, and the operations for an image.
  """
  params, macs = summary.count(name, variants.get(name).train_size)
  return Work(name, _GRADIENT_BYTES * params, _OPERATIONS_PER_MAC * macs)


def ring_bytes(size: float, devices: int) -> float:
  """Returns the bytes that each device sends in a ring all-reduce.

  Args:
    size: bytes to reduce.
    devices: in the ring, n.

  Returns:
    2 (n − 1) / n times the size.

  Example:
    >>> ring_bytes(1000, devices=4)
    1500.0
  """
  return 2 * (devices - 1) / devices * size


def compute_seconds(work: Work, system: System, images: int) -> float:
  """Returns the time of a step's arithmetic on one device.

  Args:
    work: of the variant.
    system: of the device.
    images: on the device.

  Returns:
    Seconds.
  """
  return images * work.flops / system.flops


def reduce_seconds(size: float, system: System, devices: int) -> float:
  """Returns the time to sum a gradient over all devices.

  Args:
    size: bytes of the gradient.
    system: whose links it goes over.
    devices: in all; whole nodes, or less than one.

  Returns:
    Seconds: a reduction and a gathering inside the nodes, and between them a
    ring all-reduce of each device's share.

  Raises:
    ValueError: if the last node is not full.
  """
  node = min(system.node, devices)
  if devices % node:
    raise ValueError(f'{devices} devices do not make whole nodes of {node}')
  inside = ring_bytes(size, node) / system.inside
  return inside + ring_bytes(size / node, devices // node) / system.outside


def efficiency(compute: float, reduce: float) -> tuple[float, float]:
  """Returns the share of the time that is spent on arithmetic.

  Args:
    compute: seconds of a step's arithmetic.
    reduce: seconds of its all-reduce.

  Returns:
    The share if one follows the other, and if they overlap fully.

  Example:
    >>> efficiency(3.0, 1.0)
    (0.75, 1.0)
  """
  alone = compute / (compute + reduce)
  return alone, min(1.0, compute / reduce) if reduce else 1.0


def report(works: list[Work], images: int) -> str:
  """Returns the tables in Markdown.

  Args:
    works: of the variants.
    images: on each device in a step.

  Returns:
    What the variants ask for, then a table of efficiencies for each system.
  """
  batches = ', '.join(f'{images * n:,}' for n in DEVICES)
  lines = [
    f'Arithmetic, not measurement (`python -m experiments.benchmarks.scaling '
    f'--images={images}`): {images} images a device, so batches of {batches}; '
    "the paper's 4,096 images are "
    f'{4096 / images:g} devices. Latency and input count as '
    'nothing.',
    '',
    _row(
      'variant',
      'gradient, MB',
      *(f'sent, ring of {n:,}' for n in (DEVICES[0], DEVICES[-1])),
      'GFLOP an image',
      'TFLOP a step',
      'H100, ms',
      'TPUv3 core, ms',
    ),
    _rule(8),
  ]
  for each in works:
    lines.append(
      _row(
        _short(each.name),
        f'{each.gradient / 1e6:,.1f}',
        *(
          f'{ring_bytes(each.gradient, n) / 1e6:,.1f}'
          for n in (DEVICES[0], DEVICES[-1])
        ),
        f'{each.flops / 1e9:,.1f}',
        f'{images * each.flops / 1e12:,.2f}',
        *(
          f'{1000 * compute_seconds(each, system, images):,.1f}'
          for system in (SYSTEMS[0], SYSTEMS[-1])
        ),
      )
    )
  lines += [
    '',
    'Expected efficiency in %, all-reduce after the arithmetic / fully '
    'overlapped with it, and the milliseconds of the all-reduce. With several '
    'micro-batches the sum comes after the last one, so the first figure '
    'holds. Devices that reach less of their peak wait longer for themselves '
    'and less for each other.',
  ]
  for system in SYSTEMS:
    lines += [
      '',
      f'**{system.name}.** {system.source}.',
      '',
      _row('variant', *(f'{n:,} devices' for n in DEVICES)),
      _rule(1 + len(DEVICES)),
    ]
    lines += [
      _row(_short(each.name), *_cells(each, system, images)) for each in works
    ]
  return '\n'.join(lines) + '\n'


def system_of(topology: str) -> System:
  """Returns the links of a topology of `nfnets_jax.compile`.

  Args:
    topology: its name.

  Returns:
    The first of `SYSTEMS` of such devices.

  Raises:
    ValueError: if the speed of its links is not among them.

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
  """Returns the table of compiled steps in Markdown.

  Args:
    results: of `nfnets_jax.compile --json`, of steps that fit.

  Returns:
    For each, the efficiency on as many devices as in `DEVICES`, with the bytes
    of collectives that nothing is done during after the arithmetic, and the
    others beside it.

  Raises:
    ValueError: if a step does not fit, or its links are not known.
  """
  lines = [
    _row(
      'step',
      'images a device',
      'arithmetic, ms',
      'collectives, MB (overlapped)',
      *(f'{n:,} devices' for n in DEVICES),
    ),
    _rule(4 + len(DEVICES)),
  ]
  for result in results:
    topology = result['topology']
    if not result['fits']:
      raise ValueError(f'{result["model"]} does not fit on {topology}')
    system, step = system_of(topology), result['training']
    seconds = step['cycle_seconds'] or step['seconds']
    total, overlapped = step['collective_bytes'], step['overlapped_bytes']
    cells = []
    for devices in DEVICES:
      beside = reduce_seconds(overlapped, system, devices)
      after = reduce_seconds(total - overlapped, system, devices)
      share = seconds / (max(seconds, beside) + after)
      cells.append(f'{100 * share:.1f} % ({1000 * (beside + after):.1f} ms)')
    lines.append(
      _row(
        f'{_short(result["model"])} on {topology}',
        str(result['per_device_batch']),
        f'{1000 * seconds:,.1f}',
        f'{total / 1e6:,.1f} ({overlapped / 1e6:,.1f})',
        *cells,
      )
    )
  return '\n'.join(lines) + '\n'


def read_compiled(path: str) -> dict[str, Any]:
  """Reads a result of `nfnets_jax.compile --json` or of `compile_table`.

  Args:
    path: of the JSON.

  Returns:
    The result.

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


def _cells(work: Work, system: System, images: int) -> list[str]:
  cells = []
  for devices in DEVICES:
    reduce = reduce_seconds(work.gradient, system, devices)
    shares = efficiency(compute_seconds(work, system, images), reduce)
    after, overlapped = (f'{100 * x:.1f}' for x in shares)
    cells.append(f'{after} / {overlapped} ({1000 * reduce:.1f} ms)')
  return cells


def _short(name: str) -> str:
  return name.removeprefix('nfnet_').upper()


def _row(*cells: str) -> str:
  return f'| {" | ".join(cells)} |'


def _rule(columns: int) -> str:
  return '|' + columns * '---|'


def main(argv: list[str] | None = None) -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.benchmarks.scaling',
    description='Expected efficiency of many devices, by arithmetic.',
  )
  parser.add_argument(
    '--images',
    type=int,
    default=32,
    help='on each device in a step (default: 32)',
  )
  parser.add_argument(
    '--compiled',
    nargs='+',
    metavar='FILE',
    help='results of nfnets_jax.compile --json, for their estimates',
  )
  args = parser.parse_args(argv)
  if args.compiled:
    with command_line.telling():
      print(compiled_report([read_compiled(x) for x in args.compiled]), end='')
    return
  start_or_exit()
  if args.images < 1:
    parser.error(f'--images is {args.images}; give 1 or more')
  print(report([work(name) for name in MODELS], args.images), end='')


if __name__ == '__main__':
  main()
