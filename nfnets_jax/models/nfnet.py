"""NFNet: a normaliser-free SE-ResNeXt-D with GELU.

Every residual block computes h_{i+1} = shortcut(h_i) + α·f_i(h_i / β_i), where
f_i has unit gain at initialisation and β_i is the standard deviation that h_i
is predicted to have: Var grows by α² a block and starts again at 1 at each
transition between stages.

The prediction holds for signals whose neighbouring pixels agree. On white noise
each 2×2 average pooling in a strided shortcut loses a factor of four in
variance (0.92 → 0.26 → 0.06 → 0.01 over the stages of F0, in the released code
as here): that is the net, not a fault. Photographs lie between: they lose about
half at each transition (`experiments/figures/signal_plots.py`).

Differences:
  * Appendix C once calls β the predicted variance; the code, as here, divides
    by its square root.
  * The first layer of the squeeze-excite gate is followed by an unscaled ReLU,
    where the paper's formula has the scaled GELU.
  * Stochastic depth does not rescale the kept branches.
  * The released module drops blocks at a rate of up to 0.1 unless told
    otherwise; the default here is the 0.25 of the paper and of the released
    recipe.
  * The released module can also be told a bottleneck ratio for each stage,
    bottlenecks relative to the block's input (`big_width`), the channels of the
    last convolution and the classifier's initialiser (`fc_init`). No released
    variant or recipe does so, and these options are left out.
  * A bottleneck that is no multiple of the group width is rounded down to one
    (see `variants`).
  * The paper does not say how its net "with BN instead of NF" is made, and no
    code for it is released. With `norm='batch'` here, batch normalisation comes
    before each nonlinearity, the convolutions are plain ones without bias, and
    α, β, γ, SkipInit and the gate's factor of two are one.

Reference:
  Brock et al. 2021, section 3 and appendix C.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import haiku as hk
import jax

from nfnets_jax.models import activations, blocks, layers


class NFBlock(hk.Module):
  """Normaliser-free bottleneck block, pre-activation.

  γ·act → ×1/β → 1×1 → γ·act → 3×3 grouped (stride) → [γ·act → 3×3 grouped] →
  γ·act → 1×1 → 2·squeeze-excite → stochastic depth → ×skip_gain → ×α →
  + shortcut. The shortcut of a transition block is a 1×1 convolution of the
  activated and scaled input, average-pooled first when the block strides.
  """

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    *,
    stride: int,
    beta: float,
    alpha: float,
    expansion: float,
    group_width: int,
    use_two_convs: bool,
    se_ratio: float,
    stochdepth_rate: float,
    activation: str,
    norm: str | None = None,
    cross_replica_axis: str | None = None,
    standardized: bool = False,
    name: str | None = None,
  ):
    """Describes the block; see `NFNet` for the arguments they share.

    Args:
      in_channels: channels of the input.
      out_channels: channels of the output.
      stride: of the first 3×3 convolution and the shortcut.
      beta: predicted standard deviation of the input.
      alpha: scale of the residual branch.
      expansion: channels inside, relative to `out_channels`.
      group_width: channels per group of the 3×3 convolutions.
      use_two_convs: whether there is a second 3×3 convolution.
      se_ratio: hidden channels of the gate, relative to `out_channels`.
      stochdepth_rate: probability that the branch of an image is dropped.
      activation: name of the nonlinearity.
      norm: None, or 'batch' for batch normalisation in place of all that makes
        the block normaliser-free.
      cross_replica_axis: name of the axis of devices of its statistics.
      standardized: whether weights are standardised already, by `layers.fold`.
      name: of the Haiku module.

    Raises:
      ValueError: if the bottleneck is narrower than one group.
    """
    super().__init__(name=name)
    width = blocks.grouped_width(out_channels, expansion, group_width)
    groups = width // group_width
    self.stride = stride
    self.norm = norm
    self.beta = beta
    self.alpha = alpha
    self.stochdepth_rate = stochdepth_rate
    conv = _conv(norm, standardized)

    def act(name: str) -> blocks.NormAct:
      return _act(activation, norm, cross_replica_axis, name)

    self.act0 = act('bn0')
    self.conv0 = conv(width, 1, name='conv0')
    self.act1 = act('bn1')
    self.conv1 = conv(width, 3, stride=stride, groups=groups, name='conv1')
    self.act1b = act('bn1b') if use_two_convs else None
    self.conv1b = (
      conv(width, 3, groups=groups, name='conv1b') if use_two_convs else None
    )
    self.act2 = act('bn2')
    self.conv2 = conv(out_channels, 1, name='conv2')
    self.conv_shortcut = (
      conv(out_channels, 1, name='conv_shortcut')
      if stride > 1 or in_channels != out_channels
      else None
    )
    self.squeeze_excite = layers.SqueezeExcite(
      out_channels,
      max(1, int(out_channels * se_ratio)),
      name='squeeze_excite',
    )

  def __call__(
    self,
    x: jax.Array,
    is_training: bool,
    image_index: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Maps `[B, H, W, I]` to `[B, H', W', O]` and the branch before its gain.

    The second output is the residual branch f(h/β), before stochastic depth,
    SkipInit and α: its variance is what the theory says is one.
    """
    out = self.act0(x, is_training)
    if self.norm is None:
      out = out * (1.0 / self.beta)
    shortcut = x
    if self.conv_shortcut is not None:
      pooled = layers.avg_pool(out, self.stride) if self.stride > 1 else out
      shortcut = self.conv_shortcut(pooled)
    out = self.conv0(out)
    out = self.conv1(self.act1(out, is_training))
    if self.act1b is not None and self.conv1b is not None:
      out = self.conv1b(self.act1b(out, is_training))
    out = self.act2(out, is_training)
    if self.norm is None:
      branch, mean = self.conv2.with_mean(out)
      branch = blocks.gated(branch, self.squeeze_excite, mean=mean)
    else:
      branch = blocks.gated(self.conv2(out), self.squeeze_excite, scale=1.0)
    out = layers.stochastic_depth(
      branch, self.stochdepth_rate, is_training, image_index
    )
    if self.norm is not None:
      return out + shortcut, branch
    return blocks.skip_init(out, self.alpha) + shortcut, branch


def _conv(norm: str | None, standardized: bool) -> Callable[..., Any]:
  if norm is not None:
    return layers.Conv2D
  return functools.partial(layers.WSConv2D, standardized=standardized)


def _act(
  activation: str, norm: str | None, cross_replica_axis: str | None, name: str
) -> blocks.NormAct:
  """The nonlinearity: scaled by its gain, or after batch normalisation."""
  function = (
    activations.scaled(activation)
    if norm is None
    else activations.unscaled(activation)
  )
  return blocks.NormAct(function, norm, cross_replica_axis, name)


class NFNet(blocks.ResidualNet):
  """Normaliser-Free Net.

  Example:
    >>> import jax.numpy as jnp
    >>> def forward(images):
    ...   net = NFNet(10, width=(64,), depth=(2,), strides=(1,),
    ...               group_width=(32,), drop_rate=0.0)
    ...   return net(images, is_training=False)
    >>> net = hk.transform(forward)
    >>> images = jnp.ones((2, 32, 32, 3))
    >>> params = jax.jit(net.init)(jax.random.key(0), images)
    >>> jax.jit(net.apply)(params, None, images)['logits'].shape
    (2, 10)

  Reference:
    Brock et al. 2021, section 3, table 1.
  """

  def __init__(
    self,
    num_classes: int,
    *,
    width: Sequence[int],
    depth: Sequence[int],
    drop_rate: float,
    strides: Sequence[int] = (1, 2, 2, 2),
    group_width: Sequence[int] = (128, 128, 128, 128),
    expansion: float = 0.5,
    stem_width: Sequence[int] = (16, 32, 64, 128),
    stem_strides: Sequence[int] = (2, 1, 1, 2),
    use_two_convs: bool = True,
    se_ratio: float = 0.5,
    alpha: float = 0.2,
    stochdepth_rate: float = 0.25,
    activation: str = 'gelu',
    final_conv_mult: int = 2,
    norm: str | None = None,
    cross_replica_axis: str | None = None,
    standardized: bool = False,
    remat: str | None = None,
    name: str = 'NFNet',
  ):
    """Describes the net; the defaults are what all variants F0 to F7 share.

    Args:
      num_classes: K, number of logits.
      width: output channels of each stage.
      depth: number of blocks of each stage.
      drop_rate: dropout on the pooled features, in [0, 1).
      strides: of the first block of each stage.
      group_width: channels per group of the 3×3 convolutions, of each stage.
      expansion: bottleneck channels relative to the stage's width.
      stem_width: channels of the stem's 3×3 convolutions. The last entry is
        half of `width[0]` in the released nets.
      stem_strides: of the stem's convolutions.
      use_two_convs: whether a block has a second 3×3 convolution.
      se_ratio: hidden channels of the squeeze-excite gate relative to the
        stage's width.
      alpha: α, scale of the residual branches.
      stochdepth_rate: of n blocks, block i (from 0) drops the residual branch
        of an image with probability stochdepth_rate · i / n. In [0, 1).
      activation: one of `activations.NAMES`.
      final_conv_mult: channels of the last convolution relative to `width[-1]`.
      norm: None; or 'batch' for the net of the ablation that has batch
        normalisation in place of all that makes it normaliser-free.
      cross_replica_axis: with `norm`, name of the mapped axis of devices whose
        images the statistics are taken over; None takes each device's own.
      standardized: whether the parameters are those of `layers.fold`.
      remat: None, 'block' or 'stage', what is computed again in the backward
        pass; see `blocks.ResidualNet`.
      name: of the Haiku module.

    Raises:
      ValueError: if an argument is impossible; the message says what is not.
    """
    super().__init__(
      num_classes,
      depth=depth,
      drop_rate=drop_rate,
      remat=remat,
      w_init=hk.initializers.RandomNormal(0.01),
      name=name,
    )
    blocks.check_stages(
      width=width, depth=depth, strides=strides, group_width=group_width
    )
    blocks.check_stages(
      'convolution', stem_width=stem_width, stem_strides=stem_strides
    )
    blocks.check_counts(final_conv_mult=final_conv_mult)
    blocks.check_factors(expansion=expansion, se_ratio=se_ratio, alpha=alpha)
    blocks.check_norm(norm, cross_replica_axis)
    conv = _conv(norm, standardized)
    self.stem = [
      conv(channels, 3, stride=stride, name=f'stem_conv{i}')
      for i, (channels, stride) in enumerate(
        zip(stem_width, stem_strides, strict=True)
      )
    ]
    self.stem_acts = [
      _act(activation, norm, cross_replica_axis, f'stem_bn{i}')
      for i in range(len(stem_width) - 1)
    ]
    places = blocks.places(
      stem_width[-1],
      width=width,
      depth=depth,
      strides=strides,
      stochdepth_rate=stochdepth_rate,
    )
    betas = blocks.predicted_stds(depth, alpha)
    self.blocks = [
      NFBlock(
        place.in_channels,
        place.out_channels,
        stride=place.stride,
        beta=beta,
        alpha=alpha,
        expansion=expansion,
        group_width=group_width[place.stage],
        use_two_convs=use_two_convs,
        se_ratio=se_ratio,
        stochdepth_rate=place.stochdepth_rate,
        activation=activation,
        norm=norm,
        cross_replica_axis=cross_replica_axis,
        standardized=standardized,
      )
      for place, beta in zip(places, betas, strict=True)
    ]
    self.final_conv = conv(final_conv_mult * width[-1], 1, name='final_conv')
    self.final_act = _act(activation, norm, cross_replica_axis, 'final_bn')

  def _stem(self, x: jax.Array, is_training: bool) -> jax.Array:
    x = self.stem[0](x)
    for act, conv in zip(self.stem_acts, self.stem[1:], strict=True):
      x = conv(act(x, is_training))
    return x

  def _features(self, x: jax.Array, is_training: bool) -> jax.Array:
    return self.final_act(self.final_conv(x), is_training)
