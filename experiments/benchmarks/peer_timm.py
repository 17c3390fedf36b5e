r"""Times forward and backward of a net beside timm's in PyTorch, in turn.

  python -m experiments.benchmarks.peer_timm --peer_python=PYTHON

PYTHON is the interpreter of an environment with torch and timm. Both run the
same architecture on random images and labels, float32, all cores, in training
mode; timm in the faster of contiguous and channels-last memory. timm runs in a
process of its own that waits between its steps, and the ratio is taken pair by
pair, so that a machine whose speed drifts does not decide the result.
"""

import argparse
import json
import os
import statistics
import subprocess
import time

from experiments.benchmarks import gradient_step

# What timm calls our nets; its `resnetv2` is the pre-activation ResNet.
_NAMES = {
  'nf_resnet50': 'nf_resnet50',
  'resnet50': 'resnetv2_50',
  'nfnet_f0': 'dm_nfnet_f0',
  'efficientnet_b0': 'tf_efficientnet_b0',
}

# Reads lines with a layout and answers each with the seconds of a step. Outside
# of this process nothing of torch is known.
_TIMM = """
import json, sys, time
import torch, timm
name, batch, size = json.loads(sys.argv[1])
torch.manual_seed(0)
net = timm.create_model(name).train()
formats = {'contiguous': torch.contiguous_format,
           'channels_last': torch.channels_last}
labels = torch.arange(batch) % 1000
images = torch.randn(batch, 3, size, size)
print(json.dumps({'torch': torch.__version__, 'timm': timm.__version__,
  'threads': torch.get_num_threads(),
  'params': sum(p.numel() for p in net.parameters())}), flush=True)
for line in sys.stdin:
  layout = formats[line.strip()]
  net, images = net.to(memory_format=layout), images.to(memory_format=layout)
  began = time.perf_counter()
  torch.nn.functional.cross_entropy(net(images), labels).backward()
  seconds = time.perf_counter() - began
  net.zero_grad()
  print(seconds, flush=True)
"""


class Peer:
  """timm's net in a process of its own."""

  def __init__(self, python: str, model: str, batch: int, size: int):
    """Starts it and finds the faster layout.

    Args:
      python: interpreter with torch and timm.
      model: our name.
      batch: images in a step.
      size: side of the images in pixels.

    Raises:
      RuntimeError: if it does not start; what it said is on stderr.
    """
    self._python = python
    name = _NAMES[model]
    self._process = subprocess.Popen(
      [python, '-c', _TIMM, json.dumps([name, batch, size])],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, 'OMP_NUM_THREADS': str(os.cpu_count())},
    )
    try:
      self.about = json.loads(self._read())
    except RuntimeError:
      self.close()
      raise
    self.name = name
    layouts = {}
    for layout in ('contiguous', 'channels_last'):
      self.step(layout)
      layouts[layout] = min(self.step(layout) for _ in range(2))
    self.layout = min(layouts, key=layouts.__getitem__)

  def step(self, layout: str) -> float:
    """Makes a step and returns its seconds."""
    assert self._process.stdin is not None
    self._process.stdin.write(f'{layout}\n')
    self._process.stdin.flush()
    return float(self._read())

  def _read(self) -> str:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(
        f'{self._python} ended; --peer_python must have torch and timm'
      )
    return line

  def close(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.communicate()


def main() -> None:
  """Prints a line for each net."""
  parser = argparse.ArgumentParser(description='Ours beside timm, in turn.')
  parser.add_argument(
    '--peer_python', required=True, help='interpreter with torch and timm'
  )
  parser.add_argument(
    '--models',
    nargs='+',
    choices=sorted(_NAMES),
    default=['nf_resnet50', 'resnet50'],
  )
  parser.add_argument('--batch', type=int, default=8, help='images in a step')
  parser.add_argument('--image_size', type=int, default=224, help='pixels')
  parser.add_argument(
    '--repeats', type=int, default=7, help='timed pairs, after two warm-ups'
  )
  args = parser.parse_args()
  for number, model in enumerate(args.models):
    peer = Peer(args.peer_python, model, args.batch, args.image_size)
    try:
      ours, compiled = gradient_step.gradient_step(
        False, model, args.batch, args.image_size
      )
      ours()
      peer.step(peer.layout)
      ours()
      seconds: dict[str, list[float]] = {'ours': [], 'timm': []}
      for _ in range(args.repeats):
        began = time.perf_counter()
        ours()
        seconds['ours'].append(time.perf_counter() - began)
        seconds['timm'].append(peer.step(peer.layout))
    finally:
      peer.close()
    ratios = [
      mine / theirs
      for mine, theirs in zip(seconds['ours'], seconds['timm'], strict=True)
    ]
    if number == 0:
      print(
        f'forward + backward, {args.image_size} px, batch {args.batch}, '
        f'float32, timm {peer.about["timm"]} on torch '
        f'{peer.about["torch"]} with {peer.about["threads"]} threads, '
        f'{args.repeats} pairs'
      )
    medians = {name: statistics.median(x) for name, x in seconds.items()}
    print(
      f'{model}: ours {medians["ours"]:.3f} s (compiled in {compiled:.0f} s), '
      f'timm {peer.name} {medians["timm"]:.3f} s ({peer.layout}, '
      f'{peer.about["params"]:,} parameters); ours / timm '
      f'{statistics.median(ratios):.2f} ({min(ratios):.2f} to '
      f'{max(ratios):.2f})',
      flush=True,
    )


if __name__ == '__main__':
  main()
