"""Sizes of the networks, as reported in the papers.

Parameters in millions and multiply-accumulates of one test image in 10⁹, as
printed there, or None where nothing is. "FLOPs" in these papers are
multiply-accumulates.

Differences:
  * Several are rounded: EfficientNet-B3 and B4 have 12.2 M and 19.3 M in other
    publications.
  * The ResNet-50 of the paper's table is not quite the released one, which has
    25.5 M.
  * F4+ is counted by the paper with one group of 192 channels in its first
    stage, where the released code makes one of 128; see `variants`.
  * The NF-RegNets are read off a plot. B2 and B5 have an odd side to halve at
    their test size, where 'SAME' padding rounds up.

Reference:
  Brock et al. 2021, tables 1, 3 and 5; for B1, B2 and B8 of EfficientNet
  Tan and Le 2019, https://arxiv.org/abs/1905.11946, table 2, and Brock et al.
  2021, table 3; for NF-RegNets Brock, De and Smith 2021,
  https://arxiv.org/abs/2101.08692, digitised.
"""

import types
from collections.abc import Mapping
from typing import NamedTuple


class Size(NamedTuple):
  """The reported size of a network.

  Attributes:
    params: millions of parameters, None if not reported.
    macs: 10⁹ multiply-accumulates at the test size, None if not reported.
  """

  params: float | None
  macs: float | None


SIZES: Mapping[str, Size] = types.MappingProxyType(
  {
    'nfnet_f0': Size(71.5, 12.38),
    'nfnet_f1': Size(132.6, 35.54),
    'nfnet_f2': Size(193.8, 62.59),
    'nfnet_f3': Size(254.9, 114.76),
    'nfnet_f4': Size(316.1, 215.24),
    'nfnet_f5': Size(377.2, 289.76),
    'nfnet_f6': Size(438.4, 377.28),
    'nfnet_f4plus': Size(527.0, 367.0),
    'resnet50': Size(26.0, 4.10),
    'senet50': Size(28.0, 4.09),
    'nf_regnet_b0': Size(None, 0.43),
    'nf_regnet_b1': Size(None, 0.73),
    'nf_regnet_b2': Size(None, 1.08),
    'nf_regnet_b3': Size(None, 1.98),
    'nf_regnet_b4': Size(None, 4.4),
    'nf_regnet_b5': Size(None, 10.5),
    'efficientnet_b0': Size(5.3, 0.39),
    'efficientnet_b1': Size(7.8, 0.70),
    'efficientnet_b2': Size(9.2, 1.0),
    'efficientnet_b3': Size(12.0, 1.80),
    'efficientnet_b4': Size(19.0, 4.20),
    'efficientnet_b5': Size(30.0, 9.90),
    'efficientnet_b6': Size(43.0, 19.0),
    'efficientnet_b7': Size(66.0, 37.0),
    'efficientnet_b8': Size(87.4, 62.5),
  }
)
