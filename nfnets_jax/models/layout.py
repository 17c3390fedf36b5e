"""The blocks of a network, as laid out by its settings."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from nfnets_jax.models import variants
from nfnets_jax.models.settings import FeatureMap, Settings


@dataclasses.dataclass(frozen=True)
class BlockSpec:
  """What a block needs to know of its network.

  Attributes:
    index: index of the block in the network.
    stage: index of its stage.
    in_channels: channels of the input.
    out_channels: channels of the output.
    stride: stride of the block.
    total_stride: stride of the output with respect to the image.
    stochdepth_rate: probability that the branch of an image is dropped.
  """

  index: int
  stage: int
  in_channels: int
  out_channels: int
  stride: int
  total_stride: int
  stochdepth_rate: float

  @property
  def is_transition(self) -> bool:
    """Whether the shapes of input and output differ."""
    return self.stride > 1 or self.in_channels != self.out_channels


def block_specs(settings: Settings) -> list[BlockSpec]:
  """Returns the blocks of a network in order.

  Example:
    >>> specs = block_specs(variants.get('nfnet_f0').settings)
    >>> [(x.out_channels, x.total_stride) for x in specs[:4]]
    [(256, 4), (512, 8), (512, 8), (1536, 16)]
  """
  channels, total_stride = settings.stem_maps[-1]
  num_blocks = sum(settings.depth)
  specs: list[BlockSpec] = []
  for stage, stage_blocks in enumerate(settings.depth):
    for block in range(stage_blocks):
      stride = settings.strides[stage] if block == 0 else 1
      total_stride *= stride
      index = len(specs)
      specs.append(
        BlockSpec(
          index=index,
          stage=stage,
          in_channels=channels,
          out_channels=settings.width[stage],
          stride=stride,
          total_stride=total_stride,
          stochdepth_rate=settings.stochdepth_rate * index / num_blocks,
        )
      )
      channels = settings.width[stage]
  return specs


def feature_info(name: str, **overrides: Any) -> list[FeatureMap]:
  """Returns the feature maps of `create(name, features_only=True)`.

  Computed from the settings; no network is built.

  Args:
    name: a variant.
    **overrides: as in `create`.

  Returns:
    Channels and stride of each map, from the finest to the coarsest.

  Raises:
    ValueError: if the variant or an override is invalid.

  Example:
    >>> [tuple(x) for x in feature_info('nfnet_f0')]
    [(64, 2), (256, 4), (512, 8), (1536, 16), (3072, 32)]
  """
  settings = variants.override(name, overrides)
  specs = block_specs(settings)
  maps = [
    *settings.stem_maps,
    *(FeatureMap(spec.out_channels, spec.total_stride) for spec in specs),
    FeatureMap(settings.last_channels, specs[-1].total_stride),
  ]
  # The last map at each stride.
  return list({x.stride: x for x in maps}.values())


def predicted_stds(depth: Sequence[int], alpha: float) -> list[float]:
  """Predicts β, the standard deviation of the input of each block.

  The variance is 1 after the stem and grows by α² per block. The first block of
  a stage resets it, as its shortcut convolves the scaled input.

  Args:
    depth: number of blocks of each stage.
    alpha: α, scale of the residual branches.

  Returns:
    β of each block in order.

  Example:
    >>> [round(beta**2, 2) for beta in predicted_stds((2, 2), alpha=0.2)]
    [1.0, 1.04, 1.08, 1.04]

  Reference:
    Brock et al. 2021, section 2.
  """
  stds, variance = [], 1.0
  for num_blocks in depth:
    for block in range(num_blocks):
      stds.append(variance**0.5)
      variance = (1.0 if block == 0 else variance) + alpha**2
  return stds


def grouped_width(width: int, expansion: float, group_width: int) -> int:
  """Returns the channels of a bottleneck, rounded down to whole groups.

  Args:
    width: channels that the bottleneck is relative to.
    expansion: channels of the bottleneck relative to `width`.
    group_width: channels per group.

  Raises:
    ValueError: if the bottleneck is narrower than one group.

  Example:
    >>> grouped_width(384, 0.5, 128)
    128
  """
  bottleneck = int(width * expansion)
  if bottleneck < group_width:
    raise ValueError(
      f'a bottleneck of {bottleneck} channels ({width} × {expansion}) '
      f'is narrower than one group of {group_width}; use a group_width of at '
      f'most {bottleneck} or a width of at least {group_width / expansion:g}'
    )
  return bottleneck // group_width * group_width
