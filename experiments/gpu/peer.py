"""Part 2: the same training steps by timm in PyTorch.

  python -m experiments.gpu.peer nfnet_f0 eager|compiled|largest

Mixed precision in bfloat16, SGD with Nesterov momentum, and AGC and a moving
average where the recipe has them: eager in both layouts, compiled in
channels-last, or eager with the largest power of two that fits.

Needs torch and timm, but none of the dependencies of this package.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

from experiments.benchmarks import timm_peer
from experiments.gpu import common

# Training size by model.
_SIZES = {'nfnet_f0': 192, 'nfnet_f1': 224, 'nf_resnet50': 224, 'resnet50': 224}
_LAYOUTS = {'first': 'contiguous', 'last': 'channels_last'}
# The search for the largest batch: the first one, and seconds to start others.
_FIRST = 512
_SEARCH = 15.0


def _stepper(model: str, batch: int, layout: str, compiled: bool) -> Callable:
  """Returns a function that runs steps of a new net."""
  import torch

  from experiments.benchmarks import timm_worker

  torch.backends.cudnn.benchmark = True
  name, size = timm_peer.NAMES[model], _SIZES[model]
  if common.dry_run():
    name, size = 'test_nfnet', 32
  nfnet = 'nfnet' in name
  net = timm_worker.Net(name, batch, size, agc=nfnet, ema=nfnet, half=True)
  net.set_layout(_LAYOUTS[layout])
  if compiled:
    net.compile()
  return net.step


def _time(step: Callable, count: int) -> float:
  """Returns the seconds of one of several steps in a row."""
  from experiments.benchmarks import timm_worker

  timm_worker.wait()
  began = time.perf_counter()
  for _ in range(count):
    step()
  timm_worker.wait()
  return (time.perf_counter() - began) / count


def _measure(step: Callable, **about: Any) -> None:
  import timm
  import torch

  cuda = torch.cuda.is_available()
  if cuda:
    torch.cuda.reset_peak_memory_stats()
  times = common.measure_steps(lambda count: _time(step, count))
  common.add(
    2,
    'timm',
    status='measured',
    **about,
    **times,
    images_per_second=about['batch'] / times['seconds'],
    memory=torch.cuda.max_memory_allocated() if cuda else None,
    torch=torch.__version__,
    timm=timm.__version__,
  )


def _measure_largest(model: str, layout: str) -> None:
  """Doubles the batch while it fits, or halves it until it fits."""
  import torch

  about = {'model': model, 'mode': 'eager', 'layout': layout}
  batch, measured = _FIRST, False
  until = time.monotonic() + _SEARCH
  while batch and time.monotonic() < until and not common.dry_run():
    step = None  # frees the last net
    torch.cuda.empty_cache()
    try:
      step = _stepper(model, batch, layout, compiled=False)
      _time(step, 2)
    except torch.cuda.OutOfMemoryError:
      if measured:
        return
      batch //= 2
      continue
    _measure(step, **about, batch=batch, largest=True)
    if batch < _FIRST:  # twice as many do not fit
      return
    measured = True
    batch *= 2


def main(argv: list[str] | None = None) -> None:
  """Warms up, waits and measures."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.gpu.peer', description='Times timm in PyTorch.'
  )
  parser.add_argument('model', choices=_SIZES)
  parser.add_argument('mode', choices=['eager', 'compiled', 'largest'])
  args = parser.parse_args(argv)
  about = {'model': args.model, 'mode': args.mode}
  try:
    import timm
    import torch

    del timm
  except ImportError as error:
    common.add(2, 'timm', **about, status='absent', message=str(error))
    return
  batch = 2 if common.dry_run() else 32
  layouts = {'eager': ('first', 'last'), 'compiled': ('last',), 'largest': ()}
  ready = {}
  for layout in layouts[args.mode]:
    step = _stepper(args.model, batch, layout, args.mode == 'compiled')
    _time(step, 3)
    ready[layout] = step
    del step
  if torch.cuda.is_available():
    torch.cuda.empty_cache()
  common.wait_for_turn()
  for layout, step in ready.items():
    _measure(step, **about, layout=layout, batch=batch, largest=False)
  if args.mode == 'largest':
    _measure_largest(args.model, 'last')
  common.end_turn()


if __name__ == '__main__':
  main()
