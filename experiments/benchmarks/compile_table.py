"""Compiles NFNets for devices that are not here, and prints the table.

    python -m experiments.benchmarks.compile_table --output=runs/compiled

Every cell is one `python -m nfnets_jax.compile`, which on two cores takes
minutes for F0 and tens of minutes for F6. Cells are kept in the folder as JSON
files, so the command can be stopped and repeated. The table has the paper's
measured times of a step of 32 images per TPUv3 core; all other times are
estimates of the devices' compilers.
"""

import argparse
import hashlib
import json
import pathlib
import subprocess
import sys
from typing import Any

from experiments.figures import markdown
from experiments.reproduce import paper
from nfnets_jax import command_line, paths

ROOT = pathlib.Path(__file__).parents[2]
VARIANTS = ('F0', 'F1', 'F3', 'F6')
TOPOLOGIES = ('v3:4x4', 'v5e:8x8', 'h100x8')
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


def command(
  variant: str, topology: str, batch_size: int, overrides: list[str]
) -> list[str]:
  """Returns the arguments of Python that make a cell."""
  return [
    *('-m', 'nfnets_jax.compile', '--json', '--noevaluation'),
    f'--config=experiments/nfnet_imagenet.py:{variant}',
    f'--topology={topology}',
    f'--config.batch_size={batch_size}',
    *overrides,
  ]


def cell_file(
  output: pathlib.Path, variant: str, topology: str
) -> pathlib.Path:
  """Returns the file of a cell."""
  return output / f'{variant},{topology.replace(":", "_")}.json'


def sources_digest() -> str:
  """Returns a digest of the package's sources."""
  digest = hashlib.sha256()
  for path in sorted((ROOT / 'nfnets_jax').rglob('*.py')):
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def make(
  path: pathlib.Path, python: str, arguments: list[str]
) -> dict[str, Any]:
  """Makes a cell, or reads it if it exists.

  Args:
    path: from `cell_file`.
    python: interpreter with the topology's compiler.
    arguments: from `command`.

  Returns:
    The output of the command.

  Raises:
    ValueError: if the file is the cell of another command, or it fails.
  """
  if path.exists():
    kept = json.loads(path.read_text())
    if kept.get('sources') != sources_digest():
      print(f'{path} was made by other sources', file=sys.stderr, flush=True)
    if kept['command'] != arguments:
      raise ValueError(
        f'{path} was made by other arguments, {" ".join(kept["command"])}; '
        'use another --output'
      )
    return kept['result']
  done = subprocess.run(
    [python, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  try:
    result = json.loads(done.stdout)
  except json.JSONDecodeError as error:
    raise ValueError(
      f'{python} {" ".join(arguments)} failed with code {done.returncode}'
    ) from error
  cell = {'command': arguments, 'sources': sources_digest(), 'result': result}
  partial = path.with_suffix('.partial')
  partial.write_text(json.dumps(cell, indent=2) + '\n')
  partial.replace(path)
  return result


def report(cells: dict[tuple[str, str], dict[str, Any]]) -> str:
  """Returns the table of results by variant and topology, in Markdown."""
  rows = [_row(*key, result) for key, result in cells.items()]
  return markdown.table(_HEAD, rows)


def _row(variant: str, topology: str, x: dict[str, Any]) -> list[Any]:
  first = [variant, f'{topology}: {x["devices"]} × {x["per_device_batch"]}']
  if not x['fits']:
    remedy = x['remedy']
    text = 'none'
    if remedy:
      text = f'{remedy["micro_batches"]}, remat {remedy["remat"]}'
    row = [*first, f'does not fit; {text} would']
    return row + [''] * (len(_HEAD) - len(row))
  step = x['training']
  seconds, cycles = step['seconds'], step['cycle_seconds']
  published = paper.LATENCY.get(f'nfnet_{variant.lower()}')
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


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog='python -m experiments.benchmarks.compile_table',
    description='Compiles NFNets for TPUs and GPUs, and prints the table.',
    epilog='--config.field=value overrides a field of the configs.',
  )
  parser.add_argument('--output', required=True, help='folder of the cells')
  parser.add_argument('--variants', nargs='+', default=VARIANTS)
  parser.add_argument('--topologies', nargs='+', default=TOPOLOGIES)
  parser.add_argument('--batch_size', type=int, default=4096)
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
  cells = {}
  with command_line.telling():
    output = paths.local_literal(args.output, '--output')
    output.mkdir(parents=True, exist_ok=True)
    for variant in args.variants:
      for topology in args.topologies:
        path = cell_file(output, variant, topology)
        if args.kept and not path.exists():
          continue
        gpu = topology.startswith('h100')
        python = args.cuda_python if gpu else args.tpu_python
        print(f'{variant} on {topology}', file=sys.stderr, flush=True)
        arguments = command(variant, topology, args.batch_size, overrides)
        cells[variant, topology] = make(path, python, arguments)
  print(report(cells))


if __name__ == '__main__':
  main()
