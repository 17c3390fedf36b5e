"""The settings of each family, and the variants as frozen data.

A variant has two parts. `settings` describes its net; the rest belongs to its
recipe (image sizes in pixels and the RandAugment policy), which the experiment
files read.

Differences:
  * The published code rounds a stage's bottleneck down to whole groups of 128
    channels, so stage 1 of every "plus" net has a bottleneck of 128 where the
    paper's count of 527 M parameters for F4+ asks for 192. The variants are the
    code's; `create('nfnet_f4plus', group_width=(192, 128, 128, 128))` is the
    paper's.
  * The baselines `skipinit_resnet50` and `fixup_resnet50` are not the released
    ones in every detail; see `resnet` and `fixup_resnet` for where they differ.

Reference:
  Brock et al. 2021, table 1 and appendix A.5; Brock, De and Smith 2021,
  https://arxiv.org/abs/2101.08692; Tan and Le 2019,
  https://arxiv.org/abs/1905.11946.
"""

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What all families share.

  Attributes:
    width: output channels of each stage.
    depth: number of blocks of each stage.
    strides: of the first block of each stage.
    drop_rate: dropout on the pooled features, in [0, 1).
    stochdepth_rate: of n blocks, block i (from 0) drops the residual branch of
      an image with probability stochdepth_rate · i / n. In [0, 1).
  """

  width: Sequence[int]
  depth: Sequence[int]
  strides: Sequence[int]
  drop_rate: float
  stochdepth_rate: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class NFNetSettings(Settings):
  """NFNet; the defaults are what F0 to F7 share.

  Attributes:
    group_width: channels per group of the 3×3 convolutions, of each stage.
    expansion: bottleneck channels relative to the stage's width.
    stem_width: channels of the stem's 3×3 convolutions. The last entry is half
      of `width[0]` in the released nets.
    stem_strides: of the stem's convolutions.
    use_two_convs: whether a block has a second 3×3 convolution.
    se_ratio: hidden channels of the squeeze-excite gate relative to the stage's
      width.
    alpha: α, scale of the residual branches.
    activation: one of `activations.NAMES`.
    final_conv_mult: channels of the last convolution relative to `width[-1]`.
    norm: None; or 'batch' for the net of the ablation; see `bn_nfnet`.
    cross_replica_axis: with `norm`, name of the mapped axis of devices whose
      images the statistics are taken over; None takes each device's own.
  """

  strides: Sequence[int] = (1, 2, 2, 2)
  stochdepth_rate: float = 0.25
  group_width: Sequence[int] = (128, 128, 128, 128)
  expansion: float = 0.5
  stem_width: Sequence[int] = (16, 32, 64, 128)
  stem_strides: Sequence[int] = (2, 1, 1, 2)
  use_two_convs: bool = True
  se_ratio: float = 0.5
  alpha: float = 0.2
  activation: str = 'gelu'
  final_conv_mult: int = 2
  norm: str | None = None
  cross_replica_axis: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckSettings(Settings):
  """What the ResNets share, and all that a FixUp ResNet has.

  Attributes:
    expansion: bottleneck channels relative to the stage's width.
    stem_width: channels of the stem's 7×7 convolution.
    stem_stride: of that convolution.
    stem_pool: whether a 3×3 max-pooling of stride 2 follows it.
  """

  width: Sequence[int] = (256, 512, 1024, 2048)
  strides: Sequence[int] = (1, 2, 2, 2)
  drop_rate: float = 0.0
  stochdepth_rate: float = 0.0
  expansion: float = 0.25
  stem_width: int = 64
  stem_stride: int = 2
  stem_pool: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class NFResNetSettings(BottleneckSettings):
  """NF-ResNet; the defaults are what all depths share.

  Attributes:
    use_se: whether the blocks have squeeze-excite gates.
    se_ratio: hidden channels of the gates relative to the stage's width.
    skipinit: whether each branch has a learnt scale, zero at first.
    alpha: α, scale of the residual branches.
    activation: one of `activations.NAMES`.
    padding: of convolutions and pooling with a stride: 'same', or 'symmetric'
      as in PyTorch.
    pool_shortcut: whether strided shortcuts average 2×2 pixels, as in timm,
      instead of picking every other one.
  """

  stochdepth_rate: float = 0.1
  use_se: bool = False
  se_ratio: float = 0.25
  skipinit: bool = True
  alpha: float = 0.2
  activation: str = 'relu'
  padding: str = 'same'
  pool_shortcut: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class NFRegNetSettings(Settings):
  """NF-RegNet; the defaults are what B0 to B8 share.

  The stem has as many channels as the first stage.

  Attributes:
    group_width: channels per group of the 3×3 convolutions.
    expansion: channels inside a block relative to those of its input; the first
      block has 1.
    stem_stride: of the stem's 3×3 convolution.
    se_ratio: hidden channels of the gate relative to those inside the block.
    alpha: α, scale of the residual branches.
    activation: one of `activations.NAMES`.
    padding: of convolutions with a stride: 'same', or 'symmetric' as in
      PyTorch.
    rounding: 'down', as released, makes the channels inside a block whole
      groups, and the gate's any number; 'nearest', as in timm, rounds both to
      the nearest whole groups.
    final_width: channels of the last convolution; None takes 1280 / 440 times
      those of the last stage.
  """

  strides: Sequence[int] = (2, 2, 2, 2)
  stochdepth_rate: float = 0.1
  group_width: int = 8
  expansion: float = 2.25
  stem_stride: int = 2
  se_ratio: float = 0.5
  alpha: float = 0.2
  activation: str = 'silu'
  padding: str = 'same'
  rounding: str = 'down'
  final_width: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetSettings(BottleneckSettings):
  """ResNet; the defaults are what all depths share.

  Attributes:
    norm: 'batch' for batch normalisation, or None for no normalisation; the
      convolutions then have biases.
    cross_replica_axis: name of the mapped axis of devices whose images the
      statistics are taken over; None takes each device's own.
    use_se: whether the blocks have squeeze-excite gates, as in SENet.
    se_ratio: hidden channels of the gates relative to the stage's width.
    skipinit: whether each branch has a learnt scale, zero at first.
  """

  norm: str | None = 'batch'
  cross_replica_axis: str | None = None
  use_se: bool = False
  se_ratio: float = 0.25
  skipinit: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientNetSettings(Settings):
  """EfficientNet; the defaults are what B0 to B8 share.

  Only blocks that add their input have stochastic depth.

  Attributes:
    stem_width: channels of the stem's 3×3 convolution.
    final_width: channels of the last convolution.
    kernel_sizes: of the depthwise convolutions of each stage, in pixels.
    expansions: channels inside the blocks of each stage, relative to those of
      their input. At 1 a block has no first convolution.
    stem_stride: of the stem's convolution.
    se_ratio: hidden channels of the squeeze-excite gate, relative to those of
      the block's input.
    cross_replica_axis: name of the mapped axis of devices whose images the
      statistics are taken over; None takes each device's own.
  """

  strides: Sequence[int] = (1, 2, 2, 2, 1, 2, 1)
  stochdepth_rate: float = 0.2
  stem_width: int
  final_width: int
  kernel_sizes: Sequence[int] = (3, 3, 5, 3, 5, 5, 3)
  expansions: Sequence[int] = (1, 6, 6, 6, 6, 6, 6)
  stem_stride: int = 2
  se_ratio: float = 0.25
  cross_replica_axis: str | None = None


@dataclasses.dataclass(frozen=True)
class Variant:
  """One network of a family.

  Attributes:
    family: the module that builds it, such as `nfnet`.
    settings: of the net.
    train_size: side of the training images, in pixels.
    test_size: side of the test images, in pixels.
    rand_augment: RandAugment policy, `<layers>x<magnitude>`, or None for none.
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


# A net for tests, demonstrations and images of about 32 pixels: the same blocks
# in three stages, with a stem that keeps half the resolution.
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
  """Returns the variant called `name`.

  Args:
    name: a key of `VARIANTS`.

  Returns:
    The frozen variant.

  Raises:
    ValueError: if there is no such variant; the message lists those there are.

  Example:
    >>> get('nfnet_f1').test_size
    320
  """
  if name not in VARIANTS:
    near = difflib.get_close_matches(str(name), VARIANTS)
    raise ValueError(
      f'unknown model {name!r}; choose one of {", ".join(sorted(VARIANTS))}'
      + (f' (did you mean {" or ".join(near)}?)' if near else '')
    )
  return VARIANTS[name]
