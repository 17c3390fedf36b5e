"""Published sizes and weights of the networks.

What these papers call FLOPs are multiply-accumulates.

Differences:
  * Several sizes are rounded: EfficientNet-B3 and B4 have 12.2 M and 19.3 M
    parameters in other publications.
  * The paper's ResNet-50 differs from the released one, which has 25.5 M.
  * The paper's F4+ has a group of 192 channels in its first stage, the released
    code one of 128; see `variants`.
  * The NF-RegNets are read off a plot. At their test size B2 and B5 halve an
    odd side, which 'SAME' padding rounds up.

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
    params: parameters in millions, None if not reported.
    macs: multiply-accumulates of one test image in 10⁹, None if not reported.
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


def _in_timm(name: str, tag: str) -> list[str]:
  return [f'hf-hub:timm/{name}.{tag}']


def _weights() -> dict[str, tuple[str, ...]]:
  weights = {
    f'nfnet_f{n}': ['released', *_in_timm(f'dm_nfnet_f{n}', 'dm_in1k')]
    for n in range(7)
  }
  weights['nf_resnet50'] = _in_timm('nf_resnet50', 'ra2_in1k')
  weights['nf_regnet_b1'] = _in_timm('nf_regnet_b1', 'ra2_in1k')
  # The original training, AutoAugment, RandAugment, AdvProp and NoisyStudent.
  for numbers, tag in (
    ('012345', 'in1k'),
    ('01234567', 'aa_in1k'),
    ('578', 'ra_in1k'),
    ('012345678', 'ap_in1k'),
    ('01234567', 'ns_jft_in1k'),
  ):
    for b in numbers:
      weights.setdefault(f'efficientnet_b{b}', []).extend(
        _in_timm(f'tf_efficientnet_b{b}', tag)
      )
  return {name: tuple(sources) for name, sources in weights.items()}


# Published ImageNet weights of each variant: 'released' by the authors, and the
# repositories of timm, for which `weights.timm.overrides` applies.
WEIGHTS: Mapping[str, tuple[str, ...]] = types.MappingProxyType(_weights())
