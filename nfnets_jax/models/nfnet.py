"""NFNet: a normaliser-free SE-ResNeXt-D with GELU.

Every residual block computes h_{i+1} = shortcut(h_i) + α·f_i(h_i / β_i), where
f_i has unit gain at initialisation and β_i is the standard deviation that h_i
is predicted to have: Var grows by α² a block and starts again at 1 at each
transition between stages.

The prediction holds for signals whose neighbouring pixels agree. On white noise
each 2×2 average pooling in a strided shortcut loses a factor of four in
variance (0.92 → 0.26 → 0.06 → 0.01 over the stages of F0, in the released code
as here): that is the net, not a fault.

Differences:
  * Appendix C once calls β the predicted variance; the code, as here, divides
    by its square root.
  * The first layer of the squeeze-excite gate is followed by an unscaled ReLU,
    where the paper's formula has the scaled GELU.
  * Stochastic depth does not rescale the kept branches.
  * A bottleneck that is no multiple of the group width is rounded down to one
    (see `variants`).

Reference:
  Brock et al. 2021, section 3 and appendix C.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import haiku as hk
import jax
import jax.numpy as jnp

from nfnets_jax.models import activations, layers

# What `NFNet` can be told to compute again in the backward pass.
REMAT = (None, 'block', 'stage')

# Maps features to features and statistics of them.
_Segment = Callable[[jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


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
      name: of the Haiku module.

    Raises:
      ValueError: if the bottleneck is narrower than one group.
    """
    super().__init__(name=name)
    bottleneck = int(out_channels * expansion)
    groups = bottleneck // group_width
    if groups < 1:
      raise ValueError(
        f'a bottleneck of {bottleneck} channels ({out_channels} × {expansion}) '
        f'is narrower than one group of {group_width}; use a group_width of at '
        f'most {bottleneck} or a width of at least {group_width / expansion:g}'
      )
    width = groups * group_width
    self.stride = stride
    self.beta = beta
    self.alpha = alpha
    self.stochdepth_rate = stochdepth_rate
    self.act = activations.scaled(activation)
    self.conv0 = layers.WSConv2D(width, 1, name='conv0')
    self.conv1 = layers.WSConv2D(
      width, 3, stride=stride, groups=groups, name='conv1'
    )
    self.conv1b = (
      layers.WSConv2D(width, 3, groups=groups, name='conv1b')
      if use_two_convs
      else None
    )
    self.conv2 = layers.WSConv2D(out_channels, 1, name='conv2')
    self.conv_shortcut = (
      layers.WSConv2D(out_channels, 1, name='conv_shortcut')
      if stride > 1 or in_channels != out_channels
      else None
    )
    self.squeeze_excite = layers.SqueezeExcite(
      out_channels, int(out_channels * se_ratio), name='squeeze_excite'
    )

  def __call__(
    self, x: jax.Array, is_training: bool
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
    if self.conv1b is not None:
      out = self.conv1b(self.act(out))
    branch = self.conv2(self.act(out))
    gate = layers.widen(2 * self.squeeze_excite(branch))
    branch = (layers.widen(branch) * gate).astype(x.dtype)
    skip_gain = hk.get_parameter(
      'skip_gain', (), jnp.float32, hk.initializers.Constant(0.0)
    )
    out = layers.stochastic_depth(branch, self.stochdepth_rate, is_training)
    out = (layers.widen(out) * (skip_gain * self.alpha)).astype(x.dtype)
    return out + shortcut, branch


class NFNet(hk.Module):
  """Normaliser-Free Net.

  Example:
    >>> def forward(images):
    ...   net = NFNet(10, width=(64,), depth=(2,), strides=(1,),
    ...               group_width=(32,), drop_rate=0.0)
    ...   return net(images, is_training=False)
    >>> net = hk.transform(forward)
    >>> images = jnp.ones((2, 32, 32, 3))
    >>> params = net.init(jax.random.key(0), images)
    >>> net.apply(params, None, images)['logits'].shape
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
      remat: what the forward pass keeps for the backward pass. None keeps all
        that it needs; 'block' keeps the input of the stem and of each block,
        'stage' the input of the stem and of each stage, and what lies between
        is computed again, for about a third more work. Parameters, outputs and
        gradients are the same.
      name: of the Haiku module.

    Raises:
      ValueError: if an argument is impossible; the message says what is not.
    """
    super().__init__(name=name)
    _check_stages(
      width=width, depth=depth, strides=strides, group_width=group_width
    )
    if len(stem_width) != len(stem_strides) or not stem_width:
      raise ValueError(
        f'stem_width {tuple(stem_width)} and stem_strides '
        f'{tuple(stem_strides)} must have one entry per convolution'
      )
    if num_classes < 1:
      raise ValueError(f'num_classes must be at least 1, got {num_classes}')
    _check_rate('drop_rate', drop_rate)
    _check_rate('stochdepth_rate', stochdepth_rate)
    if remat not in REMAT:
      raise ValueError(
        f'remat is {remat!r}; choose one of {", ".join(map(repr, REMAT))}'
      )
    self.remat = remat
    self.depth = tuple(depth)
    self.drop_rate = drop_rate
    self.act = activations.scaled(activation)
    self.stem = [
      layers.WSConv2D(channels, 3, stride=stride, name=f'stem_conv{i}')
      for i, (channels, stride) in enumerate(
        zip(stem_width, stem_strides, strict=True)
      )
    ]
    self.blocks: list[NFBlock] = []
    channels = stem_width[-1]
    variance = 1.0
    num_blocks = sum(depth)
    for stage, num_stage_blocks in enumerate(depth):
      for block in range(num_stage_blocks):
        self.blocks.append(
          NFBlock(
            channels,
            width[stage],
            stride=strides[stage] if block == 0 else 1,
            beta=variance**0.5,
            alpha=alpha,
            expansion=expansion,
            group_width=group_width[stage],
            use_two_convs=use_two_convs,
            se_ratio=se_ratio,
            stochdepth_rate=stochdepth_rate * len(self.blocks) / num_blocks,
            activation=activation,
          )
        )
        channels = width[stage]
        # The shortcut convolution of a transition has unit variance again.
        variance = (1.0 if block == 0 else variance) + alpha**2
    self.final_conv = layers.WSConv2D(
      final_conv_mult * width[-1], 1, name='final_conv'
    )
    self.classifier = layers.Linear(
      num_classes, w_init=hk.initializers.RandomNormal(0.01), name='linear'
    )

  def __call__(
    self,
    images: jax.Array,
    is_training: bool,
    return_metrics: bool = False,
  ) -> dict[str, jax.Array]:
    """Classifies images.

    Args:
      images: `[B, H, W, 3]`, normalised, of the dtype to compute in.
      is_training: whether dropout and stochastic depth act; they take a Haiku
        random key.
      return_metrics: whether to add the statistics of signal propagation.

    Returns:
      `logits` `[B, K]`, float32 or wider, and `pool` `[B, C]`, the pooled
      features before dropout.
      With `return_metrics` also scalars: `avg_sq_mean_{i}` and `avg_var_{i}`,
      the mean over channels of the squared mean and of the variance after the
      stem (i = 0) and after block i − 1; and `res_avg_var_{i}`, the variance of
      the residual branch of block i.

    Raises:
      ValueError: if `images` is not `[B, H, W, C]` of a floating dtype.
    """
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
      raise ValueError(
        'images must be a floating array [B, H, W, C], got '
        f'{images.dtype}{list(images.shape)}; normalise uint8 images first'
      )
    outputs: dict[str, jax.Array] = {}
    out = images
    for segment in self._segments(is_training, return_metrics):
      if self.remat is not None:
        segment = hk.remat(segment)
      out, metrics = segment(out)
      outputs.update(metrics)
    out = self.act(self.final_conv(out))
    pool = jnp.mean(out, axis=(1, 2))
    outputs['pool'] = pool
    logits = self.classifier(layers.dropout(pool, self.drop_rate, is_training))
    # A softmax over a thousand classes wants more than bfloat16's three digits.
    outputs['logits'] = layers.widen(logits)
    return outputs

  def _segments(
    self, is_training: bool, return_metrics: bool
  ) -> Iterator[_Segment]:
    """The parts of the net, in order, whose inputs are worth keeping.

    The first is the stem; then come stages if `remat` says so, else blocks.
    """

    def stem(x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
      x = self.stem[0](x)
      for conv in self.stem[1:]:
        x = conv(self.act(x))
      return x, _signal_metrics(x, 0) if return_metrics else {}

    def blocks(
      x: jax.Array, part: range
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
      metrics = {}
      for i in part:
        x, branch = self.blocks[i](x, is_training)
        if return_metrics:
          metrics.update(_signal_metrics(x, i + 1))
          variance = _signal_metrics(branch, i)[f'avg_var_{i}']
          metrics[f'res_avg_var_{i}'] = variance
      return x, metrics

    yield stem
    ones = [1] * len(self.blocks)
    first = 0
    for length in self.depth if self.remat == 'stage' else ones:
      yield functools.partial(blocks, part=range(first, first + length))
      first += length


def _signal_metrics(x: jax.Array, index: int) -> dict[str, jax.Array]:
  x = x.astype(jnp.float32)
  return {
    f'avg_sq_mean_{index}': jnp.mean(jnp.mean(x, axis=(0, 1, 2)) ** 2),
    f'avg_var_{index}': jnp.mean(jnp.var(x, axis=(0, 1, 2))),
  }


def _check_stages(**patterns: Sequence[int]) -> None:
  lengths = {name: len(pattern) for name, pattern in patterns.items()}
  if len(set(lengths.values())) != 1 or 0 in lengths.values():
    raise ValueError(
      'each of '
      + ', '.join(f'{n} {tuple(p)}' for n, p in patterns.items())
      + ' must have one entry per stage'
    )
  for name, pattern in patterns.items():
    if min(pattern) < 1:
      raise ValueError(f'{name} {tuple(pattern)} must be positive')


def _check_rate(name: str, rate: float) -> None:
  if not 0.0 <= rate < 1.0:
    raise ValueError(f'{name} must lie in [0, 1), got {rate}')
