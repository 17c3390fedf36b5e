"""Part 2: the same training steps by timm in PyTorch.

  python -m experiments.gpu.peer nfnet_f0 eager|compiled|largest

With automatic mixed precision in bfloat16, AGC where the recipe has it, SGD
with Nesterov momentum and a moving average. It builds and warms up, says
`ready`, waits for a line on standard input so that nothing else is on the
device, and measures: eager with channels first and last, compiled with channels
last, or eager with the largest power of two that fits.

Needs torch and timm and nothing of ours but `common`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from experiments.gpu import common

_NAMES = {
  'nfnet_f0': ('dm_nfnet_f0', 192),
  'nfnet_f1': ('dm_nfnet_f1', 224),
  'nf_resnet50': ('nf_resnet50', 224),
  'resnet50': ('resnetv2_50', 224),
}
_ROUNDS = 5
_SECONDS = 0.3
# Seconds to look for the largest batch.
_SEARCH = 15.0


def _stepper(model: str, batch: int, layout: str, compiled: bool) -> Callable:
  """Returns a function that makes steps, of a net of its own."""
  import timm
  import torch
  from timm.utils import ModelEmaV3
  from timm.utils.agc import adaptive_clip_grad

  name, size = ('test_nfnet', 32) if common.dry_run() else _NAMES[model]
  nfnet = 'nfnet' in name
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  form = {
    'first': torch.contiguous_format,
    'last': torch.channels_last,
  }[layout]
  torch.manual_seed(0)
  torch.backends.cudnn.benchmark = True
  net = timm.create_model(name, num_classes=1000).to(device).train()
  net = net.to(memory_format=form)
  images = torch.randn((batch, 3, size, size), device=device)
  images = images.to(memory_format=form)
  labels = torch.arange(batch, device=device) % 1000
  parameters = list(net.named_parameters())
  decayed = [p for n, p in parameters if n.endswith('weight')]
  others = [p for n, p in parameters if not n.endswith('weight')]
  optimizer = torch.optim.SGD(
    [
      {'params': decayed, 'weight_decay': 2e-5},
      {'params': others, 'weight_decay': 0.0},
    ],
    lr=1e-6,
    momentum=0.9,
    nesterov=True,
  )
  ema = ModelEmaV3(net, decay=0.99999) if nfnet else None
  # All but the classifier's weight and bias, as timm leaves them out.
  clipped = list(net.parameters())[:-2] if nfnet else []
  forward = torch.compile(net) if compiled else net

  def step() -> None:
    optimizer.zero_grad()
    with torch.autocast(device, torch.bfloat16):
      logits = forward(images)
    torch.nn.functional.cross_entropy(logits.float(), labels).backward()
    if clipped:
      adaptive_clip_grad(clipped, 0.01, 1e-3)
    optimizer.step()
    if ema is not None:
      ema.update(net)

  return step


def _wait() -> None:
  import torch

  if torch.cuda.is_available():
    torch.cuda.synchronize()


def _time(step: Callable, count: int) -> float:
  _wait()
  began = time.perf_counter()
  for _ in range(count):
    step()
  _wait()
  return (time.perf_counter() - began) / count


def _measure(step: Callable, **about: Any) -> None:
  import timm
  import torch

  count = max(1, round(_SECONDS / _time(step, 1)))
  cuda = torch.cuda.is_available()
  if cuda:
    torch.cuda.reset_peak_memory_stats()
  seconds = [_time(step, count) for _ in range(_ROUNDS)]
  common.add(
    2,
    'timm',
    status='measured',
    **about,
    seconds=statistics.median(seconds),
    rounds=seconds,
    images_per_second=about['batch'] / statistics.median(seconds),
    memory=torch.cuda.max_memory_allocated() if cuda else None,
    torch=torch.__version__,
    timm=timm.__version__,
  )


def _measure_largest(model: str, layout: str) -> None:
  """Doubles the batch until memory or time is out."""
  import torch

  batch, until = 64, time.monotonic() + _SEARCH
  while time.monotonic() < until and not common.dry_run():
    torch.cuda.empty_cache()
    try:
      step = _stepper(model, batch, layout, compiled=False)
      _time(step, 2)
    except torch.cuda.OutOfMemoryError:
      break
    about = {'model': model, 'mode': 'eager', 'layout': layout}
    _measure(step, **about, batch=batch, largest=True)
    batch *= 2
    del step


def main(argv: list[str] | None = None) -> None:
  """Warms up, waits and measures."""
  parser = argparse.ArgumentParser(description='timm, in PyTorch.')
  parser.add_argument('model', choices=_NAMES)
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
  print('ready', flush=True)
  if not sys.stdin.readline():
    sys.exit('nobody said go')
  for layout, step in ready.items():
    _measure(step, **about, layout=layout, batch=batch, largest=False)
  if args.mode == 'largest':
    _measure_largest(args.model, 'last')


if __name__ == '__main__':
  main()
