"""Runs one of timm's nets in PyTorch, a step for each line that it reads.

A program of its own, for an interpreter with torch and timm; `timm_peer.py`
starts it. Its argument is a JSON object; each line names a kind of work and a
form of memory, and is answered with the seconds that it took.
"""

import json
import sys
import time

import timm
import torch
from timm.utils import ModelEmaV3
from timm.utils.agc import adaptive_clip_grad

_FORMATS = {
  'contiguous': torch.contiguous_format,
  'channels_last': torch.channels_last,
}


def main() -> None:
  """Answers until its input ends."""
  task = json.loads(sys.argv[1])
  torch.manual_seed(0)
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  net = timm.create_model(task['name']).to(device).train()
  shape = (task['batch'], 3, task['image_size'], task['image_size'])
  images = torch.randn(shape, device=device)
  labels = torch.arange(task['batch'], device=device) % 1000
  decayed = [p for n, p in net.named_parameters() if n.endswith('weight')]
  others = [p for n, p in net.named_parameters() if not n.endswith('weight')]
  optimizer = torch.optim.SGD(
    [
      {'params': decayed, 'weight_decay': 2e-5},
      {'params': others, 'weight_decay': 0.0},
    ],
    lr=1e-6,
    momentum=0.9,
    nesterov=True,
  )
  ema = ModelEmaV3(net, decay=0.99999) if task['ema'] else None
  # All but the classifier's weight and bias, as timm leaves them out.
  clipped = list(net.parameters())[:-2] if task['agc'] else []
  half = task['precision'] == 'bfloat16'

  def logits() -> torch.Tensor:
    with torch.autocast(device, torch.bfloat16, enabled=half):
      return net(images)

  def forward() -> None:
    net.eval()
    with torch.inference_mode():
      logits()
    net.train()

  def gradient() -> None:
    net.zero_grad()
    torch.nn.functional.cross_entropy(logits().float(), labels).backward()

  def step() -> None:
    gradient()
    if clipped:
      adaptive_clip_grad(clipped, 0.01, 1e-3)
    optimizer.step()
    if ema is not None:
      ema.update(net)

  kinds = {'forward': forward, 'gradient': gradient, 'step': step}

  def wait() -> None:
    if device == 'cuda':
      torch.cuda.synchronize()

  def answer(**values: object) -> None:
    print(json.dumps(values), flush=True)

  answer(
    torch=torch.__version__,
    timm=timm.__version__,
    threads=torch.get_num_threads(),
    device=device,
    params=sum(p.numel() for p in net.parameters()),
  )
  for line in sys.stdin:
    kind, layout = line.split()
    net = net.to(memory_format=_FORMATS[layout])
    images = images.to(memory_format=_FORMATS[layout])
    wait()
    began = time.perf_counter()
    kinds[kind]()
    wait()
    answer(seconds=time.perf_counter() - began)


if __name__ == '__main__':
  main()
