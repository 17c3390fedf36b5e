"""NF-RegNet: a normaliser-free RegNet with inverted bottlenecks and SiLU.

Every residual block computes h_{i+1} = shortcut(h_i) + α·f_i(h_i / β_i), as in
`nfnet`. The nets B0 to B5 cost about what EfficientNet-B0 to B5 cost, but widen
with grouped 3×3 convolutions where those have depthwise ones. B6 to B8 follow
the same scaling; no result of them is published.

Differences:
  * The bottleneck is relative to the channels of the block's input, and the
    first block of all does not widen; both as in the released code.
  * Stochastic depth does not rescale the kept branches.
  * The released module names `swish` as its default nonlinearity, which its own
    table lacks; its recipe, like the default here, says `silu`, the same
    function. The option of another initialiser of the classifier (`fc_init`) is
    left out.

Reference:
  Brock, De and Smith 2021, "Characterizing signal propagation to close the
  performance gap in unnormalized ResNets", https://arxiv.org/abs/2101.08692,
  section 5; Radosavovic et al. 2020, https://arxiv.org/abs/2003.13678.
"""

import functools
from collections.abc import Sequence

import haiku as hk
import jax

from nfnets_jax.models import activations, blocks, layers


class NFRegBlock(hk.Module):
  """Normaliser-free inverted bottleneck block, pre-activation.

  γ·act → ×1/β → 1×1 → γ·act → 3×3 grouped (stride) → 2·squeeze-excite →
  γ·act → 1×1 → stochastic depth → ×skip_gain → ×α → + shortcut. The shortcut of
  a transition block is a 1×1 convolution of the activated and scaled input,
  average-pooled first when the block strides.
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
    se_ratio: float,
    stochdepth_rate: float,
    activation: str,
    padding: str = 'same',
    rounding: str = 'down',
    standardized: bool = False,
    name: str | None = None,
  ):
    """Describes the block; see `NFRegNet` for the arguments they share.

    Args:
      in_channels: channels of the input.
      out_channels: channels of the output.
      stride: of the 3×3 convolution and the shortcut.
      beta: predicted standard deviation of the input.
      alpha: scale of the residual branch.
      expansion: channels inside, relative to `in_channels`.
      group_width: channels per group of the 3×3 convolution.
      se_ratio: hidden channels of the gate, relative to the channels inside.
      stochdepth_rate: probability that the branch of an image is dropped.
      activation: name of the nonlinearity.
      padding: of the strided convolution, 'same' or 'symmetric'.
      rounding: of the channels inside, 'down' or 'nearest'.
      standardized: whether weights are standardised already, by `layers.fold`.
      name: of the Haiku module.

    Raises:
      ValueError: if the bottleneck is narrower than one group.
    """
    super().__init__(name=name)
    if rounding == 'nearest':
      width = _nearest(in_channels * expansion, group_width)
      hidden = _nearest(width * se_ratio, group_width)
    else:
      width = blocks.grouped_width(in_channels, expansion, group_width)
      hidden = max(1, int(width * se_ratio))
    self.stride = stride
    self.beta = beta
    self.alpha = alpha
    self.stochdepth_rate = stochdepth_rate
    self.act = activations.scaled(activation)
    conv = functools.partial(layers.WSConv2D, standardized=standardized)
    self.conv0 = conv(width, 1, name='conv0')
    self.conv1 = conv(
      width,
      3,
      stride=stride,
      groups=width // group_width,
      padding=padding,
      name='conv1',
    )
    self.conv2 = conv(out_channels, 1, name='conv2')
    self.conv_shortcut = (
      conv(out_channels, 1, name='conv_shortcut')
      if stride > 1 or in_channels != out_channels
      else None
    )
    self.squeeze_excite = layers.SqueezeExcite(
      width, hidden, name='squeeze_excite'
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
    out = self.act(x) * (1.0 / self.beta)
    shortcut = x
    if self.conv_shortcut is not None:
      pooled = layers.avg_pool(out, self.stride) if self.stride > 1 else out
      shortcut = self.conv_shortcut(pooled)
    out = self.conv0(out)
    out = self.conv1(self.act(out))
    out = blocks.gated(out, self.squeeze_excite)
    branch = self.conv2(self.act(out))
    out = layers.stochastic_depth(
      branch, self.stochdepth_rate, is_training, image_index
    )
    return blocks.skip_init(out, self.alpha) + shortcut, branch


def _nearest(channels: float, group_width: int) -> int:
  """Rounds to a whole number of groups, at least one."""
  return max(1, int(channels / group_width + 0.5)) * group_width


class NFRegNet(blocks.ResidualNet):
  """Normaliser-free RegNet.

  Example:
    >>> import jax.numpy as jnp
    >>> def forward(images):
    ...   net = NFRegNet(10, width=(16,), depth=(2,), strides=(2,),
    ...                  drop_rate=0.0)
    ...   return net(images, is_training=False)
    >>> net = hk.transform(forward)
    >>> images = jnp.ones((2, 32, 32, 3))
    >>> params = jax.jit(net.init)(jax.random.key(0), images)
    >>> jax.jit(net.apply)(params, None, images)['logits'].shape
    (2, 10)

  Reference:
    Brock, De and Smith 2021, https://arxiv.org/abs/2101.08692, section 5.
  """

  def __init__(
    self,
    num_classes: int,
    *,
    width: Sequence[int],
    depth: Sequence[int],
    drop_rate: float,
    strides: Sequence[int] = (2, 2, 2, 2),
    group_width: int = 8,
    expansion: float = 2.25,
    stem_stride: int = 2,
    se_ratio: float = 0.5,
    alpha: float = 0.2,
    stochdepth_rate: float = 0.1,
    activation: str = 'silu',
    padding: str = 'same',
    rounding: str = 'down',
    final_width: int | None = None,
    standardized: bool = False,
    remat: str | None = None,
    name: str = 'NF_RegNet',
  ):
    """Describes the net; the defaults are what B0 to B8 share.

    Args:
      num_classes: K, number of logits.
      width: output channels of each stage. The stem has as many as the first
        stage, and the last convolution 1280 / 440 times as many as the last.
      depth: number of blocks of each stage.
      drop_rate: dropout on the pooled features, in [0, 1).
      strides: of the first block of each stage.
      group_width: channels per group of the 3×3 convolutions.
      expansion: channels inside a block relative to those of its input; the
        first block has 1.
      stem_stride: of the stem's 3×3 convolution.
      se_ratio: hidden channels of the gate relative to those inside the block.
      alpha: α, scale of the residual branches.
      stochdepth_rate: of n blocks, block i (from 0) drops the residual branch
        of an image with probability stochdepth_rate · i / n. In [0, 1).
      activation: one of `activations.NAMES`.
      padding: of convolutions with a stride: 'same', or 'symmetric' as in
        PyTorch.
      rounding: 'down', as released, makes the channels inside a block whole
        groups, and the gate's any number; 'nearest', as in timm, rounds both to
        the nearest whole groups.
      final_width: channels of the last convolution; None takes 1280 / 440 times
        those of the last stage.
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
      w_init=hk.initializers.Constant(0.0),
      name=name,
    )
    blocks.check_stages(width=width, depth=depth, strides=strides)
    if final_width is None:
      # The first RegNet of this shape had 1280 channels after a stage of 440.
      final_width = 1280 * width[-1] // 440
    blocks.check_counts(
      group_width=group_width, stem_stride=stem_stride, final_width=final_width
    )
    blocks.check_factors(expansion=expansion, se_ratio=se_ratio, alpha=alpha)
    if rounding not in ('down', 'nearest'):
      raise ValueError(f"rounding {rounding!r} is neither 'down' nor 'nearest'")
    self.act = activations.scaled(activation)
    self.initial_conv = layers.WSConv2D(
      width[0],
      3,
      stride=stem_stride,
      padding=padding,
      standardized=standardized,
      name='initial_conv',
    )
    places = blocks.places(
      width[0],
      width=width,
      depth=depth,
      strides=strides,
      stochdepth_rate=stochdepth_rate,
    )
    betas = blocks.predicted_stds(depth, alpha)
    self.blocks = [
      NFRegBlock(
        place.in_channels,
        place.out_channels,
        stride=place.stride,
        beta=beta,
        alpha=alpha,
        expansion=expansion if i > 0 else 1.0,
        group_width=group_width,
        se_ratio=se_ratio,
        stochdepth_rate=place.stochdepth_rate,
        activation=activation,
        padding=padding,
        rounding=rounding,
        standardized=standardized,
        name='nf_block',
      )
      for i, (place, beta) in enumerate(zip(places, betas, strict=True))
    ]
    self.final_conv = layers.WSConv2D(
      final_width, 1, standardized=standardized, name='final_conv'
    )

  def _stem(self, x: jax.Array, is_training: bool) -> jax.Array:
    return self.initial_conv(x)

  def _features(self, x: jax.Array, is_training: bool) -> jax.Array:
    return self.act(self.final_conv(x))
