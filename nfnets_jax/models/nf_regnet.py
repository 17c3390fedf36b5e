"""NF-RegNet: a normaliser-free RegNet with inverted bottlenecks and SiLU.

Every residual block computes h_{i+1} = shortcut(h_i) + α·f_i(h_i / β_i), as in
`nfnet`. B0 to B5 cost about as much as EfficientNet-B0 to B5, with grouped 3×3
convolutions instead of depthwise ones. B6 to B8 follow the same scaling; there
are no published results for them.

Differences:
  * Expansion is relative to the block's input, and the first block does not
    expand, as in the released code.
  * Stochastic depth does not rescale kept branches.
  * The default nonlinearity is `silu`, as in the released recipe; the released
    module's is `swish`, the same function, which its table lacks.
  * Omits the classifier's initialiser (`fc_init`), which no recipe sets.

Reference:
  Brock, De and Smith 2021, "Characterizing signal propagation to close the
  performance gap in unnormalized ResNets", https://arxiv.org/abs/2101.08692,
  section 5; Radosavovic et al. 2020, https://arxiv.org/abs/2003.13678.
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
from nfnets_jax.models.settings import NFRegNetSettings


class NFRegBlock(hk.Module):
  """Normaliser-free inverted bottleneck block, pre-activation.

  γ·act → ×1/β → 1×1 → γ·act → 3×3 grouped (stride) → 2·squeeze-excite →
  γ·act → 1×1 → stochastic depth → ×skip_gain → ×α → + shortcut. The shortcut of
  a transition block is a 1×1 convolution of the activated and scaled input,
  average-pooled first when the block strides.
  """

  def __init__(
    self,
    settings: NFRegNetSettings,
    spec: layout.BlockSpec,
    beta: float,
    *,
    standardized: bool = False,
    name: str | None = None,
  ):
    super().__init__(name=name)
    group_width = settings.group_width
    expansion = settings.expansion if spec.index > 0 else 1.0
    if settings.rounding == 'nearest':
      width = _nearest(spec.in_channels * expansion, group_width)
      hidden = _nearest(width * settings.se_ratio, group_width)
    else:
      width = layout.grouped_width(spec.in_channels, expansion, group_width)
      hidden = max(1, int(width * settings.se_ratio))
    self.stride = spec.stride
    self.beta = beta
    self.alpha = settings.alpha
    self.stochdepth_rate = spec.stochdepth_rate
    self.act = activations.scaled(settings.activation)
    conv = functools.partial(layers.WSConv2D, standardized=standardized)
    self.conv0 = conv(width, 1, name='conv0')
    self.conv1 = conv(
      width,
      3,
      stride=spec.stride,
      groups=width // group_width,
      padding=settings.padding,
      name='conv1',
    )
    self.conv2 = conv(spec.out_channels, 1, name='conv2')
    self.conv_shortcut = (
      conv(spec.out_channels, 1, name='conv_shortcut')
      if spec.is_transition
      else None
    )
    self.squeeze_excite = blocks.SqueezeExcite(width, hidden)

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
      pooled = pooling.avg_pool(out, self.stride) if self.stride > 1 else out
      shortcut = self.conv_shortcut(pooled)
    out = self.conv0(out)
    out = self.conv1(self.act(out))
    out = blocks.gated(out, self.squeeze_excite)
    branch = self.conv2(self.act(out))
    out = dropout.stochastic_depth(
      branch, self.stochdepth_rate, is_training, image_index
    )
    return blocks.skip_init(out, self.alpha) + shortcut, branch


def _nearest(channels: float, group_width: int) -> int:
  """Rounds to a whole number of groups, at least one."""
  return max(1, int(channels / group_width + 0.5)) * group_width


class NFRegNet(residual_net.ResidualNet):
  """Normaliser-free RegNet."""

  def __init__(
    self,
    num_classes: int,
    settings: NFRegNetSettings,
    *,
    standardized: bool = False,
    remat: str | None = None,
    name: str = 'NF_RegNet',
  ):
    """See `residual_net.ResidualNet`; `standardized` as in `models.create`."""
    super().__init__(
      num_classes,
      settings,
      remat=remat,
      w_init=hk.initializers.Constant(0.0),
      name=name,
    )
    self.act = activations.scaled(settings.activation)
    conv = functools.partial(layers.WSConv2D, standardized=standardized)
    self.initial_conv = conv(
      settings.width[0],
      3,
      stride=settings.stem_stride,
      padding=settings.padding,
      name='initial_conv',
    )
    self.blocks = [
      NFRegBlock(
        settings, spec, beta, standardized=standardized, name='nf_block'
      )
      for spec, beta in zip(
        self.specs,
        layout.predicted_stds(settings.depth, settings.alpha),
        strict=True,
      )
    ]
    self.final_conv = conv(settings.last_channels, 1, name='final_conv')

  def _stem(self, x: jax.Array, is_training: bool) -> list[jax.Array]:
    return [self.initial_conv(x)]

  def _last_map(self, x: jax.Array) -> jax.Array:
    return self.final_conv(x)

  def _activate(self, x: jax.Array, is_training: bool) -> jax.Array:
    return self.act(x)
