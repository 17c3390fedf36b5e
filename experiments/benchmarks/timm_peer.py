"""A net of timm in PyTorch, in another process."""

import json
import os
import pathlib
import subprocess
from typing import Any

# timm's names of our nets; `resnetv2` is the pre-activation ResNet.
NAMES = {
  'resnet50': 'resnetv2_50',
  'resnet101': 'resnetv2_101',
  **{f'nfnet_f{i}': f'dm_nfnet_f{i}' for i in range(7)},
  **{f'nf_resnet{depth}': f'nf_resnet{depth}' for depth in (50, 101)},
  **{f'nf_regnet_b{i}': f'nf_regnet_b{i}' for i in range(6)},
  **{f'efficientnet_b{i}': f'tf_efficientnet_b{i}' for i in range(9)},
}


class Peer:
  """A net of timm that runs programs on demand.

  Attributes:
    about: name, versions, threads, device and number of parameters.
    layout: the faster memory layout of each program.
  """

  def __init__(
    self, python: str, model: str, kinds: list[str], **task: Any
  ) -> None:
    """Starts the process and finds the faster layouts.

    Args:
      python: interpreter with torch and timm.
      model: one of `NAMES`.
      kinds: some of 'forward', 'gradient' and 'step'.
      **task: arguments of `timm_worker.Net` other than the name.

    Raises:
      RuntimeError: if it does not start; its own error is on stderr.
    """
    self._python = python
    program = pathlib.Path(__file__).with_name('timm_worker.py')
    task = {'name': NAMES[model], **task}
    try:
      self._process = subprocess.Popen(
        [python, str(program), json.dumps(task)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': str(os.cpu_count())},
      )
    except OSError as error:
      raise RuntimeError(
        f'--peer_python={python} does not start: {error}'
      ) from error
    try:
      self.about = {'name': NAMES[model], **self._read()}
      self.layout = {kind: self._find_layout(kind) for kind in kinds}
    except RuntimeError:
      self.close()
      raise

  def _find_layout(self, kind: str) -> str:
    best = {}
    for layout in ('contiguous', 'channels_last'):
      self._run(kind, layout)  # warms up
      best[layout] = min(self._run(kind, layout) for _ in range(2))
    return min(best, key=best.__getitem__)

  def run(self, kind: str) -> float:
    """Runs a program once and returns its seconds."""
    return self._run(kind, self.layout[kind])

  def _run(self, kind: str, layout: str) -> float:
    assert self._process.stdin is not None
    self._process.stdin.write(f'{kind} {layout}\n')
    self._process.stdin.flush()
    return float(self._read()['seconds'])

  def _read(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(
        f'{self._python} ended; --peer_python must have torch and timm'
      )
    return json.loads(line)

  def close(self) -> None:
    """Kills the process."""
    self._process.kill()
    self._process.communicate()
