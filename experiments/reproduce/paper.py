"""What the paper reports of the nets, to set beside what a run measured.

Source: Brock et al. 2021, tables 1 and 3. Latencies are of a training step on
32 TPUv3 cores with 32 images each, in bfloat16.
"""

import types
from collections.abc import Mapping
from typing import NamedTuple

DEVICES = 32
IMAGES_PER_DEVICE = 32
# Of one TPUv3 core: half of the 123 TFLOP/s that Google gives for a chip.
PEAK_TFLOPS = 61.5


class Result(NamedTuple):
  """A row of table 3.

  Attributes:
    top_1: accuracy on the validation images, in %.
    top_5: likewise.
    step_ms: milliseconds of a training step, None where it is not given.
    note: how the row differs from a plain run.
  """

  top_1: float
  top_5: float
  step_ms: float | None
  note: str = ''


RESULTS: Mapping[str, Result] = types.MappingProxyType(
  {
    'nfnet_f0': Result(83.6, 96.8, 73.3),
    'nfnet_f1': Result(84.7, 97.1, 158.5),
    'nfnet_f2': Result(85.1, 97.3, 295.8),
    'nfnet_f3': Result(85.7, 97.5, 532.2),
    'nfnet_f4': Result(85.9, 97.6, 1033.3),
    'nfnet_f5': Result(86.0, 97.6, 1398.5),
    'nfnet_f6': Result(86.5, 97.9, None, 'with SAM, which this run lacks'),
  }
)
