"""The paper's table 3: accuracy and latency.

Source: Brock et al. 2021, https://arxiv.org/abs/2102.06171. Accuracies are on
ImageNet in %; latencies are of a training step in bfloat16 on 32 TPUv3 cores
with 32 images each. Numbers that belong to one claim are in its file.
"""

import types
from collections.abc import Mapping
from typing import NamedTuple

DEVICES = 32
IMAGES_PER_DEVICE = 32
# Of one TPUv3 core: half of the 123 TFLOP/s of a chip.
PEAK_TFLOPS = 61.5


class Result(NamedTuple):
  """A result that `reproduce-f0` to `-f6` are compared with.

  Attributes:
    top_1: validation accuracy, in %.
    top_5: likewise.
    step_ms: milliseconds of a training step; None if not given.
    note: how the row differs from our run.
  """

  top_1: float
  top_5: float
  step_ms: float | None
  note: str = ''


# Without SAM.
RESULTS: Mapping[str, Result] = types.MappingProxyType(
  {
    'nfnet_f0': Result(83.6, 96.8, 73.3),
    'nfnet_f1': Result(84.7, 97.1, 158.5),
    'nfnet_f2': Result(85.1, 97.3, 295.8),
    'nfnet_f3': Result(85.7, 97.5, 532.2),
    'nfnet_f4': Result(85.9, 97.6, 1033.3),
    'nfnet_f5': Result(86.0, 97.6, 1398.5),
  }
)

_RHO = 'one run with SAM, whose ρ is not given'
WITH_SAM: Mapping[str, Result] = types.MappingProxyType(
  {
    'nfnet_f5': Result(86.3, 97.9, 1958.0, _RHO),
    'nfnet_f6': Result(86.5, 97.9, 2774.1, _RHO),
  }
)
# Fraction of the images that SAM sees twice.
SAM_FRACTION = 0.2


class Latency(NamedTuple):
  """A row of table 3.

  Attributes:
    gmacs: billions of multiply-accumulates at test size.
    params: millions of parameters.
    top_1: validation accuracy, in %.
    tpu_ms: milliseconds of a training step on TPUv3.
    gpu_ms: on one V100, in float16.
  """

  gmacs: float
  params: float
  top_1: float
  tpu_ms: float
  gpu_ms: float


LATENCY: Mapping[str, Latency] = types.MappingProxyType(
  {
    'resnet50': Latency(4.10, 26.0, 78.6, 41.6, 35.3),
    'efficientnet_b0': Latency(0.39, 5.3, 77.1, 51.1, 44.8),
    'senet50': Latency(4.09, 28.0, 79.4, 64.3, 59.4),
    'nfnet_f0': Latency(12.38, 71.5, 83.6, 73.3, 56.7),
    'efficientnet_b3': Latency(1.80, 12.0, 81.6, 129.5, 116.6),
    'nfnet_f1': Latency(35.54, 132.6, 84.7, 158.5, 133.9),
    'efficientnet_b4': Latency(4.20, 19.0, 82.9, 245.9, 221.6),
    'nfnet_f2': Latency(62.59, 193.8, 85.1, 295.8, 226.3),
    'efficientnet_b5': Latency(9.90, 30.0, 83.7, 450.5, 458.9),
    'nfnet_f3': Latency(114.76, 254.9, 85.7, 532.2, 524.5),
    'efficientnet_b6': Latency(19.00, 43.0, 84.0, 775.7, 868.2),
    'nfnet_f4': Latency(215.24, 316.1, 85.9, 1033.3, 1190.6),
    'efficientnet_b7': Latency(37.00, 66.0, 84.7, 1397.0, 1753.3),
    'nfnet_f5': Latency(289.76, 377.2, 86.0, 1398.5, 2177.1),
  }
)
