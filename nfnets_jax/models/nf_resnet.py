"""NF-ResNet: the pre-activation ResNet without batch normalisation.

Every residual block computes h_{i+1} = shortcut(h_i) + α·f_i(h_i / β_i), as in
`nfnet`, with ResNet-50's bottleneck of 1×1, 3×3 and 1×1 weight-standardised
convolutions. The paper studies clipping on this net.

The stem's max-pooling raises the mean and lowers the variance of the first
stage's input, which no β accounts for. Strided shortcuts subsample, which
preserves the variance; those of `nfnet` average.

Differences:
  * The stem's convolution has a bias, as in the released code, which ignores
    its own `with_bias=False`.
  * Stochastic depth does not rescale kept branches.
  * The default dropout rate is 0; the released module has none. Omits the
    initialisers of the classifier (`fc_init`) and of SkipInit, which no
    released recipe sets.

Reference:
  Brock, De and Smith 2021, "Characterizing signal propagation to close the
  performance gap in unnormalized ResNets", https://arxiv.org/abs/2101.08692;
  Brock et al. 2021, section 4.1.
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
from nfnets_jax.models.settings import NFResNetSettings


class NFResBlock(hk.Module):
  """Normaliser-free bottleneck block, pre-activation.

  γ·act → ×1/β → 1×1 → γ·act → 3×3 (stride) → γ·act → 1×1 →
  [2·squeeze-excite] → stochastic depth → [×skip_gain] → ×α → + shortcut. The
  shortcut of a transition block is a 1×1 convolution of the activated and
  scaled input, with the stride of the block.
  """

  def __init__(
    self,
    settings: NFResNetSettings,
    spec: layout.BlockSpec,
    beta: float,
    *,
    standardized: bool = False,
    name: str | None = None,
  ):
    super().__init__(name=name)
    channels = spec.out_channels
    width = layout.grouped_width(channels, settings.expansion, 1)
    pool = spec.stride if settings.pool_shortcut else 1
    self.beta = beta
    self.alpha = settings.alpha
    self.skipinit = settings.skipinit
    self.shortcut_pool = pool
    self.stochdepth_rate = spec.stochdepth_rate
    self.act = activations.scaled(settings.activation)
    conv = functools.partial(layers.WSConv2D, standardized=standardized)
    self.conv0 = conv(width, 1, name='conv0')
    self.conv1 = conv(
      width, 3, stride=spec.stride, padding=settings.padding, name='conv1'
    )
    self.conv2 = conv(channels, 1, name='conv2')
    self.conv_shortcut = (
      conv(channels, 1, stride=spec.stride // pool, name='conv_shortcut')
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

    The branch f(h/β) is before stochastic depth, SkipInit and α; the theory
    predicts unit variance.
    """
    out = self.act(x) * (1.0 / self.beta)
    shortcut = x
    if self.conv_shortcut is not None:
      pooled = out
      if self.shortcut_pool > 1:
        pooled = pooling.avg_pool(out, self.shortcut_pool)
      shortcut = self.conv_shortcut(pooled)
    out = self.conv0(out)
    out = self.conv1(self.act(out))
    out = self.act(out)
    if self.squeeze_excite is None:
      branch = self.conv2(out)
    else:
      branch, mean = self.conv2.with_mean(out)
      branch = blocks.gated(branch, self.squeeze_excite, mean=mean)
    out = dropout.stochastic_depth(
      branch, self.stochdepth_rate, is_training, image_index
    )
    if self.skipinit:
      return blocks.skip_init(out, self.alpha) + shortcut, branch
    return out * self.alpha + shortcut, branch


class NFResNet(residual_net.ResidualNet):
  """Normaliser-free ResNet."""

  def __init__(
    self,
    num_classes: int,
    settings: NFResNetSettings,
    *,
    standardized: bool = False,
    remat: str | None = None,
    name: str = 'NF_ResNet',
  ):
    """See `residual_net.ResidualNet`; `standardized` as in `models.create`."""
    super().__init__(
      num_classes,
      settings,
      remat=remat,
      w_init=hk.initializers.RandomNormal(0.01),
      name=name,
    )
    self.act = activations.scaled(settings.activation)
    self.stem_pool = settings.stem_pool
    self.padding = settings.padding
    self.initial_conv = layers.WSConv2D(
      settings.stem_width,
      7,
      stride=settings.stem_stride,
      padding=settings.padding,
      standardized=standardized,
      name='initial_conv',
    )
    self.blocks = [
      NFResBlock(
        settings, spec, beta, standardized=standardized, name='nf_res_block'
      )
      for spec, beta in zip(
        self.specs,
        layout.predicted_stds(settings.depth, settings.alpha),
        strict=True,
      )
    ]

  def _stem(self, x: jax.Array, is_training: bool) -> list[jax.Array]:
    x = self.initial_conv(x)
    if not self.stem_pool:
      return [x]
    return [x, pooling.max_pool(x, 3, stride=2, padding=self.padding)]

  def _activate(self, x: jax.Array, is_training: bool) -> jax.Array:
    return self.act(x)
