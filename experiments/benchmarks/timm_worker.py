"""Training steps of timm's nets in PyTorch.

As a program, it is started by `timm_peer` in an interpreter with torch and
timm. Its argument is the arguments of `Net` in JSON. To each line of its input,
'KIND LAYOUT', it answers with the seconds that it took.
"""

import json
import sys
import time
from collections.abc import Callable

import timm
import torch
from timm.utils import ModelEmaV3
from timm.utils.agc import adaptive_clip_grad

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
_LAYOUTS = {
  'contiguous': torch.contiguous_format,
  'channels_last': torch.channels_last,
}


class Net:
  """A net, its optimizer and a batch of random images.

  Attributes:
    net: the module.
  """

  def __init__(
    self,
    name: str,
    batch: int,
    image_size: int,
    *,
    agc: bool,
    ema: bool,
    half: bool,
  ):
    """Creates them on the device.

    Args:
      name: timm's name of the net.
      batch: number of images.
      image_size: side in pixels.
      agc: whether to clip gradients.
      ema: whether to average the weights.
      half: whether to use mixed precision in bfloat16.
    """
    torch.manual_seed(0)
    self.net = timm.create_model(name, num_classes=1000).to(DEVICE).train()
    self._forward: Callable = self.net
    shape = (batch, 3, image_size, image_size)
    self._images = torch.randn(shape, device=DEVICE)
    self._labels = torch.arange(batch, device=DEVICE) % 1000
    parameters = list(self.net.named_parameters())
    decayed = [p for n, p in parameters if n.endswith('weight')]
    others = [p for n, p in parameters if not n.endswith('weight')]
    self._optimizer = torch.optim.SGD(
      [
        {'params': decayed, 'weight_decay': 2e-5},
        {'params': others, 'weight_decay': 0.0},
      ],
      lr=1e-6,
      momentum=0.9,
      nesterov=True,
    )
    self._ema = ModelEmaV3(self.net, decay=0.99999) if ema else None
    # timm excludes the classifier's weight and bias.
    self._clipped = list(self.net.parameters())[:-2] if agc else []
    self._half = half

  def set_layout(self, layout: str) -> None:
    """Converts to 'contiguous' or 'channels_last'."""
    self.net.to(memory_format=_LAYOUTS[layout])
    if self._ema is not None:
      self._ema.to(memory_format=_LAYOUTS[layout])
    self._images = self._images.to(memory_format=_LAYOUTS[layout])

  def compile(self) -> None:
    """Compiles the forward and backward pass."""
    self._forward = torch.compile(self.net)

  def _logits(self) -> torch.Tensor:
    with torch.autocast(DEVICE, torch.bfloat16, enabled=self._half):
      return self._forward(self._images)

  def forward(self) -> None:
    """Runs inference."""
    self.net.eval()
    with torch.inference_mode():
      self._logits()
    self.net.train()

  def gradient(self) -> None:
    """Runs the forward and backward pass."""
    self._optimizer.zero_grad()
    logits = self._logits().float()
    torch.nn.functional.cross_entropy(logits, self._labels).backward()

  def step(self) -> None:
    """Runs a training step."""
    self.gradient()
    if self._clipped:
      adaptive_clip_grad(self._clipped, 0.01, 1e-3)
    self._optimizer.step()
    if self._ema is not None:
      self._ema.update(self.net)


def wait() -> None:
  """Waits until the device has finished."""
  if DEVICE == 'cuda':
    torch.cuda.synchronize()


def main() -> None:
  """Answers requests until the input ends."""
  net = Net(**json.loads(sys.argv[1]))

  def answer(**values: object) -> None:
    print(json.dumps(values), flush=True)

  answer(
    torch=torch.__version__,
    timm=timm.__version__,
    threads=torch.get_num_threads(),
    device=DEVICE,
    params=sum(p.numel() for p in net.net.parameters()),
  )
  for line in sys.stdin:
    kind, layout = line.split()
    net.set_layout(layout)
    wait()
    began = time.perf_counter()
    getattr(net, kind)()
    wait()
    answer(seconds=time.perf_counter() - began)


if __name__ == '__main__':
  main()
