"""NFNet with batch normalisation: the last row of the ablation.

Every residual block computes h_{i+1} = shortcut(h_i) + f_i(h_i), with batch
normalisation before each nonlinearity, plain convolutions without bias, and
without α, β, γ, SkipInit and the gate's factor of two. Parameter names are
those of `nfnet`.

Differences:
  The paper does not define its net "with BN instead of NF", and no code for it
  was released.

Reference:
  Brock et al. 2021, table 2.
"""

import haiku as hk
import jax

from nfnets_jax.models import (
  activations,
  blocks,
  dropout,
  layers,
  layout,
  pooling,
  residual_net,
)
from nfnets_jax.models.settings import NFNetSettings


class BNBlock(hk.Module):
  """Batch-normalised bottleneck block, pre-activation.

  BN → act → 1×1 → BN → act → 3×3 grouped (stride) → [BN → act → 3×3 grouped] →
  BN → act → 1×1 → squeeze-excite → stochastic depth → + shortcut. The shortcut
  of a transition block is a 1×1 convolution of the normalised and activated
  input, average-pooled first when the block strides.
  """

  def __init__(
    self,
    settings: NFNetSettings,
    spec: layout.BlockSpec,
    *,
    name: str | None = None,
  ):
    super().__init__(name=name)
    channels = spec.out_channels
    width = layout.grouped_width(
      channels, settings.expansion, settings.group_width[spec.stage]
    )
    groups = width // settings.group_width[spec.stage]
    self.stride = spec.stride
    self.stochdepth_rate = spec.stochdepth_rate
    self.act0 = _BNAct(settings, 'bn0')
    self.conv0 = layers.Conv2D(width, 1, name='conv0')
    self.act1 = _BNAct(settings, 'bn1')
    self.conv1 = layers.Conv2D(
      width, 3, stride=spec.stride, groups=groups, name='conv1'
    )
    self.second_conv = (
      (
        _BNAct(settings, 'bn1b'),
        layers.Conv2D(width, 3, groups=groups, name='conv1b'),
      )
      if settings.use_two_convs
      else None
    )
    self.act2 = _BNAct(settings, 'bn2')
    self.conv2 = layers.Conv2D(channels, 1, name='conv2')
    self.conv_shortcut = (
      layers.Conv2D(channels, 1, name='conv_shortcut')
      if spec.is_transition
      else None
    )
    self.squeeze_excite = blocks.gate(channels, settings.se_ratio)

  def __call__(
    self,
    x: jax.Array,
    is_training: bool,
    image_index: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Maps `[B, H, W, I]` to `[B, H', W', O]` and the residual branch.

    The branch is before stochastic depth.
    """
    out = self.act0(x, is_training)
    shortcut = x
    if self.conv_shortcut is not None:
      pooled = pooling.avg_pool(out, self.stride) if self.stride > 1 else out
      shortcut = self.conv_shortcut(pooled)
    out = self.conv0(out)
    out = self.conv1(self.act1(out, is_training))
    if self.second_conv is not None:
      act, conv = self.second_conv
      out = conv(act(out, is_training))
    branch = self.conv2(self.act2(out, is_training))
    branch = blocks.gated(branch, self.squeeze_excite, scale=1.0)
    out = dropout.stochastic_depth(
      branch, self.stochdepth_rate, is_training, image_index
    )
    return out + shortcut, branch


class _BNAct:
  """Batch normalisation and the nonlinearity."""

  def __init__(self, settings: NFNetSettings, name: str):
    self.norm = layers.BatchNorm(
      cross_replica_axis=settings.cross_replica_axis, name=name
    )
    self.act = activations.unscaled(settings.activation)

  def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
    return self.act(self.norm(x, is_training))


class BNNFNet(residual_net.ResidualNet):
  """NFNet with batch normalisation."""

  def __init__(
    self,
    num_classes: int,
    settings: NFNetSettings,
    *,
    remat: str | None = None,
    name: str = 'NFNet',
  ):
    """See `residual_net.ResidualNet`."""
    super().__init__(
      num_classes,
      settings,
      remat=remat,
      w_init=hk.initializers.RandomNormal(0.01),
      name=name,
    )
    self.stem = [
      layers.Conv2D(channels, 3, stride=stride, name=f'stem_conv{i}')
      for i, (channels, stride) in enumerate(
        zip(settings.stem_width, settings.stem_strides, strict=True)
      )
    ]
    self.stem_acts = [
      _BNAct(settings, f'stem_bn{i}') for i in range(len(self.stem) - 1)
    ]
    self.blocks = [
      BNBlock(settings, spec, name='nf_block') for spec in self.specs
    ]
    self.final_conv = layers.Conv2D(
      settings.last_channels, 1, name='final_conv'
    )
    self.final_act = _BNAct(settings, 'final_bn')

  def _stem(self, x: jax.Array, is_training: bool) -> list[jax.Array]:
    maps = [self.stem[0](x)]
    for act, conv in zip(self.stem_acts, self.stem[1:], strict=True):
      maps.append(conv(act(maps[-1], is_training)))
    return maps

  def _last_map(self, x: jax.Array) -> jax.Array:
    return self.final_conv(x)

  def _activate(self, x: jax.Array, is_training: bool) -> jax.Array:
    return self.final_act(x, is_training)
