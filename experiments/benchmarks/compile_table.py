"""Makes the table of NFNets on devices that are not here, cell by cell.

    python -m experiments.benchmarks.compile_table --output=runs/compiled

Every cell is one `python -m nfnets_jax.compile`, which takes minutes for F0 and
tens of minutes for F6 on two cores. What is made is kept in the folder, one
JSON file a cell, so that the command may be stopped and repeated; then it
prints the table beside the paper's measured times of a step of 32 images on
each TPUv3 core. All other times are estimates of the devices' compilers.
"""

import argparse
import hashlib
import json
import pathlib
import subprocess
import sys
from typing import Any

from experiments.reproduce import paper
from nfnets_jax import command_line, paths

ROOT = pathlib.Path(__file__).parents[2]
VARIANTS = ('F0', 'F1', 'F3', 'F6')
TOPOLOGIES = ('v3:4x4', 'v5e:8x8', 'h100x8')


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
  """Returns the file that a cell is kept in."""
  return output / f'{variant},{topology.replace(":", "_")}.json'


def sources_digest() -> str:
  """Returns the digest of the package's sources, which the programs are of."""
  found = hashlib.sha256()
  for path in sorted((ROOT / 'nfnets_jax').rglob('*.py')):
    found.update(path.read_bytes())
  return found.hexdigest()[:16]


def make(
  path: pathlib.Path, python: str, arguments: list[str]
) -> dict[str, Any]:
  """Makes a cell, or reads it if it is made.

  Args:
    path: from `cell_file`.
    python: of an environment with the topology's compiler.
    arguments: from `command`.

  Returns:
    What the command printed.

  Raises:
    ValueError: if the folder holds the cell of another command, or it fails.
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
  cell = {
    'command': arguments,
    'sources': sources_digest(),
    'result': result,
  }
  text = json.dumps(cell, indent=2)
  partial = path.with_suffix('.partial')
  partial.write_text(f'{text}\n')
  partial.replace(path)
  return result


def report(cells: dict[tuple[str, str], dict[str, Any]]) -> str:
  """Returns the table in Markdown.

  Args:
    cells: results by variant and topology.
  """
  columns = (
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
  lines = [_row(columns), '|' + len(columns) * '---|']
  for (variant, topology), x in cells.items():
    devices = f'{topology}: {x["devices"]} × {x["per_device_batch"]}'
    if not x['fits']:
      remedy = x['remedy']
      fewest = (
        f'{remedy["micro_batches"]}, remat {remedy["remat"]}'
        if remedy
        else 'none'
      )
      cells_ = [variant, devices, f'does not fit; {fewest} would']
      lines.append(_row((*cells_, *[''] * (len(columns) - 3))))
      continue
    step = x['training']
    seconds, cycles = step['seconds'], step['cycle_seconds']
    published = paper.LATENCY.get(f'nfnet_{variant.lower()}')
    lines.append(
      _row(
        (
          variant,
          devices,
          str(x['micro_batches']),
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
        )
      )
    )
  return '\n'.join(lines)


def _row(cells: tuple[str, ...]) -> str:
  return f'| {" | ".join(cells)} |'


def main(argv: list[str] | None = None) -> None:
  """Makes what is missing, and prints the table of all."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.benchmarks.compile_table',
    description='The table of NFNets by the compilers of TPUs and GPUs.',
  )
  parser.add_argument('--output', required=True, help='folder of the results')
  parser.add_argument('--variants', nargs='+', default=VARIANTS)
  parser.add_argument('--topologies', nargs='+', default=TOPOLOGIES)
  parser.add_argument('--batch_size', type=int, default=4096)
  parser.add_argument(
    '--tpu_python',
    default=str(ROOT / '.venv-tpu/bin/python'),
    help='with libtpu (default: of `make compile TOPOLOGY=v3:4x4`)',
  )
  parser.add_argument(
    '--cuda_python',
    default=str(ROOT / '.venv-cuda/bin/python'),
    help="with CUDA's plugin (default: of `make compile TOPOLOGY=h100`)",
  )
  parser.add_argument(
    '--kept', action='store_true', help='compile nothing, print what there is'
  )
  parser.epilog = '--config.field=value overrides a field of the configs.'
  args, overrides = parser.parse_known_args(argv)
  for text in overrides:
    if not text.startswith('--config.'):
      parser.error(f'unrecognized argument: {text}')
  cells = {}
  with command_line.telling():
    output = paths.expand_literal(args.output, '--output')
    output.mkdir(parents=True, exist_ok=True)
    for variant in args.variants:
      for topology in args.topologies:
        path = cell_file(output, variant, topology)
        if args.kept and not path.exists():
          continue
        gpu = topology.startswith('h100')
        python = args.cuda_python if gpu else args.tpu_python
        print(f'{variant} on {topology}', file=sys.stderr, flush=True)
        cells[variant, topology] = make(
          path,
          python,
          command(variant, topology, args.batch_size, overrides),
        )
  print(report(cells))


if __name__ == '__main__':
  main()
