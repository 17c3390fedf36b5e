"""The settings of each family, checked on construction.

They also tell channels and strides of the feature maps, without a network.
"""

import abc
import dataclasses
import itertools
import operator
from collections.abc import Sequence
from typing import NamedTuple

from nfnets_jax.models import checks


class FeatureMap(NamedTuple):
  """The size of a feature map `[B, H / stride, W / stride, channels]`."""

  channels: int
  stride: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(abc.ABC):
  """Settings of all families.

  Attributes:
    width: output channels of each stage.
    depth: number of blocks of each stage.
    strides: of the first block of each stage.
    drop_rate: dropout on the pooled features, in [0, 1).
    stochdepth_rate: block i of n drops the residual branch of an image with
      probability stochdepth_rate · i / n; in [0, 1).
  """

  width: Sequence[int]
  depth: Sequence[int]
  strides: Sequence[int]
  drop_rate: float
  stochdepth_rate: float

  def __post_init__(self):
    """Raises a ValueError that names the first invalid setting."""
    checks.stages(width=self.width, depth=self.depth, strides=self.strides)
    checks.rates(drop_rate=self.drop_rate, stochdepth_rate=self.stochdepth_rate)
    # Settings of the same name mean the same in all families.
    fields = vars(self)
    factors = ('expansion', 'se_ratio', 'alpha')
    checks.factors(**{x: fields[x] for x in factors if x in fields})
    if 'activation' in fields:
      checks.activation(fields['activation'])
    if 'padding' in fields:
      checks.padding(fields['padding'])
    if 'norm' in fields:
      checks.norm(fields['norm'], fields['cross_replica_axis'])
    for field in dataclasses.fields(self):
      if field.type is bool:
        checks.choice(field.name, fields[field.name], (True, False))

  @property
  @abc.abstractmethod
  def stem_maps(self) -> list[FeatureMap]:
    """The outputs of the stem's layers; blocks start from the last."""

  @property
  def last_channels(self) -> int:
    """The channels of the last feature map."""
    return self.width[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NFNetSettings(Settings):
  """Settings of NFNets; the defaults are those of F0 to F7.

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
    activation: one of `checks.ACTIVATIONS`.
    final_conv_mult: channels of the last convolution relative to `width[-1]`.
    norm: None, or 'batch' for the net of the ablation; see `bn_nfnet`.
    cross_replica_axis: mapped axis of devices to average batch statistics over;
      None keeps them per device. Requires `norm`.
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

  def __post_init__(self):
    super().__post_init__()
    checks.stages(depth=self.depth, group_width=self.group_width)
    checks.stages(
      'convolution', stem_width=self.stem_width, stem_strides=self.stem_strides
    )
    checks.counts(final_conv_mult=self.final_conv_mult)

  @property
  def stem_maps(self) -> list[FeatureMap]:
    """See `Settings`."""
    strides = itertools.accumulate(self.stem_strides, operator.mul)
    return list(map(FeatureMap, self.stem_width, strides))

  @property
  def last_channels(self) -> int:
    """See `Settings`."""
    return self.final_conv_mult * self.width[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckSettings(Settings):
  """Settings of all ResNets; a FixUp ResNet has no others.

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

  def __post_init__(self):
    super().__post_init__()
    checks.counts(stem_width=self.stem_width, stem_stride=self.stem_stride)

  @property
  def stem_maps(self) -> list[FeatureMap]:
    """See `Settings`."""
    conv = FeatureMap(self.stem_width, self.stem_stride)
    pool = FeatureMap(self.stem_width, 2 * self.stem_stride)
    return [conv, pool] if self.stem_pool else [conv]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NFResNetSettings(BottleneckSettings):
  """Settings of NF-ResNets; the defaults are those of all depths.

  Attributes:
    use_se: whether the blocks have squeeze-excite gates.
    se_ratio: hidden channels of the gates relative to the stage's width.
    skipinit: whether each branch has a learnable scale, initially zero.
    alpha: α, scale of the residual branches.
    activation: one of `checks.ACTIVATIONS`.
    padding: of strided convolutions and pooling: 'same', or 'symmetric' as in
      PyTorch.
    pool_shortcut: whether strided shortcuts average 2×2 pixels, as in timm,
      instead of subsampling.
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
  """Settings of NF-RegNets; the defaults are those of B0 to B8.

  The stem has as many channels as the first stage.

  Attributes:
    group_width: channels per group of the 3×3 convolutions.
    expansion: channels inside a block relative to its input; 1 in the first
      block.
    stem_stride: of the stem's 3×3 convolution.
    se_ratio: hidden channels of the gate relative to the channels it gates.
    alpha: α, scale of the residual branches.
    activation: one of `checks.ACTIVATIONS`.
    padding: of strided convolutions: 'same', or 'symmetric' as in PyTorch.
    rounding: 'down', as released, rounds the channels inside a block down to
      whole groups, and not those of the gate; 'nearest', as in timm, rounds
      both to the nearest whole groups.
    final_width: channels of the last convolution; None means 1280 / 440 times
      the last stage's.
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

  def __post_init__(self):
    super().__post_init__()
    checks.counts(
      group_width=self.group_width,
      stem_stride=self.stem_stride,
      final_width=self.last_channels,
    )
    checks.choice('rounding', self.rounding, ('down', 'nearest'))

  @property
  def stem_maps(self) -> list[FeatureMap]:
    """See `Settings`."""
    return [FeatureMap(self.width[0], self.stem_stride)]

  @property
  def last_channels(self) -> int:
    """See `Settings`."""
    if self.final_width is not None:
      return self.final_width
    # The first RegNet of this shape had 1280 channels after a stage of 440.
    return 1280 * self.width[-1] // 440


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetSettings(BottleneckSettings):
  """Settings of ResNets; the defaults are those of all depths.

  Attributes:
    norm: 'batch' for batch normalisation; None for convolutions with biases
      instead.
    cross_replica_axis: as in `NFNetSettings`.
    use_se: whether the blocks have squeeze-excite gates, as in SENet.
    se_ratio: hidden channels of the gates relative to the stage's width.
    skipinit: whether each branch has a learnable scale, initially zero.
  """

  norm: str | None = 'batch'
  cross_replica_axis: str | None = None
  use_se: bool = False
  se_ratio: float = 0.25
  skipinit: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientNetSettings(Settings):
  """Settings of EfficientNets; the defaults are those of B0 to B8.

  Stochastic depth applies only to blocks with a skip connection.

  Attributes:
    stem_width: channels of the stem's 3×3 convolution.
    final_width: channels of the last convolution.
    kernel_sizes: of the depthwise convolutions of each stage, in pixels.
    expansions: channels inside the blocks of each stage relative to their
      input; blocks with 1 have no first convolution.
    stem_stride: of the stem's convolution.
    se_ratio: hidden channels of the squeeze-excite gate relative to the block's
      input.
    cross_replica_axis: as in `NFNetSettings`.
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

  def __post_init__(self):
    super().__post_init__()
    checks.stages(
      depth=self.depth,
      kernel_sizes=self.kernel_sizes,
      expansions=self.expansions,
    )
    checks.counts(
      stem_width=self.stem_width,
      stem_stride=self.stem_stride,
      final_width=self.final_width,
    )

  @property
  def stem_maps(self) -> list[FeatureMap]:
    """See `Settings`."""
    return [FeatureMap(self.stem_width, self.stem_stride)]
