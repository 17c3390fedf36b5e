"""ResNet with batch normalisation, pre-activation: the baseline of the paper.

Every residual block computes h_{i+1} = shortcut(h_i) + f_i(h_i), where f_i is
BN → ReLU → 1×1 → BN → ReLU → 3×3 → BN → ReLU → 1×1.

The same net without normalisation (`norm=None`) shows what normalisation does:
each block then adds to the stream a branch of the stream's own variance, which
doubles with every block. With `skipinit` besides it is the SkipInit ResNet:
convolutions with biases and a learnt scale of each branch, zero at first, make
it the identity at initialisation.

Differences:
  * Stochastic depth and dropout are options, off as in the released net, so
    that both nets of a comparison can be regularised alike.
  * Convolutions start as He's normal, of variance 2 / fan_in, which a net
    without normalisation needs; the released nets, the SkipInit ResNet among
    them, have Haiku's default, half of it. Behind batch normalisation the two
    compute the same at first, but their effective learning rates differ.
  * Squeeze-excite gates, where asked for, have a quarter of the channels
    inside, as released. `senet50` has a sixteenth, as in Hu et al.: the paper
    compares with that net, of 28 M parameters, and takes its results from
    another paper.
  * The released net can also have its nonlinearity after the addition
    (`preactivation=False`), other norms and nonlinearities, another initialiser
    of the classifier (`fc_init`), and the batch's own statistics in evaluation
    (`test_local_stats`). No released recipe uses these options, and they are
    left out.

Reference:
  He et al. 2016, https://arxiv.org/abs/1603.05027; Hu et al. 2018,
  https://arxiv.org/abs/1709.01507; De and Smith 2020,
  https://arxiv.org/abs/2002.10444; Brock et al. 2021, section 4.1.
"""

from collections.abc import Sequence

import haiku as hk
import jax

from nfnets_jax.models import activations, blocks, layers


class ResBlock(hk.Module):
  """Bottleneck block, pre-activation.

  BN → ReLU → 1×1 → BN → ReLU → 3×3 (stride) → BN → ReLU → 1×1 →
  [squeeze-excite] → stochastic depth → [×skip_gain] → + shortcut. The shortcut
  of a transition block is a 1×1 convolution of the normalised and activated
  input, with the stride of the block.
  """

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    *,
    stride: int,
    expansion: float,
    norm: str | None,
    cross_replica_axis: str | None,
    use_se: bool,
    se_ratio: float,
    skipinit: bool,
    stochdepth_rate: float,
    name: str | None = None,
  ):
    """Describes the block; see `ResNet` for the arguments they share.

    Args:
      in_channels: channels of the input.
      out_channels: channels of the output.
      stride: of the 3×3 convolution and the shortcut.
      expansion: channels inside, relative to `out_channels`.
      norm: 'batch' or None.
      cross_replica_axis: name of the axis of devices of the statistics.
      use_se: whether there is a squeeze-excite gate.
      se_ratio: hidden channels of the gate, relative to `out_channels`.
      skipinit: whether the branch has a learnt scale, zero at first.
      stochdepth_rate: probability that the branch of an image is dropped.
      name: of the Haiku module.
    """
    super().__init__(name=name)
    width = blocks.grouped_width(out_channels, expansion, 1)
    self.skipinit = skipinit
    self.stochdepth_rate = stochdepth_rate
    self.acts = [_act(norm, cross_replica_axis, f'bn{i}') for i in range(3)]
    with_bias = norm is None
    self.conv0 = layers.Conv2D(width, 1, with_bias=with_bias, name='conv0')
    self.conv1 = layers.Conv2D(
      width, 3, stride=stride, with_bias=with_bias, name='conv1'
    )
    self.conv2 = layers.Conv2D(
      out_channels, 1, with_bias=with_bias, name='conv2'
    )
    self.conv_shortcut = (
      layers.Conv2D(
        out_channels,
        1,
        stride=stride,
        with_bias=with_bias,
        name='conv_shortcut',
      )
      if stride > 1 or in_channels != out_channels
      else None
    )
    self.squeeze_excite = (
      layers.SqueezeExcite(
        out_channels,
        max(1, int(out_channels * se_ratio)),
        name='squeeze_excite',
      )
      if use_se
      else None
    )

  def __call__(
    self,
    x: jax.Array,
    is_training: bool,
    image_index: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Maps `[B, H, W, I]` to `[B, H', W', O]` and the branch before its gain.

    The second output is the residual branch before stochastic depth and
    SkipInit.
    """
    out = self.acts[0](x, is_training)
    shortcut = x if self.conv_shortcut is None else self.conv_shortcut(out)
    out = self.conv0(out)
    out = self.conv1(self.acts[1](out, is_training))
    branch = self.conv2(self.acts[2](out, is_training))
    if self.squeeze_excite is not None:
      branch = blocks.gated(branch, self.squeeze_excite, scale=1.0)
    out = layers.stochastic_depth(
      branch, self.stochdepth_rate, is_training, image_index
    )
    if self.skipinit:
      out = blocks.skip_init(out)
    return out + shortcut, branch


def _act(
  norm: str | None, cross_replica_axis: str | None, name: str
) -> blocks.NormAct:
  return blocks.NormAct(activations.relu, norm, cross_replica_axis, name)


class ResNet(blocks.ResidualNet):
  """Pre-activation ResNet, with batch normalisation or without.

  Example:
    >>> import jax.numpy as jnp
    >>> def forward(images):
    ...   net = ResNet(10, width=(64,), depth=(2,), strides=(1,), stem_width=16)
    ...   return net(images, is_training=True)
    >>> net = hk.transform_with_state(forward)
    >>> images = jnp.ones((2, 32, 32, 3))
    >>> params, state = jax.jit(net.init)(jax.random.key(0), images)
    >>> outputs, state = jax.jit(net.apply)(params, state, None, images)
    >>> outputs['logits'].shape
    (2, 10)

  Reference:
    He et al. 2016, https://arxiv.org/abs/1603.05027.
  """

  def __init__(
    self,
    num_classes: int,
    *,
    depth: Sequence[int],
    width: Sequence[int] = (256, 512, 1024, 2048),
    strides: Sequence[int] = (1, 2, 2, 2),
    expansion: float = 0.25,
    stem_width: int = 64,
    stem_stride: int = 2,
    stem_pool: bool = True,
    norm: str | None = 'batch',
    cross_replica_axis: str | None = None,
    use_se: bool = False,
    se_ratio: float = 0.25,
    skipinit: bool = False,
    stochdepth_rate: float = 0.0,
    drop_rate: float = 0.0,
    remat: str | None = None,
    name: str = 'ResNet',
  ):
    """Describes the net; the defaults are what all depths share.

    Args:
      num_classes: K, number of logits.
      depth: number of blocks of each stage.
      width: output channels of each stage.
      strides: of the first block of each stage.
      expansion: bottleneck channels relative to the stage's width.
      stem_width: channels of the stem's 7×7 convolution.
      stem_stride: of that convolution.
      stem_pool: whether a 3×3 max-pooling of stride 2 follows it.
      norm: 'batch' for batch normalisation, or None for no normalisation; the
        convolutions then have biases.
      cross_replica_axis: name of the mapped axis of devices whose images the
        statistics are taken over; None takes each device's own.
      use_se: whether the blocks have squeeze-excite gates, as in SENet.
      se_ratio: hidden channels of the gates relative to the stage's width.
      skipinit: whether each branch has a learnt scale, zero at first.
      stochdepth_rate: of n blocks, block i (from 0) drops the residual branch
        of an image with probability stochdepth_rate · i / n. In [0, 1).
      drop_rate: dropout on the pooled features, in [0, 1).
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
    blocks.check_counts(stem_width=stem_width, stem_stride=stem_stride)
    blocks.check_factors(expansion=expansion, se_ratio=se_ratio)
    blocks.check_norm(norm, cross_replica_axis)
    self.stem_pool = stem_pool
    self.initial_conv = layers.Conv2D(
      stem_width,
      7,
      stride=stem_stride,
      with_bias=norm is None and not skipinit,
      name='initial_conv',
    )
    places = blocks.places(
      stem_width,
      width=width,
      depth=depth,
      strides=strides,
      stochdepth_rate=stochdepth_rate,
    )
    self.blocks = [
      ResBlock(
        place.in_channels,
        place.out_channels,
        stride=place.stride,
        expansion=expansion,
        norm=norm,
        cross_replica_axis=cross_replica_axis,
        use_se=use_se,
        se_ratio=se_ratio,
        skipinit=skipinit,
        stochdepth_rate=place.stochdepth_rate,
        name='res_block_v2',
      )
      for place in places
    ]
    self.final_act = _act(norm, cross_replica_axis, 'final_bn')

  def _stem(self, x: jax.Array, is_training: bool) -> jax.Array:
    x = self.initial_conv(x)
    return layers.max_pool(x, 3, stride=2) if self.stem_pool else x

  def _features(self, x: jax.Array, is_training: bool) -> jax.Array:
    return self.final_act(x, is_training)
