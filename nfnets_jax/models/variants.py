"""The variants of each family, as frozen data.

Differences:
  * The released code rounds bottlenecks down to whole groups of 128 channels,
    so the first stage of the "plus" nets has a bottleneck of 128, where the
    paper's 527 M parameters for F4+ imply 192. The variants follow the code;
    `create('nfnet_f4plus', group_width=(192, 128, 128, 128))` is the paper's.
  * `skipinit_resnet50` and `fixup_resnet50` differ from the released ones in
    details; see `resnet` and `fixup_resnet`.

Reference:
  Brock et al. 2021, table 1 and appendix A.5; Brock, De and Smith 2021,
  https://arxiv.org/abs/2101.08692; Tan and Le 2019,
  https://arxiv.org/abs/1905.11946.
"""

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any

from nfnets_jax.models.settings import (
  BottleneckSettings,
  EfficientNetSettings,
  NFNetSettings,
  NFRegNetSettings,
  NFResNetSettings,
  ResNetSettings,
  Settings,
)


@dataclasses.dataclass(frozen=True)
class Variant:
  """A network and its recipe.

  Attributes:
    family: module that builds it, such as 'nfnet'.
    settings: settings of the network.
    train_size: side of the training images in pixels.
    test_size: side of the test images in pixels.
    rand_augment: RandAugment policy, `<layers>x<magnitude>`, or None.
  """

  family: str
  settings: Settings
  train_size: int
  test_size: int
  rand_augment: str | None


_WIDTH = (256, 512, 1536, 1536)
_PLUS_WIDTH = (384, 768, 2048, 2048)

# N: (dropout rate, training size, test size, RandAugment); the depth is
# (N + 1) times (1, 2, 6, 3).
_NFNET_ROWS = (
  (0.2, 192, 256, '4x5'),
  (0.3, 224, 320, '4x10'),
  (0.4, 256, 352, '4x10'),
  (0.4, 320, 416, '4x15'),
  (0.5, 384, 512, '4x15'),
  (0.5, 416, 544, '4x15'),
  (0.5, 448, 576, '4x15'),
  (0.5, 480, 608, '4x15'),
)


def _nfnets() -> dict[str, Variant]:
  variants = {}
  for n, (drop_rate, train_size, test_size, policy) in enumerate(_NFNET_ROWS):
    depth = tuple(stage * (n + 1) for stage in (1, 2, 6, 3))
    for suffix, width in (('', _WIDTH), ('plus', _PLUS_WIDTH)):
      variants[f'nfnet_f{n}{suffix}'] = Variant(
        family='nfnet',
        settings=NFNetSettings(
          width=width,
          depth=depth,
          stem_width=(16, 32, 64, width[0] // 2),
          drop_rate=drop_rate,
        ),
        train_size=train_size,
        test_size=test_size,
        rand_augment=policy,
      )
  return variants


# Blocks of each stage, by the number of layers.
_RESNET_DEPTHS = {
  50: (3, 4, 6, 3),
  101: (3, 4, 23, 3),
  152: (3, 8, 36, 3),
  200: (3, 24, 36, 3),
  288: (24, 24, 24, 24),
  600: (50, 50, 50, 50),
}


def _resnets() -> dict[str, Variant]:
  def variant(family: str, settings: Settings) -> Variant:
    return Variant(
      family=family,
      settings=settings,
      train_size=224,
      test_size=224,
      rand_augment=None,
    )

  variants = {
    f'{family}{layers}': variant(family, settings(depth=depth))
    for family, settings in (
      ('nf_resnet', NFResNetSettings),
      ('resnet', ResNetSettings),
    )
    for layers, depth in _RESNET_DEPTHS.items()
  }
  depth = _RESNET_DEPTHS[50]
  variants['senet50'] = variant(
    'resnet', ResNetSettings(depth=depth, use_se=True, se_ratio=1 / 16)
  )
  variants['skipinit_resnet50'] = variant(
    'resnet',
    ResNetSettings(depth=depth, norm=None, skipinit=True, stochdepth_rate=0.1),
  )
  variants['fixup_resnet50'] = variant(
    'fixup_resnet', BottleneckSettings(depth=depth, stochdepth_rate=0.1)
  )
  return variants


# B: (width of RegNet, depth, dropout rate, training size, test size); the
# NF-RegNet has three quarters of the width.
_REGNET_ROWS = (
  ((48, 104, 208, 440), (1, 3, 6, 6), 0.2, 192, 224),
  ((48, 104, 208, 440), (2, 4, 7, 7), 0.2, 224, 256),
  ((56, 112, 232, 488), (2, 4, 8, 8), 0.3, 240, 272),
  ((56, 128, 248, 528), (2, 5, 9, 9), 0.3, 288, 320),
  ((64, 144, 288, 616), (2, 6, 11, 11), 0.4, 320, 384),
  ((80, 168, 336, 704), (3, 7, 14, 14), 0.4, 384, 456),
  ((88, 184, 376, 792), (3, 8, 16, 16), 0.5, 448, 528),
  ((96, 208, 416, 880), (4, 10, 19, 19), 0.5, 512, 600),
  ((104, 232, 456, 968), (4, 11, 22, 22), 0.5, 600, 672),
)


def _nf_regnets() -> dict[str, Variant]:
  variants = {}
  for b, (width, depth, drop_rate, train_size, test_size) in enumerate(
    _REGNET_ROWS
  ):
    variants[f'nf_regnet_b{b}'] = Variant(
      family='nf_regnet',
      settings=NFRegNetSettings(
        width=tuple(channels * 3 // 4 for channels in width),
        depth=depth,
        drop_rate=drop_rate,
      ),
      train_size=train_size,
      test_size=test_size,
      rand_augment=None,
    )
  return variants


# B: (factor of the widths, of the depths, dropout rate, image size).
_EFFICIENTNET_ROWS = (
  (1.0, 1.0, 0.2, 224),
  (1.0, 1.1, 0.2, 240),
  (1.1, 1.2, 0.3, 260),
  (1.2, 1.4, 0.3, 300),
  (1.4, 1.8, 0.4, 380),
  (1.6, 2.2, 0.4, 456),
  (1.8, 2.6, 0.5, 528),
  (2.0, 3.1, 0.5, 600),
  (2.2, 3.6, 0.5, 672),
)


def _efficientnets() -> dict[str, Variant]:
  def channels(factor: float, width: int) -> int:
    """Rounds to a multiple of 8, at most a tenth down."""
    scaled = factor * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded

  variants = {}
  for b, (wider, deeper, drop_rate, size) in enumerate(_EFFICIENTNET_ROWS):
    widths = (channels(wider, c) for c in (16, 24, 40, 80, 112, 192, 320))
    depths = (math.ceil(deeper * d) for d in (1, 2, 2, 3, 3, 4, 1))
    variants[f'efficientnet_b{b}'] = Variant(
      family='efficientnet',
      settings=EfficientNetSettings(
        width=tuple(widths),
        depth=tuple(depths),
        stem_width=channels(wider, 32),
        final_width=channels(wider, 1280),
        drop_rate=drop_rate,
      ),
      train_size=size,
      test_size=size,
      rand_augment=None,
    )
  return variants


# For tests and images of about 32 pixels: three stages, a stem of stride 2.
_TINY = Variant(
  family='nfnet',
  settings=NFNetSettings(
    width=(64, 128, 256),
    depth=(1, 2, 1),
    strides=(1, 2, 2),
    group_width=(32, 32, 32),
    stem_width=(16, 32),
    stem_strides=(1, 2),
    drop_rate=0.1,
    stochdepth_rate=0.1,
  ),
  train_size=32,
  test_size=32,
  rand_augment=None,
)

VARIANTS: Mapping[str, Variant] = types.MappingProxyType(
  {
    **_nfnets(),
    **_resnets(),
    **_nf_regnets(),
    **_efficientnets(),
    'nfnet_tiny': _TINY,
  }
)


def get(name: str) -> Variant:
  """Returns a variant by name.

  Raises:
    ValueError: if there is no such variant; the message lists them all.

  Example:
    >>> get('nfnet_f1').test_size
    320
  """
  if name not in VARIANTS:
    raise ValueError(
      f'unknown model {name!r}; choose one of {", ".join(sorted(VARIANTS))}'
      + _did_you_mean(str(name), VARIANTS)
    )
  return VARIANTS[name]


def arguments(name: str) -> dict[str, Any]:
  """Returns the overridable arguments of `create` with the variant's values.

  Raises:
    ValueError: if there is no such variant.

  Example:
    >>> arguments('nfnet_f1')['depth']
    (2, 4, 12, 6)
  """
  return dataclasses.asdict(get(name).settings)


def override(name: str, overrides: Mapping[str, Any]) -> Settings:
  """Returns a variant's settings with some replaced.

  Raises:
    ValueError: if the variant or a setting does not exist, or a value is
      invalid.

  Example:
    >>> override('nfnet_f1', {'drop_rate': 0.0}).drop_rate
    0.0
  """
  known = arguments(name)
  unknown = sorted(set(overrides) - set(known))
  if unknown:
    raise ValueError(
      f'{name} has no argument {", ".join(unknown)}; it takes '
      f'{", ".join(sorted(known))}' + _did_you_mean(unknown[0], known)
    )
  return dataclasses.replace(get(name).settings, **overrides)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
  near = difflib.get_close_matches(name, known)
  return f' (did you mean {" or ".join(near)}?)' if near else ''
