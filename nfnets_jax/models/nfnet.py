"""NFNet: a normaliser-free SE-ResNeXt-D with GELU.

Every residual block computes h_{i+1} = shortcut(h_i) + α·f_i(h_i / β_i), where
f_i preserves variance at initialisation and β_i is the predicted standard
deviation of h_i: Var grows by α² per block and is reset to 1 at each transition
between stages.

The prediction assumes that neighbouring pixels are equal. On white noise, each
2×2 average pooling in a strided shortcut divides the variance by four (0.96 →
0.28 → 0.06 → 0.01 from the stem to the last stage of F0). Photographs lose
about half at each transition (`experiments/figures/signal_plots.py`).

Differences:
  * Appendix C once calls β the predicted variance; the code, as here, divides
    by its square root.
  * The squeeze-excite gate has an unscaled ReLU between its layers, where the
    paper's formula has the scaled GELU.
  * Stochastic depth does not rescale kept branches.
  * The default rate of stochastic depth is 0.25, as in the paper and the
    released recipe; the released module's is 0.1.
  * Omits options that no released variant or recipe uses: a bottleneck ratio
    per stage, bottlenecks relative to the block's input (`big_width`), the
    channels of the last convolution, the classifier's initialiser (`fc_init`).
  * Bottlenecks are rounded down to multiples of the group width; see
    `variants`.

Reference:
  Brock et al. 2021, section 3 and appendix C.
"""

import functools
import math
from collections.abc import Sequence

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax

from nfnets_jax.models import (
  activations,
  blocks,
  convolution,
  dropout,
  layers,
  layout,
  pooling,
  residual_net,
  space_to_depth,
)
from nfnets_jax.models.settings import NFNetSettings

# From this number on, XLA fills the lanes of a TPU with images, and blocks of
# pixels only add products.
_MANY_IMAGES = 64

# The weight and bias of each convolution.
_Params = Sequence[tuple[jax.Array, jax.Array]]


class NFBlock(hk.Module):
  """Normaliser-free bottleneck block, pre-activation.

  γ·act → ×1/β → 1×1 → γ·act → 3×3 grouped (stride) → [γ·act → 3×3 grouped] →
  γ·act → 1×1 → 2·squeeze-excite → stochastic depth → ×skip_gain → ×α →
  + shortcut. The shortcut of a transition block is a 1×1 convolution of the
  activated and scaled input, average-pooled first when the block strides.
  """

  def __init__(
    self,
    settings: NFNetSettings,
    spec: layout.BlockSpec,
    beta: float,
    *,
    standardized: bool = False,
    name: str | None = None,
  ):
    super().__init__(name=name)
    channels = spec.out_channels
    width = layout.grouped_width(
      channels, settings.expansion, settings.group_width[spec.stage]
    )
    groups = width // settings.group_width[spec.stage]
    self.stride = spec.stride
    self.beta = beta
    self.alpha = settings.alpha
    self.stochdepth_rate = spec.stochdepth_rate
    self.act = activations.scaled(settings.activation)
    conv = functools.partial(layers.WSConv2D, standardized=standardized)
    self.conv0 = conv(width, 1, name='conv0')
    self.conv1 = conv(width, 3, stride=spec.stride, groups=groups, name='conv1')
    self.conv1b = (
      conv(width, 3, groups=groups, name='conv1b')
      if settings.use_two_convs
      else None
    )
    self.conv2 = conv(channels, 1, name='conv2')
    self.conv_shortcut = (
      conv(channels, 1, name='conv_shortcut') if spec.is_transition else None
    )
    self.squeeze_excite = blocks.gate(channels, settings.se_ratio)

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
    # XLA writes the other grouped features in this layout by itself. Gradients
    # of folded nets stay without layouts, so that they can be exported.
    if not self.conv1.standardized:
      out = convolution.keep_groups_apart(out, self.conv1.groups)
    out = self.conv1(self.act(out))
    if self.conv1b is not None:
      out = self.conv1b(self.act(out))
    branch, mean = self.conv2.with_mean(self.act(out))
    branch = blocks.gated(branch, self.squeeze_excite, mean=mean)
    out = dropout.stochastic_depth(
      branch, self.stochdepth_rate, is_training, image_index
    )
    return blocks.skip_init(out, self.alpha) + shortcut, branch


class NFNet(residual_net.ResidualNet):
  """Normaliser-Free Net."""

  def __init__(
    self,
    num_classes: int,
    settings: NFNetSettings,
    *,
    standardized: bool = False,
    remat: str | None = None,
    name: str = 'NFNet',
  ):
    """See `residual_net.ResidualNet`; `standardized` as in `models.create`."""
    super().__init__(
      num_classes,
      settings,
      remat=remat,
      w_init=hk.initializers.RandomNormal(0.01),
      name=name,
    )
    if settings.norm is not None:
      raise ValueError(
        f'NFNet has no normalisation, got norm={settings.norm!r}; use '
        'models.create or bn_nfnet.BNNFNet'
      )
    self.act = activations.scaled(settings.activation)
    conv = functools.partial(layers.WSConv2D, standardized=standardized)
    self.stem = [
      conv(channels, 3, stride=stride, name=f'stem_conv{i}')
      for i, (channels, stride) in enumerate(
        zip(settings.stem_width, settings.stem_strides, strict=True)
      )
    ]
    self.blocks = [
      NFBlock(settings, spec, beta, standardized=standardized)
      for spec, beta in zip(
        self.specs,
        layout.predicted_stds(settings.depth, settings.alpha),
        strict=True,
      )
    ]
    self.final_conv = conv(settings.last_channels, 1, name='final_conv')

  def _stem(self, x: jax.Array, is_training: bool) -> list[jax.Array]:
    # Haiku's parameters cannot be created inside a branch.
    channels, stride, params = x.shape[3], 1, []
    for conv in self.stem:
      params.append(conv.weight_and_bias(channels, x.dtype))
      channels, stride = conv.output_channels, stride * conv.stride
    in_blocks = (
      all(isinstance(n, int) for n in x.shape)  # else of a program to export
      and x.shape[0] < _MANY_IMAGES
      and x.shape[1] % stride == x.shape[2] % stride == 0
    )
    if not in_blocks:
      return self._stem_of_pixels(x, params)
    return lax.platform_dependent(
      x, params, tpu=self._stem_of_blocks, default=self._stem_of_pixels
    )

  def _stem_of_pixels(self, x: jax.Array, params: _Params) -> list[jax.Array]:
    maps: list[jax.Array] = []
    for conv, of_conv in zip(self.stem, params, strict=True):
      maps.append(conv(self.act(maps[-1]) if maps else x, of_conv))
    return maps

  def _stem_of_blocks(self, x: jax.Array, params: _Params) -> list[jax.Array]:
    """Computes all maps in blocks of the pixels that one of the last covers.

    XLA splits images into blocks slowly, so the first convolution reads pixels.
    """
    maps: list[jax.Array] = []
    block, rest = 1, [conv.stride for conv in self.stem]
    for w, bias in params:
      stride, *rest = rest
      out_block = math.prod(rest)
      x = self.act(x) if maps else x
      x = space_to_depth.conv2d(x, w, stride, block, out_block)
      x = convolution.add_bias(x, jnp.tile(bias, out_block**2))
      maps.append(space_to_depth.depth_to_space(x, out_block))
      block = out_block
    return maps

  def _last_map(self, x: jax.Array) -> jax.Array:
    return self.final_conv(x)

  def _activate(self, x: jax.Array, is_training: bool) -> jax.Array:
    return self.act(x)
