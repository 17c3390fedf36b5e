"""FixUp ResNet: no normalisation, but an initialisation that scales with depth.

A pre-activation ResNet of plain convolutions, h_{i+1} = shortcut(h_i) +
multiplier·f_i(h_i), and FixUp's three rules for L blocks of m convolutions:

  1. the last convolution of each branch and the classifier start at zero;
  2. the other convolutions of a branch start as He's, times L^(−1/(2m − 2));
  3. a branch has a scalar multiplier, initially one, and each convolution,
     linear layer and nonlinearity a scalar bias before it, initially zero.

Differences:
  * The nonlinearities, and hence the scalar biases, are before the
    convolutions, as in the nets that this one is compared with; in the
    published and released nets they follow the addition.
  * All convolutions are initialised by their fan-in, as He's. The released net
    uses the fan-out for the first convolution of a branch and the shortcut, and
    Haiku's default, half the variance, for the stem.
  * There is no bias before the first convolution, as in its authors' code.
  * Omits the released net's other nonlinearities and classifier initialisers,
    which no recipe uses.

Reference:
  Zhang, Dauphin and Ma 2019, https://arxiv.org/abs/1901.09321.
"""

import haiku as hk
import jax
import jax.numpy as jnp

from nfnets_jax.models import (
  activations,
  dropout,
  layers,
  layout,
  pooling,
  precision,
  residual_net,
)
from nfnets_jax.models.settings import BottleneckSettings

# m, the number of convolutions in a branch.
_BRANCH_CONVS = 3


def _scalar(name: str, init: float) -> jax.Array:
  return hk.get_parameter(name, (), jnp.float32, hk.initializers.Constant(init))


def _add_bias(x: jax.Array, name: str) -> jax.Array:
  """Adds the scalar parameter `name` of the calling module."""
  return (precision.widen(x) + _scalar(name, 0.0)).astype(x.dtype)


class FixupBlock(hk.Module):
  """Bottleneck block, pre-activation.

  3 times +bias → ReLU → +bias → convolution (1×1, 3×3 with stride, 1×1) →
  stochastic depth → ×multiplier → + shortcut. The shortcut of a transition
  block is a 1×1 convolution of the first convolution's input, with the stride
  of the block.
  """

  def __init__(
    self,
    settings: BottleneckSettings,
    spec: layout.BlockSpec,
    *,
    name: str | None = None,
  ):
    super().__init__(name=name)
    channels = spec.out_channels
    width = layout.grouped_width(channels, settings.expansion, 1)
    num_blocks = sum(settings.depth)
    scale = num_blocks ** (-1 / (2 * _BRANCH_CONVS - 2))
    # The initialiser's first argument scales the variance.
    scaled = hk.initializers.VarianceScaling(2 * scale**2, 'fan_in', 'normal')
    zeros = hk.initializers.Constant(0.0)
    self.stochdepth_rate = spec.stochdepth_rate
    self.conv0 = layers.Conv2D(width, 1, w_init=scaled, name='conv0')
    self.conv1 = layers.Conv2D(
      width, 3, stride=spec.stride, w_init=scaled, name='conv1'
    )
    self.conv2 = layers.Conv2D(channels, 1, w_init=zeros, name='conv2')
    self.conv_shortcut = (
      layers.Conv2D(channels, 1, stride=spec.stride, name='conv_shortcut')
      if spec.is_transition
      else None
    )

  def __call__(
    self,
    x: jax.Array,
    is_training: bool,
    image_index: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Maps `[B, H, W, I]` to `[B, H', W', O]` and the residual branch.

    The branch is before stochastic depth and its multiplier; it is initially
    zero.
    """
    out = self._activate(x, 0)
    shortcut = x if self.conv_shortcut is None else self.conv_shortcut(out)
    out = self._activate(self.conv0(out), 1)
    out = self._activate(self.conv1(out), 2)
    branch = self.conv2(out)
    out = dropout.stochastic_depth(
      branch, self.stochdepth_rate, is_training, image_index
    )
    out = (precision.widen(out) * _scalar('multiplier', 1.0)).astype(x.dtype)
    return out + shortcut, branch

  def _activate(self, x: jax.Array, index: int) -> jax.Array:
    """The nonlinearity before convolution `index`, between its two biases."""
    x = activations.relu(_add_bias(x, f'bias{index}a'))
    return _add_bias(x, f'bias{index}b')


class FixupResNet(residual_net.ResidualNet):
  """Pre-activation ResNet with FixUp initialisation."""

  def __init__(
    self,
    num_classes: int,
    settings: BottleneckSettings,
    *,
    remat: str | None = None,
    name: str = 'Fixup_ResNet',
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
      settings.stem_width, 7, stride=settings.stem_stride, name='initial_conv'
    )
    self.blocks = [
      FixupBlock(settings, spec, name='fixup_block') for spec in self.specs
    ]

  def _stem(self, x: jax.Array, is_training: bool) -> list[jax.Array]:
    x = self.initial_conv(x)
    return [x, pooling.max_pool(x, 3, stride=2)] if self.stem_pool else [x]

  def _activate(self, x: jax.Array, is_training: bool) -> jax.Array:
    x = activations.relu(_add_bias(x, 'final_bias_a'))
    # The classifier's bias, added before the mean instead of after it.
    return _add_bias(x, 'final_bias_b')
