"""NF-ResNet: the pre-activation ResNet without batch normalisation.

Every residual block computes h_{i+1} = shortcut(h_i) + α·f_i(h_i / β_i), as in
`nfnet`, with the bottleneck of ResNet-50: 1×1, 3×3 and 1×1 convolutions, whose
weights are standardised, in stages of 256, 512, 1024 and 2048 channels. It is
the net of the paper's studies of clipping.

The max-pooling of the stem raises the mean and lowers the variance of what
enters the first stage; no β accounts for it. The strided shortcuts pick every
other pixel, so they keep the variance where those of `nfnet` average.

Differences:
  * The convolution of the stem has a bias, as it has in the released code,
    which asks for none.
  * Stochastic depth does not rescale the kept branches.
  * The released module has no dropout rate of its own and must be told one;
    the default here is none. Options of it that no released recipe uses, the
    initialisers of the classifier (`fc_init`) and of SkipInit, are left out.

Reference:
  Brock, De and Smith 2021, "Characterizing signal propagation to close the
  performance gap in unnormalized ResNets", https://arxiv.org/abs/2101.08692;
  Brock et al. 2021, section 4.1.
"""

import functools
from collections.abc import Sequence

import haiku as hk
import jax

from nfnets_jax.models import activations, blocks, layers


class NFResBlock(hk.Module):
  """Normaliser-free bottleneck block, pre-activation.

  γ·act → ×1/β → 1×1 → γ·act → 3×3 (stride) → γ·act → 1×1 →
  [2·squeeze-excite] → stochastic depth → [×skip_gain] → ×α → + shortcut. The
  shortcut of a transition block is a 1×1 convolution of the activated and
  scaled input, with the stride of the block.
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
    use_se: bool,
    se_ratio: float,
    skipinit: bool,
    stochdepth_rate: float,
    activation: str,
    padding: str = 'same',
    pool_shortcut: bool = False,
    standardized: bool = False,
    name: str | None = None,
  ):
    """Describes the block; see `NFResNet` for the arguments they share.

    Args:
      in_channels: channels of the input.
      out_channels: channels of the output.
      stride: of the 3×3 convolution and the shortcut.
      beta: predicted standard deviation of the input.
      alpha: scale of the residual branch.
      expansion: channels inside, relative to `out_channels`.
      use_se: whether there is a squeeze-excite gate.
      se_ratio: hidden channels of the gate, relative to `out_channels`.
      skipinit: whether the branch has a learnt scale, zero at first.
      stochdepth_rate: probability that the branch of an image is dropped.
      activation: name of the nonlinearity.
      padding: of the strided convolution, 'same' or 'symmetric'.
      pool_shortcut: whether a strided shortcut averages instead of picking.
      standardized: whether weights are standardised already, by `layers.fold`.
      name: of the Haiku module.
    """
    super().__init__(name=name)
    width = blocks.grouped_width(out_channels, expansion, 1)
    self.beta = beta
    self.alpha = alpha
    self.skipinit = skipinit
    self.shortcut_pool = stride if pool_shortcut else 1
    self.stochdepth_rate = stochdepth_rate
    self.act = activations.scaled(activation)
    conv = functools.partial(layers.WSConv2D, standardized=standardized)
    self.conv0 = conv(width, 1, name='conv0')
    self.conv1 = conv(width, 3, stride=stride, padding=padding, name='conv1')
    self.conv2 = conv(out_channels, 1, name='conv2')
    self.conv_shortcut = (
      conv(
        out_channels,
        1,
        stride=1 if pool_shortcut else stride,
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

    The second output is the residual branch f(h/β), before stochastic depth,
    SkipInit and α: its variance is what the theory says is one.
    """
    out = self.act(x) * (1.0 / self.beta)
    shortcut = x
    if self.conv_shortcut is not None:
      pooled = out
      if self.shortcut_pool > 1:
        pooled = layers.avg_pool(out, self.shortcut_pool)
      shortcut = self.conv_shortcut(pooled)
    out = self.conv0(out)
    out = self.conv1(self.act(out))
    out = self.act(out)
    if self.squeeze_excite is None:
      branch = self.conv2(out)
    else:
      branch, mean = self.conv2.with_mean(out)
      branch = blocks.gated(branch, self.squeeze_excite, mean=mean)
    out = layers.stochastic_depth(
      branch, self.stochdepth_rate, is_training, image_index
    )
    if self.skipinit:
      return blocks.skip_init(out, self.alpha) + shortcut, branch
    return out * self.alpha + shortcut, branch


class NFResNet(blocks.ResidualNet):
  """Normaliser-free ResNet.

  Example:
    >>> import jax.numpy as jnp
    >>> def forward(images):
    ...   net = NFResNet(10, width=(64,), depth=(2,), strides=(1,),
    ...                  stem_width=16)
    ...   return net(images, is_training=False)
    >>> net = hk.transform(forward)
    >>> images = jnp.ones((2, 32, 32, 3))
    >>> params = jax.jit(net.init)(jax.random.key(0), images)
    >>> jax.jit(net.apply)(params, None, images)['logits'].shape
    (2, 10)

  Reference:
    Brock, De and Smith 2021, https://arxiv.org/abs/2101.08692.
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
    use_se: bool = False,
    se_ratio: float = 0.25,
    skipinit: bool = True,
    alpha: float = 0.2,
    stochdepth_rate: float = 0.1,
    drop_rate: float = 0.0,
    activation: str = 'relu',
    padding: str = 'same',
    pool_shortcut: bool = False,
    standardized: bool = False,
    remat: str | None = None,
    name: str = 'NF_ResNet',
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
      use_se: whether the blocks have squeeze-excite gates.
      se_ratio: hidden channels of the gates relative to the stage's width.
      skipinit: whether each branch has a learnt scale, zero at first.
      alpha: α, scale of the residual branches.
      stochdepth_rate: of n blocks, block i (from 0) drops the residual branch
        of an image with probability stochdepth_rate · i / n. In [0, 1).
      drop_rate: dropout on the pooled features, in [0, 1).
      activation: one of `activations.NAMES`.
      padding: of convolutions and pooling with a stride: 'same', or 'symmetric'
        as in PyTorch.
      pool_shortcut: whether strided shortcuts average 2×2 pixels, as in timm,
        instead of picking every other one.
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
    blocks.check_stages(width=width, depth=depth, strides=strides)
    blocks.check_counts(stem_width=stem_width, stem_stride=stem_stride)
    blocks.check_factors(expansion=expansion, se_ratio=se_ratio, alpha=alpha)
    self.act = activations.scaled(activation)
    self.stem_pool = stem_pool
    self.padding = padding
    self.initial_conv = layers.WSConv2D(
      stem_width,
      7,
      stride=stem_stride,
      padding=padding,
      standardized=standardized,
      name='initial_conv',
    )
    places = blocks.places(
      stem_width,
      width=width,
      depth=depth,
      strides=strides,
      stochdepth_rate=stochdepth_rate,
    )
    betas = blocks.predicted_stds(depth, alpha)
    self.blocks = [
      NFResBlock(
        place.in_channels,
        place.out_channels,
        stride=place.stride,
        beta=beta,
        alpha=alpha,
        expansion=expansion,
        use_se=use_se,
        se_ratio=se_ratio,
        skipinit=skipinit,
        stochdepth_rate=place.stochdepth_rate,
        activation=activation,
        padding=padding,
        pool_shortcut=pool_shortcut,
        standardized=standardized,
        name='nf_res_block',
      )
      for place, beta in zip(places, betas, strict=True)
    ]

  def _stem(self, x: jax.Array, is_training: bool) -> jax.Array:
    x = self.initial_conv(x)
    if not self.stem_pool:
      return x
    return layers.max_pool(x, 3, stride=2, padding=self.padding)

  def _features(self, x: jax.Array, is_training: bool) -> jax.Array:
    return self.act(x)
