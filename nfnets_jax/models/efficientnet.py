"""EfficientNet: the batch-normalised baseline of the paper's comparison.

Every block expands the channels, applies a depthwise convolution and a gate,
and projects back, with a skip connection if the shapes are equal. B0 to B8 are
one net scaled in width, depth and image size; see `variants`.

Differences:
  * The original's drop connect is stochastic depth with kept branches rescaled,
    in blocks with a skip connection.
  * Batch statistics are per device, or with `cross_replica_axis` of all; the
    original averages them over an eighth of the devices, at least eight.
  * The two layers of the gate are linear layers, equally initialised; the
    original has 1×1 convolutions.

Reference:
  Tan and Le 2019, https://arxiv.org/abs/1905.11946; Brock et al. 2021,
  table 3.
"""

import haiku as hk
import jax

from nfnets_jax.models import (
  activations,
  blocks,
  checks,
  dropout,
  layers,
  layout,
  residual_net,
)
from nfnets_jax.models.settings import EfficientNetSettings

# Variance 2 / fan_out, of a normal distribution.
_W_INIT = hk.initializers.VarianceScaling(2.0, 'fan_out', 'normal')


class MBConvBlock(hk.Module):
  """Mobile inverted bottleneck block.

  [1×1 → BN → swish] → k×k depthwise (stride) → BN → swish → squeeze-excite →
  1×1 → BN → [stochastic depth → + input].
  """

  def __init__(
    self,
    settings: EfficientNetSettings,
    spec: layout.BlockSpec,
    *,
    name: str | None = None,
  ):
    super().__init__(name=name)
    expansion = settings.expansions[spec.stage]
    channels = spec.in_channels * expansion
    axis = settings.cross_replica_axis
    self.stochdepth_rate = spec.stochdepth_rate
    self.adds_input = not spec.is_transition
    self.expand = (
      _ConvBN(channels, 1, axis, name='expand') if expansion > 1 else None
    )
    self.depthwise = _ConvBN(
      channels,
      settings.kernel_sizes[spec.stage],
      axis,
      stride=spec.stride,
      groups=channels,
      name='depthwise',
    )
    self.squeeze_excite = blocks.SqueezeExcite(
      channels,
      max(1, int(spec.in_channels * settings.se_ratio)),
      act=activations.silu,
      w_init=_W_INIT,
    )
    self.project = _ConvBN(spec.out_channels, 1, axis, name='project')

  def __call__(
    self,
    x: jax.Array,
    is_training: bool,
    image_index: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Maps `[B, H, W, I]` to `[B, H', W', O]` and the residual branch.

    The branch is before stochastic depth. Without a skip connection it is the
    output.
    """
    out = x
    if self.expand is not None:
      out = activations.silu(self.expand(out, is_training))
    out = activations.silu(self.depthwise(out, is_training))
    out = blocks.gated(out, self.squeeze_excite, scale=1.0)
    branch = self.project(out, is_training)
    if not self.adds_input:
      return branch, branch
    out = dropout.stochastic_depth(
      branch, self.stochdepth_rate, is_training, image_index, rescale=True
    )
    return x + out, branch


class _ConvBN:
  """Convolution and batch normalisation, `{name}_conv` and `{name}_bn`."""

  def __init__(
    self,
    channels: int,
    kernel_size: int,
    cross_replica_axis: str | None,
    *,
    stride: int = 1,
    groups: int = 1,
    name: str,
  ):
    # The fan-out is that of one group.
    fan_out = kernel_size**2 * channels // groups
    self.conv = layers.Conv2D(
      channels,
      kernel_size,
      stride=stride,
      groups=groups,
      w_init=hk.initializers.RandomNormal((2.0 / fan_out) ** 0.5),
      name=f'{name}_conv',
    )
    self.norm = layers.BatchNorm(
      decay_rate=0.99,
      eps=1e-3,
      cross_replica_axis=cross_replica_axis,
      name=f'{name}_bn',
    )

  def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
    return self.norm(self.conv(x), is_training)


class EfficientNet(residual_net.ResidualNet):
  """EfficientNet."""

  def __init__(
    self,
    num_classes: int,
    settings: EfficientNetSettings,
    *,
    remat: str | None = None,
    name: str = 'EfficientNet',
  ):
    """See `residual_net.ResidualNet`."""
    checks.counts(num_classes=num_classes)
    bound = num_classes**-0.5
    super().__init__(
      num_classes,
      settings,
      remat=remat,
      w_init=hk.initializers.RandomUniform(-bound, bound),
      name=name,
    )
    axis = settings.cross_replica_axis
    self.stem = _ConvBN(
      settings.stem_width, 3, axis, stride=settings.stem_stride, name='stem'
    )
    self.blocks = [
      MBConvBlock(settings, spec, name='mb_conv_block') for spec in self.specs
    ]
    self.final = _ConvBN(settings.final_width, 1, axis, name='final')

  def _stem(self, x: jax.Array, is_training: bool) -> list[jax.Array]:
    return [activations.silu(self.stem(x, is_training))]

  def _activate(self, x: jax.Array, is_training: bool) -> jax.Array:
    return activations.silu(self.final(x, is_training))
