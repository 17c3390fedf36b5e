r"""Compares the speed of a net with the released form, timm, or another net.

  python -m experiments.benchmarks.speed --model=nfnet_f0 --peer released timm \
    --peer_python=PYTHON --json=f0.json

Three programs on random images on one device: `forward` is inference,
`gradient` the forward and backward pass in training mode, and `step` the
training step of the net's recipe without augmentation. Each round runs all of
them once, and ratios are taken per round, so drift of the machine cancels.

A multiply-accumulate of a convolution or matrix product counts as two
operations, and a backward pass as two forward passes. The peak is that of a
large matrix product in the same run.
"""

import argparse
import contextlib
import datetime
import functools
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import config_dict

from experiments.benchmarks import peak, released, timing, timm_peer
from experiments.benchmarks.programs import (
  KINDS,
  Program,
  count_macs,
  programs,
  recipe,
)
from nfnets_jax import devices, paths
from nfnets_jax.models import variants
from nfnets_jax.training import host_memory

_PARTS = {'update': 'update, all of it', 'clip': 'clipping alone'}


def measure(args: argparse.Namespace) -> dict[str, Any]:
  """Compiles and times everything; returns the contents of the JSON file."""
  size = args.image_size or variants.get(args.model).train_size
  config = recipe(args.model, args.precision)
  parts = programs(config, args.batch, size, list(_PARTS))
  names = ['ours', *args.peer]
  with contextlib.ExitStack() as stack:
    timm, compiled = None, {}
    for name in names:
      if name == 'timm':
        timm = _start_timm(args, config, size)
        stack.callback(timm.close)
      else:
        compiled[name] = _compile_net(name, args)
    measures: dict[tuple[str, str], Callable[[], float]] = {}
    for kind in args.what:
      for name in names:
        if timm and name == 'timm':
          measures[name, kind] = functools.partial(timm.run, kind)
        else:
          run = compiled[name][kind].run
          measures[name, kind] = functools.partial(timing.seconds, run)
    for part, program in parts.items():
      measures['parts', part] = functools.partial(timing.seconds, program.run)
    times = timing.in_turn(measures, args.repeats, args.warmup)
  if args.profile:
    with jax.profiler.trace(str(args.profile)):
      for program in compiled['ours'].values():
        program.run()
  macs = args.batch * count_macs(config, size)
  return {
    **_describe(args, size),
    'peers': {'timm': {**timm.about, 'layout': timm.layout}} if timm else {},
    'peak_tflops': peak.measure_tflops(args.precision),
    'flops': {
      kind: 2 * macs * (1 if kind == 'forward' else 3) for kind in args.what
    },
    'seconds': {
      name: {kind: times[name, kind] for kind in args.what} for name in names
    },
    'parts': {part: times['parts', part] for part in parts},
    'programs': {
      name: {kind: _figures(program) for kind, program in kinds.items()}
      for name, kinds in compiled.items()
    },
    'ratios': {
      name: {
        kind: timing.ratios(times['ours', kind], times[name, kind])
        for kind in args.what
      }
      for name in args.peer
    },
  }


def _compile_net(name: str, args: argparse.Namespace) -> dict[str, Program]:
  """Compiles our or the released form of the net, or another variant."""
  model = args.model if name in ('ours', 'released') else name
  size = args.image_size or variants.get(model).train_size
  config = recipe(model, args.precision)
  context = (
    released.formulation if name == 'released' else contextlib.nullcontext
  )
  with context():
    return programs(config, args.batch, size, args.what)


def _start_timm(
  args: argparse.Namespace, config: config_dict.ConfigDict, size: int
) -> timm_peer.Peer:
  return timm_peer.Peer(
    args.peer_python,
    args.model,
    args.what,
    batch=args.batch,
    image_size=size,
    half=args.precision == 'bfloat16',
    agc=config.optimizer.clip == 'agc',
    ema=config.ema_decay > 0,
  )


def _describe(args: argparse.Namespace, size: int) -> dict[str, Any]:
  return {
    'model': args.model,
    'batch': args.batch,
    'image_size': size,
    'precision': args.precision,
    'command': ' '.join(['python -m experiments.benchmarks.speed', *args.argv]),
    'date': datetime.date.today().isoformat(),
    'python': platform.python_version(),
    'jax': jax.__version__,
    'backend': jax.default_backend(),
    'device': jax.local_devices()[0].device_kind,
    'cores': os.cpu_count(),
  }


def _figures(program: Program) -> dict[str, float]:
  return {k: v for k, v in program._asdict().items() if k != 'run'}


def table(x: dict[str, Any]) -> str:
  """Formats the result of `measure`."""
  lines = [
    f'{x["model"]}, {x["image_size"]} px, batch {x["batch"]}, '
    f'{x["precision"]}, jax {x["jax"]} on {x["device"]} ({x["cores"]} cores), '
    f'{x["date"]}; large matrix product {x["peak_tflops"]:.3f} TFLOP/s',
    *(
      f'{name}: {about["name"]}, timm {about["timm"]} on torch '
      f'{about["torch"]}, {about["threads"]} threads, {about["layout"]}'
      for name, about in x['peers'].items()
    ),
    f'{"":24}{"median s":>10}{"min":>9}{"max":>9}{"images/s":>10}'
    f'{"TFLOP/s":>9}{"of peak":>9}{"compile s":>11}{"MB":>8}  ours ÷',
  ]
  lines += [_row(x, kind, name) for kind in x['flops'] for name in x['seconds']]
  for part, times in x['parts'].items():
    lines.append(f'{_PARTS[part]:24}{timing.columns(times)}')
  return '\n'.join(lines)


def _row(x: dict[str, Any], kind: str, name: str) -> str:
  times = x['seconds'][name][kind]
  median = statistics.median(times)
  speed = of_peak = seconds = memory = ratio = ''
  if name in ('ours', 'released', 'timm'):  # another net has other operations
    tflops = x['flops'][kind] / median / 1e12
    speed, of_peak = f'{tflops:.3f}', f'{tflops / x["peak_tflops"]:.0%}'
  if name in x['programs']:
    figures = x['programs'][name][kind]
    seconds = f'{figures["compile_seconds"]:.1f}'
    memory = f'{figures["memory"] / 1e6:.0f}'
  if name in x['ratios']:
    ratio = timing.spread(x['ratios'][name][kind])
  return (
    f'{kind:10}{name:14}{timing.columns(times)}{x["batch"] / median:10.2f}'
    f'{speed:>9}{of_peak:>9}{seconds:>11}{memory:>8}  {ratio}'
  )


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses and checks the command line."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.benchmarks.speed', description='Times a net.'
  )
  parser.add_argument('--model', default='nfnet_f0', help='a variant')
  parser.add_argument('--batch', type=int, default=8, help='number of images')
  parser.add_argument(
    '--image_size', type=int, help="pixels (default: variant's training size)"
  )
  parser.add_argument(
    '--precision', choices=['float32', 'bfloat16'], default='float32'
  )
  parser.add_argument('--what', nargs='+', choices=KINDS, default=list(KINDS))
  parser.add_argument(
    '--peer',
    nargs='*',
    default=[],
    help="any of 'released', 'timm' and other variants",
  )
  parser.add_argument('--peer_python', help='interpreter with torch and timm')
  parser.add_argument('--repeats', type=int, default=5, help='timed rounds')
  parser.add_argument(
    '--warmup', type=int, default=2, help='rounds before these'
  )
  parser.add_argument('--json', type=paths.argument, help='output file')
  parser.add_argument(
    '--profile', type=paths.argument, help='folder for a profile of our net'
  )
  args = parser.parse_args(argv)
  args.argv = argv
  try:
    for name in {args.model, *args.peer} - {'released', 'timm'}:
      variants.get(name)
  except ValueError as error:
    parser.error(str(error))
  if 'timm' in args.peer and not args.peer_python:
    parser.error('--peer timm needs --peer_python with torch and timm')
  if 'timm' in args.peer and args.model not in timm_peer.NAMES:
    known = ', '.join(sorted(timm_peer.NAMES))
    parser.error(f'timm has no {args.model}; choose one of {known}')
  for name in ('batch', 'repeats'):
    if getattr(args, name) < 1:
      parser.error(f'--{name} must be at least 1, got {getattr(args, name)}')
  if args.json and args.json.exists():
    parser.error(f'{args.json} exists; choose another name or move it')
  return args


def main(argv: list[str] | None = None) -> None:
  args = parse(sys.argv[1:] if argv is None else argv)
  result = measure(args)
  print(table(result))
  if args.json:
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(f'{json.dumps(result, indent=2)}\n')


if __name__ == '__main__':
  devices.start_or_exit()
  if jax.default_backend() == 'cpu':  # as in training
    host_memory.keep_freed_memory()
  main()
