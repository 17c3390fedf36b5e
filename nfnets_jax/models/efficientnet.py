"""EfficientNet: the batch-normalised baseline of the paper's comparison.

Every block widens its input, convolves each channel by itself, gates the
channels and narrows them again; it adds its input where shapes allow. B0 to B8
are one net scaled in width, depth and image size together (see `variants`).

Differences:
  * What the original calls drop connect is stochastic depth, with the kept
    branches rescaled; blocks that do not add their input have none.
  * Statistics of batch normalisation are those of one device's images, or with
    `cross_replica_axis` of all; the original shares them among as many devices
    as have 128 images between them.
  * The original computes the two layers of the gate as 1×1 convolutions; here
    they are matrices, drawn alike.

Reference:
  Tan and Le 2019, https://arxiv.org/abs/1905.11946; Brock et al. 2021,
  table 3.
"""

from collections.abc import Sequence

import haiku as hk
import jax

from nfnets_jax.models import activations, blocks, layers

# Variance 2 / fan_out, of a normal distribution.
_W_INIT = hk.initializers.VarianceScaling(2.0, 'fan_out', 'normal')


class MBConvBlock(hk.Module):
  """Mobile inverted bottleneck block.

  [1×1 → BN → swish] → k×k depthwise (stride) → BN → swish → squeeze-excite →
  1×1 → BN → [stochastic depth → + input].
  """

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    *,
    stride: int,
    kernel_size: int,
    expansion: int,
    se_ratio: float,
    cross_replica_axis: str | None,
    stochdepth_rate: float,
    name: str | None = None,
  ):
    """Describes the block; see `EfficientNet` for the arguments they share.

    Args:
      in_channels: channels of the input.
      out_channels: channels of the output.
      stride: of the depthwise convolution.
      kernel_size: of it, in pixels.
      expansion: channels inside, relative to `in_channels`. At 1 there is no
        first convolution.
      se_ratio: hidden channels of the gate, relative to `in_channels`.
      cross_replica_axis: name of the axis of devices of the statistics.
      stochdepth_rate: probability that the branch of an image is dropped.
      name: of the Haiku module.
    """
    super().__init__(name=name)
    channels = in_channels * expansion
    self.stochdepth_rate = stochdepth_rate
    self.adds_input = stride == 1 and in_channels == out_channels
    self.expand = (
      _ConvBN(channels, 1, cross_replica_axis, name='expand')
      if expansion > 1
      else None
    )
    self.depthwise = _ConvBN(
      channels,
      kernel_size,
      cross_replica_axis,
      stride=stride,
      groups=channels,
      name='depthwise',
    )
    self.squeeze_excite = layers.SqueezeExcite(
      channels,
      max(1, int(in_channels * se_ratio)),
      act=activations.silu,
      w_init=_W_INIT,
      name='squeeze_excite',
    )
    self.project = _ConvBN(out_channels, 1, cross_replica_axis, name='project')

  def __call__(
    self,
    x: jax.Array,
    is_training: bool,
    image_index: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Maps `[B, H, W, I]` to `[B, H', W', O]` and the branch.

    The second output is the residual branch before stochastic depth, which is
    the first one where the input is not added.
    """
    out = x
    if self.expand is not None:
      out = activations.silu(self.expand(out, is_training))
    out = activations.silu(self.depthwise(out, is_training))
    out = blocks.gated(out, self.squeeze_excite, scale=1.0)
    branch = self.project(out, is_training)
    if not self.adds_input:
      return branch, branch
    out = layers.stochastic_depth(
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


class EfficientNet(blocks.ResidualNet):
  """EfficientNet.

  Example:
    >>> import jax.numpy as jnp
    >>> def forward(images):
    ...   net = EfficientNet(10, width=(16,), depth=(2,), strides=(1,),
    ...                      kernel_sizes=(3,), expansions=(2,), stem_width=8,
    ...                      final_width=32, drop_rate=0.0)
    ...   return net(images, is_training=False)
    >>> net = hk.transform_with_state(forward)
    >>> images = jnp.ones((2, 16, 16, 3))
    >>> params, state = jax.jit(net.init)(jax.random.key(0), images)
    >>> outputs, state = jax.jit(net.apply)(params, state, None, images)
    >>> outputs['logits'].shape
    (2, 10)

  Reference:
    Tan and Le 2019, section 4, table 1.
  """

  def __init__(
    self,
    num_classes: int,
    *,
    width: Sequence[int],
    depth: Sequence[int],
    stem_width: int,
    final_width: int,
    drop_rate: float,
    strides: Sequence[int] = (1, 2, 2, 2, 1, 2, 1),
    kernel_sizes: Sequence[int] = (3, 3, 5, 3, 5, 5, 3),
    expansions: Sequence[int] = (1, 6, 6, 6, 6, 6, 6),
    stem_stride: int = 2,
    se_ratio: float = 0.25,
    stochdepth_rate: float = 0.2,
    cross_replica_axis: str | None = None,
    remat: str | None = None,
    name: str = 'EfficientNet',
  ):
    """Describes the net; the defaults are what B0 to B8 share.

    Args:
      num_classes: K, number of logits.
      width: output channels of each stage.
      depth: number of blocks of each stage.
      stem_width: channels of the stem's 3×3 convolution.
      final_width: channels of the last convolution.
      drop_rate: dropout on the pooled features, in [0, 1).
      strides: of the first block of each stage.
      kernel_sizes: of the depthwise convolutions of each stage, in pixels.
      expansions: channels inside the blocks of each stage, relative to those of
        their input.
      stem_stride: of the stem's convolution.
      se_ratio: hidden channels of the squeeze-excite gate, relative to those of
        the block's input.
      stochdepth_rate: of n blocks, block i (from 0) drops the residual branch
        of an image with probability stochdepth_rate · i / n, if it adds its
        input. In [0, 1).
      cross_replica_axis: name of the mapped axis of devices whose images the
        statistics are taken over; None takes each device's own.
      remat: None, 'block' or 'stage', what is computed again in the backward
        pass; see `blocks.ResidualNet`.
      name: of the Haiku module.

    Raises:
      ValueError: if an argument is impossible; the message says what is not.
    """
    blocks.check_counts(num_classes=num_classes)
    bound = num_classes**-0.5
    super().__init__(
      num_classes,
      depth=depth,
      drop_rate=drop_rate,
      remat=remat,
      w_init=hk.initializers.RandomUniform(-bound, bound),
      name=name,
    )
    blocks.check_stages(
      width=width,
      depth=depth,
      strides=strides,
      kernel_sizes=kernel_sizes,
      expansions=expansions,
    )
    blocks.check_counts(
      stem_width=stem_width, stem_stride=stem_stride, final_width=final_width
    )
    blocks.check_factors(se_ratio=se_ratio)
    self.stem = _ConvBN(
      stem_width, 3, cross_replica_axis, stride=stem_stride, name='stem'
    )
    places = blocks.places(
      stem_width,
      width=width,
      depth=depth,
      strides=strides,
      stochdepth_rate=stochdepth_rate,
    )
    self.blocks = [
      MBConvBlock(
        place.in_channels,
        place.out_channels,
        stride=place.stride,
        kernel_size=kernel_sizes[place.stage],
        expansion=expansions[place.stage],
        se_ratio=se_ratio,
        cross_replica_axis=cross_replica_axis,
        stochdepth_rate=place.stochdepth_rate,
        name='mb_conv_block',
      )
      for place in places
    ]
    self.final = _ConvBN(final_width, 1, cross_replica_axis, name='final')

  def _stem(self, x: jax.Array, is_training: bool) -> jax.Array:
    return activations.silu(self.stem(x, is_training))

  def _features(self, x: jax.Array, is_training: bool) -> jax.Array:
    return activations.silu(self.final(x, is_training))
