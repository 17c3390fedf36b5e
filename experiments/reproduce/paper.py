"""What the paper reports, to set beside what a run measured.

Source: Brock et al. 2021, https://arxiv.org/abs/2102.06171. Accuracies are
top-1 on ImageNet in %; latencies are of a training step on 32 TPUv3 cores with
32 images each, in bfloat16. What was read off a figure is right to some 0.05.
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

# Figure 2a: by net, at batches of 256 to 4096; None where the training failed,
# that is fell below the figure's 70 %. Digitised.
BATCH_SIZES = (256, 512, 1024, 2048, 4096)
BATCH_SIZE: Mapping[str, tuple[float | None, ...]] = types.MappingProxyType(
  {
    'BN-ResNet-50': (76.9, 76.8, 76.4, 76.8, 76.8),
    'NF-ResNet-50': (76.6, 76.7, 76.9, 76.9, None),
    'NF-ResNet-50 + AGC': (76.79, 76.94, 76.95, 76.93, 76.72),
    'BN-ResNet-200': (78.70, 78.99, 78.89, 79.0, 78.88),
    'NF-ResNet-200': (79.3, 79.5, 79.5, 79.6, None),
    'NF-ResNet-200 + AGC': (79.19, 79.43, 79.59, 79.46, 79.16),
  }
)

# Table 2, with the last two rows of the table in the appendix: F0 to F3.
ABLATION: Mapping[str, tuple[float, ...]] = types.MappingProxyType(
  {
    'baseline': (80.4, 81.7, 82.0, 82.3),
    'modified_width': (80.9, 81.8, 82.0, 82.3),
    'second_conv': (81.3, 82.2, 82.4, 82.7),
    'mixup': (82.2, 82.9, 83.1, 83.5),
    'rand_augment': (83.2, 84.6, 84.8, 85.0),
    'cutmix': (83.6, 84.7, 85.1, 85.7),
    'default_width': (83.1, 84.5, 85.0, 85.5),
    'batch_norm': (83.4, 84.4, 85.1, 85.5),
  }
)


# What it says where it prints no numbers, or beside them.
WORDS: Mapping[str, str] = types.MappingProxyType(
  {
    'clipping': 'the numbers of figure 2b could not be read off; in words, a '
    'smaller λ is needed for stability as the batch grows, and 0.01 is used at '
    '4096.',
    'clip-methods': 'no numbers; in words, clipping by the global norm bears '
    'larger batches than none, but its threshold is sensitive and has to be '
    'tuned anew with depth, batch and rate; LARS is stable at large batches '
    'and less accurate.',
    'clip-layers': 'no numbers; in words, at batch 4096 and λ 0.01 not to clip '
    'the last linear layer is always better, the first convolution can often '
    'be left unclipped, and all four stages must be clipped.',
    'regularisation': 'dropout grows with the net, stochastic depth is 0.25 in '
    'all; the accuracies of F5 and F6 with SAM.',
  }
)


class Latency(NamedTuple):
  """A row of table 3.

  Attributes:
    gmacs: billions of multiply-accumulates at the test size.
    params: millions.
    top_1: in %.
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

# Table 3: the nets that were trained with sharpness-aware minimisation.
SAM: Mapping[str, float] = types.MappingProxyType(
  {'nfnet_f5': 86.3, 'nfnet_f6': 86.5}
)

# Table 4: fine-tuned from JFT-300M at 224, 320 and 384 pixels.
TRANSFER: Mapping[str, tuple[float, ...]] = types.MappingProxyType(
  {
    'BN-ResNet-50': (78.1, 79.6, 79.9),
    'NF-ResNet-50': (79.5, 80.9, 81.1),
    'BN-ResNet-101': (80.8, 82.2, 82.5),
    'NF-ResNet-101': (81.4, 82.7, 83.2),
    'BN-ResNet-152': (81.8, 83.1, 83.4),
    'NF-ResNet-152': (82.7, 83.6, 84.0),
    'BN-ResNet-200': (81.8, 83.1, 83.5),
    'NF-ResNet-200': (82.9, 84.1, 84.3),
  }
)

# Brock, De and Smith 2021, https://arxiv.org/abs/2101.08692, from a secondary
# source: at batches of 4.
MICROBATCH: Mapping[str, float] = types.MappingProxyType(
  {'BN-ResNet-50': 55.7, 'NF-ResNet-50': 69.9}
)
