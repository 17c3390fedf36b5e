"""ResNet with batch normalisation, pre-activation: the baseline of the paper.

Every residual block computes h_{i+1} = shortcut(h_i) + f_i(h_i), where f_i is
BN → ReLU → 1×1 → BN → ReLU → 3×3 → BN → ReLU → 1×1.

Without normalisation (`norm=None`), the variance of the stream doubles with
every block. `skipinit` adds a learnable scale to each branch, initially zero,
so that blocks start as the identity: the SkipInit ResNet.

Differences:
  * Stochastic depth and dropout are available, but off by default, for
    comparisons under equal regularisation.
  * Convolutions are initialised by He's normal, of variance 2 / fan_in, which
    nets without normalisation need; the released nets use Haiku's default, half
    of it. With batch normalisation both compute the same initially, but their
    effective learning rates differ.
  * Squeeze-excite gates have a quarter of the channels inside, as released.
    `senet50` has a sixteenth, as in Hu et al., since the paper compares with
    published results of that net of 28 M parameters.
  * Omits options that no released recipe uses: the nonlinearity after the
    addition (`preactivation=False`), other norms and nonlinearities, the
    classifier's initialiser (`fc_init`), and batch statistics in evaluation
    (`test_local_stats`).

Reference:
  He et al. 2016, https://arxiv.org/abs/1603.05027; Hu et al. 2018,
  https://arxiv.org/abs/1709.01507; De and Smith 2020,
  https://arxiv.org/abs/2002.10444; Brock et al. 2021, section 4.1.
"""

import functools

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
from nfnets_jax.models.settings import ResNetSettings


class ResBlock(hk.Module):
  """Bottleneck block, pre-activation.

  BN → ReLU → 1×1 → BN → ReLU → 3×3 (stride) → BN → ReLU → 1×1 →
  [squeeze-excite] → stochastic depth → [×skip_gain] → + shortcut. The shortcut
  of a transition block is a 1×1 convolution of the normalised and activated
  input, with the stride of the block.
  """

  def __init__(
    self,
    settings: ResNetSettings,
    spec: layout.BlockSpec,
    *,
    name: str | None = None,
  ):
    super().__init__(name=name)
    channels = spec.out_channels
    width = layout.grouped_width(channels, settings.expansion, 1)
    self.skipinit = settings.skipinit
    self.stochdepth_rate = spec.stochdepth_rate
    self.acts = [_NormAct(settings, f'bn{i}') for i in range(3)]
    conv = functools.partial(layers.Conv2D, with_bias=settings.norm is None)
    self.conv0 = conv(width, 1, name='conv0')
    self.conv1 = conv(width, 3, stride=spec.stride, name='conv1')
    self.conv2 = conv(channels, 1, name='conv2')
    self.conv_shortcut = (
      conv(channels, 1, stride=spec.stride, name='conv_shortcut')
      if spec.is_transition
      else None
    )
    self.squeeze_excite = (
      blocks.gate(channels, settings.se_ratio) if settings.use_se else None
    )

  def __call__(
    self,
    x: jax.Array,
    is_training: bool,
    image_index: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Maps `[B, H, W, I]` to `[B, H', W', O]` and the residual branch.

    The branch is before stochastic depth and SkipInit.
    """
    out = self.acts[0](x, is_training)
    shortcut = x if self.conv_shortcut is None else self.conv_shortcut(out)
    out = self.conv0(out)
    out = self.conv1(self.acts[1](out, is_training))
    branch = self.conv2(self.acts[2](out, is_training))
    if self.squeeze_excite is not None:
      branch = blocks.gated(branch, self.squeeze_excite, scale=1.0)
    out = dropout.stochastic_depth(
      branch, self.stochdepth_rate, is_training, image_index
    )
    if self.skipinit:
      out = blocks.skip_init(out)
    return out + shortcut, branch


class _NormAct:
  """Batch normalisation, if any, and ReLU."""

  def __init__(self, settings: ResNetSettings, name: str):
    self.norm = (
      layers.BatchNorm(
        cross_replica_axis=settings.cross_replica_axis, name=name
      )
      if settings.norm == 'batch'
      else None
    )

  def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
    if self.norm is not None:
      x = self.norm(x, is_training)
    return activations.relu(x)


class ResNet(residual_net.ResidualNet):
  """Pre-activation ResNet, with batch normalisation or without."""

  def __init__(
    self,
    num_classes: int,
    settings: ResNetSettings,
    *,
    remat: str | None = None,
    name: str = 'ResNet',
  ):
    """See `residual_net.ResidualNet`."""
    super().__init__(
      num_classes,
      settings,
      remat=remat,
      w_init=hk.initializers.Constant(0.0),
      name=name,
    )
    self.stem_pool = settings.stem_pool
    self.initial_conv = layers.Conv2D(
      settings.stem_width,
      7,
      stride=settings.stem_stride,
      with_bias=settings.norm is None and not settings.skipinit,
      name='initial_conv',
    )
    self.blocks = [
      ResBlock(settings, spec, name='res_block_v2') for spec in self.specs
    ]
    self.final_act = _NormAct(settings, 'final_bn')

  def _stem(self, x: jax.Array, is_training: bool) -> list[jax.Array]:
    x = self.initial_conv(x)
    return [x, pooling.max_pool(x, 3, stride=2)] if self.stem_pool else [x]

  def _activate(self, x: jax.Array, is_training: bool) -> jax.Array:
    return self.final_act(x, is_training)
