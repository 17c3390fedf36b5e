"""Compiles nets for devices that are not here, and prints the table.

    python -m experiments.benchmarks.compile_table --output=runs/compiled

compiles NFNets with the paper's batch of 4096. With `--latency`, instead, all
nets of the paper's table 3 and NF-ResNets with 32 images a device, for the
columns of `make reproduce-latency`; with `--claims`, each distinct training
step of the claims at the paper's scale, for `experiments.reproduce.cost`.

Every cell is one `python -m nfnets_jax.compile`, which on two cores takes
minutes for F0 and tens of minutes for F6. Cells are kept in the folder as JSON
files, so the command can be stopped and repeated. A cell that fails is reported
at the end and made again next time. The table has the paper's measured times of
a step of 32 images per TPUv3 core; all other times are estimates of the
devices' compilers. With `--less_effort`, which `--claims` implies, the TPU
compiler takes a fifth of the time. docs/compile.md says what that changes.
"""

import argparse
import hashlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from experiments.benchmarks import compile_nets
from experiments.figures import markdown
from experiments.reproduce import cost, paper
from experiments.reproduce.claims import latency
from nfnets_jax import command_line, paths

ROOT = pathlib.Path(__file__).parents[2]
VARIANTS = ('F0', 'F1', 'F3', 'F6')
TOPOLOGIES = ('v3:4x4', 'v5e:8x8', 'h100x8')
_LESS_EFFORT = {'JAX_EXEC_TIME_OPTIMIZATION_EFFORT': '-1.0'}
_HEAD = (
  'net',
  'devices × images',
  'micro-batches',
  'GiB of a device',
  'step, ms',
  'by cycles, ms',
  'bound by',
  '32 images, ms',
  "paper's on v3, ms",
  'images/s',
  'days',
  'collectives, MB (overlapped)',
  'compiled in, s',
  'by',
)
_SHORT = [f'F{n}' for n in range(8)]


def command(
  net: compile_nets.Net, topology: str, overrides: Sequence[str]
) -> list[str]:
  """Returns the arguments of Python that make a cell."""
  return [
    *('-m', 'nfnets_jax.compile', '--json', '--noevaluation'),
    f'--config={net.config}',
    f'--topology={topology}',
    f'--config.batch_size={net.batch_on(topology)}',
    *net.overrides,
    *overrides,
  ]


def sources_digest() -> str:
  """Returns a digest of the package's sources."""
  digest = hashlib.sha256()
  for path in sorted((ROOT / 'nfnets_jax').rglob('*.py')):
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def make(
  path: pathlib.Path,
  python: str,
  arguments: list[str],
  *,
  less_effort: bool = False,
) -> dict[str, Any]:
  """Makes a cell, or reads it if it exists.

  Args:
    path: from `cost.cell_file`.
    python: interpreter with the topology's compiler.
    arguments: from `command`.
    less_effort: whether the compiler optimises less. The cell has no cycles
      then, which are those of a schedule that nobody would run.

  Returns:
    The output of the command.

  Raises:
    ValueError: if the file is the cell of another command, or it fails.
  """
  environment = _LESS_EFFORT if less_effort else {}
  words = [*(f'{x}={y}' for x, y in environment.items()), *arguments]
  if path.exists():
    kept = json.loads(path.read_text())
    if kept.get('sources') != sources_digest():
      print(f'{path} was made by other sources', file=sys.stderr, flush=True)
    if kept['command'] != words:
      raise ValueError(
        f'{path} was made by other arguments, {" ".join(kept["command"])}; '
        'use another --output'
      )
    return kept['result']
  done = subprocess.run(
    [python, *arguments],
    cwd=ROOT,
    env={**os.environ, **environment},
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    result = json.loads(done.stdout)
  except json.JSONDecodeError as error:
    raise ValueError(
      f'{python} {" ".join(arguments)} failed with code {done.returncode}'
    ) from error
  if less_effort and result['fits']:
    result['training'].update(cycles=None, cycle_seconds=None)
  cell = {'command': words, 'sources': sources_digest(), 'result': result}
  partial = path.with_suffix('.partial')
  partial.write_text(json.dumps(cell, indent=2) + '\n')
  partial.replace(path)
  return result


def report(cells: dict[tuple[str, str], dict[str, Any]]) -> str:
  """Returns the table of results by name and topology, in Markdown."""
  rows = [_row(*key, result) for key, result in cells.items()]
  return markdown.table(_HEAD, rows)


def kept_report(cells: pathlib.Path = cost.CELLS) -> str:
  """Returns the table of the NFNet cells in a folder."""
  kept = {}
  for topology, variant in itertools.product(TOPOLOGIES, _SHORT):
    path = cost.cell_file(cells, variant, topology)
    if path.exists():
      kept[variant, topology] = json.loads(path.read_text())['result']
  return report(dict(sorted(kept.items(), key=lambda x: x[0][0])))


def _row(name: str, topology: str, x: dict[str, Any]) -> list[Any]:
  first = [name, f'{topology}: {x["devices"]} × {x["per_device_batch"]}']
  if not x['fits']:
    remedy = x['remedy']
    text = 'none'
    if remedy:
      text = f'{remedy["micro_batches"]}, remat {remedy["remat"]}'
    row = [*first, f'does not fit; {text} would']
    return row + [''] * (len(_HEAD) - len(row))
  step = x['training']
  seconds, cycles = step['seconds'], step['cycle_seconds']
  model = f'nfnet_{name.lower()}' if name in _SHORT else name
  published = paper.LATENCY.get(model)
  return [
    *first,
    x['micro_batches'],
    f'{step["total"] / 2**30:.2f} of {x["device_memory"] / 2**30:.2f}',
    f'{1e3 * seconds:.1f}',
    f'{1e3 * cycles:.1f}' if cycles else '',
    step['bound'],
    f'{1e3 * (cycles or seconds) * 32 / x["per_device_batch"]:.1f}',
    f'{published.tpu_ms:g}' if published else '',
    f'{x["images_per_second"]:,.0f}',
    f'{x["days"]:.2f}',
    f'{step["collective_bytes"] / 1e6:,.0f} '
    f'({step["overlapped_bytes"] / 1e6:,.0f})',
    f'{step["compile_seconds"]:,.0f}',
    x['compiler'],
  ]


def _nets(
  args: argparse.Namespace,
) -> tuple[list[compile_nets.Net], pathlib.Path]:
  """Returns what to compile, and the subfolder of its cells."""
  if args.claims:
    return compile_nets.claim_nets(), pathlib.Path('claims')
  if args.latency:
    return compile_nets.latency_nets(
      args.nets or latency.COMPILED
    ), pathlib.Path('latency')
  nets = compile_nets.batch_nets(args.nets or VARIANTS, args.batch_size)
  return nets, pathlib.Path()


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
  parser = argparse.ArgumentParser(
    prog='python -m experiments.benchmarks.compile_table',
    description='Compiles nets for TPUs and GPUs, and prints the table.',
    epilog='--config.field=value overrides a field of the configs.',
  )
  parser.add_argument('--output', required=True, help='folder of the cells')
  parser.add_argument(
    '--nets', nargs='+', help=f'F0 or any model (default: {" ".join(VARIANTS)})'
  )
  kinds = parser.add_mutually_exclusive_group()
  kinds.add_argument(
    '--latency', action='store_true', help='32 images a device, as in table 3'
  )
  kinds.add_argument(
    '--claims', action='store_true', help='all steps of the claims at paper'
  )
  parser.add_argument(
    '--topologies',
    nargs='+',
    help=f'default: {" ".join(TOPOLOGIES)}; with --latency v3:4x4 h100',
  )
  parser.add_argument('--batch_size', type=int, default=4096)
  parser.add_argument(
    '--less_effort',
    action='store_true',
    help='let the TPU compiler optimise less; --claims implies it',
  )
  for name, compiler in (('tpu', 'libtpu'), ('cuda', "CUDA's plugin")):
    parser.add_argument(
      f'--{name}_python',
      default=str(ROOT / f'.venv-{name}/bin/python'),
      help=f'interpreter with {compiler} (default: that of `make compile`)',
    )
  parser.add_argument(
    '--kept', action='store_true', help='compile nothing, print what exists'
  )
  args, overrides = parser.parse_known_args(argv)
  for text in overrides:
    if not text.startswith('--config.'):
      parser.error(f'unrecognized argument: {text}')
  if args.latency and args.less_effort:
    parser.error('--latency takes no --less_effort: its figures are cycles')
  if args.claims and (args.nets or args.topologies):
    parser.error('--claims takes no --nets and no --topologies')
  if args.topologies is None:
    args.topologies = latency.TOPOLOGIES if args.latency else TOPOLOGIES
  return args, overrides


def main(argv: list[str] | None = None) -> None:
  args, overrides = _parse(argv)
  cells, failed = {}, []
  with command_line.telling():
    nets, subfolder = _nets(args)
    output = paths.local_literal(args.output, '--output') / subfolder
    output.mkdir(parents=True, exist_ok=True)
    numbered = list(enumerate(nets, start=1))
    if args.claims:
      places = [(cost.topology_of(net.batch), (i, net)) for i, net in numbered]
    else:
      # A whole topology first: half a table of one is more than half of each.
      places = list(itertools.product(args.topologies, numbered))
    for topology, (i, net) in places:
      path = cost.cell_file(output, net.name, topology)
      if args.kept and not path.exists():
        continue
      devices = compile_nets.count_devices(topology)
      if net.batch_on(topology) % devices:
        print(
          f'{net.name}, {net.config}: {net.batch} images are not divisible by '
          f'the {devices} devices of {topology}',
          file=sys.stderr,
        )
        continue
      print(
        f'{topology}, {i} of {len(nets)}: {net.name}, {net.config}',
        file=sys.stderr,
        flush=True,
      )
      gpu = topology.startswith('h100')
      python = args.cuda_python if gpu else args.tpu_python
      arguments = command(net, topology, overrides)
      try:
        less = (args.less_effort or args.claims) and not gpu
        result = make(path, python, arguments, less_effort=less)
        cells[net.title or net.name, topology] = result
      except ValueError as error:
        failed.append(f'{net.name} on {topology}: {error}')
  order = {net.title or net.name: i for i, net in enumerate(nets)}
  print(report(dict(sorted(cells.items(), key=lambda x: order[x[0][0]]))))
  if failed:
    sys.exit('\n  '.join(['error: these cells could not be made:', *failed]))


if __name__ == '__main__':
  main()
