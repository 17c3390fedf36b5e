"""What the residual nets share: the path from images to logits, and checks.

A net is a stem, stages of residual blocks and a head, which each family
defines. The layout of the blocks, rematerialisation, the statistics of the
signal and the classifier are here.
"""

import abc
import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Iterator, Sequence

import haiku as hk
import jax
import jax.numpy as jnp

from nfnets_jax.models import layers, precision, variants

# What to recompute in the backward pass.
REMAT = (None, 'block', 'stage')

# Normalisation before each nonlinearity.
NORMS = (None, 'batch')

# Maps features, `is_training` and `image_index` to features and the residual
# branch.
Block = Callable[
  [jax.Array, bool, jax.Array | None], tuple[jax.Array, jax.Array]
]

# Maps features to features and statistics of them.
_Segment = Callable[[jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Place:
  """The place of a block in its net.

  Attributes:
    index: of the block in the net, from 0.
    stage: from 0.
    in_channels: channels of the input.
    out_channels: channels of the output.
    stride: of the block, in pixels.
    stochdepth_rate: probability that the branch of an image is dropped.
  """

  index: int
  stage: int
  in_channels: int
  out_channels: int
  stride: int
  stochdepth_rate: float

  @property
  def is_transition(self) -> bool:
    """Whether the input has another shape than the output."""
    return self.stride > 1 or self.in_channels != self.out_channels


def layout(settings: variants.Settings, in_channels: int) -> list[Place]:
  """Lays out the blocks of a net.

  Args:
    settings: of the net.
    in_channels: channels of the stem's output.

  Returns:
    The place of each block, in order.

  Raises:
    ValueError: if `stochdepth_rate` is not in [0, 1).

  Example:
    >>> settings = variants.NFResNetSettings(
    ...   width=(64, 128), depth=(1, 2), strides=(1, 2))
    >>> [(x.out_channels, x.stride) for x in layout(settings, 64)]
    [(64, 1), (128, 2), (128, 1)]
  """
  check_rate('stochdepth_rate', settings.stochdepth_rate)
  num_blocks = sum(settings.depth)
  places: list[Place] = []
  for stage, stage_blocks in enumerate(settings.depth):
    for block in range(stage_blocks):
      index = len(places)
      places.append(
        Place(
          index=index,
          stage=stage,
          in_channels=in_channels,
          out_channels=settings.width[stage],
          stride=settings.strides[stage] if block == 0 else 1,
          stochdepth_rate=settings.stochdepth_rate * index / num_blocks,
        )
      )
      in_channels = settings.width[stage]
  return places


def predicted_stds(depth: Sequence[int], alpha: float) -> list[float]:
  """Predicts β, the standard deviation of every block's input.

  The variance is 1 after the stem and grows by α² a block. The shortcut of the
  first block of a stage is a convolution of the scaled input, which has unit
  variance again.

  Args:
    depth: number of blocks of each stage.
    alpha: α, scale of the residual branches.

  Returns:
    One β a block, in order.

  Example:
    >>> [round(beta**2, 2) for beta in predicted_stds((2, 2), alpha=0.2)]
    [1.0, 1.04, 1.08, 1.04]

  Reference:
    Brock et al. 2021, section 2.
  """
  stds, variance = [], 1.0
  for num_blocks in depth:
    for block in range(num_blocks):
      stds.append(variance**0.5)
      variance = (1.0 if block == 0 else variance) + alpha**2
  return stds


class ResidualNet(hk.Module):
  """An image classifier of residual blocks, the base class of the families.

  A family sets `blocks` and defines `_stem` and `_features`.
  """

  blocks: Sequence[Block]

  def __init__(
    self,
    num_classes: int,
    settings: variants.Settings,
    *,
    remat: str | None,
    w_init: hk.initializers.Initializer,
    name: str,
  ):
    """Constructs the net.

    Args:
      num_classes: K, number of logits.
      settings: of the family.
      remat: what the forward pass keeps for the backward pass. None keeps all
        that it needs; 'block' keeps the input of the stem and of each block,
        'stage' the input of the stem and of each stage, and the rest is
        recomputed, for about a third more work. Parameters, outputs and
        gradients are the same.
      w_init: of the classifier's weight.
      name: of the Haiku module.

    Raises:
      ValueError: if a setting is impossible; the message says which.
    """
    super().__init__(name=name)
    check_counts(num_classes=num_classes)
    check_stages(depth=settings.depth)
    check_rate('drop_rate', settings.drop_rate)
    if remat not in REMAT:
      raise ValueError(
        f'remat is {remat!r}; choose one of {", ".join(map(repr, REMAT))}'
      )
    self.settings = settings
    self.remat = remat
    self.classifier = layers.Linear(num_classes, w_init=w_init, name='linear')

  def __call__(
    self,
    images: jax.Array,
    is_training: bool,
    image_index: jax.Array | None = None,
    *,
    return_metrics: bool = False,
  ) -> dict[str, jax.Array]:
    """Classifies images.

    Args:
      images: `[B, H, W, 3]`, normalised, of the dtype to compute in.
      is_training: whether dropout and stochastic depth act, which take a Haiku
        random key, and batch normalisation takes the batch's statistics.
      image_index: int32 `[B]`, the index of each image in the global batch,
        from which dropout and stochastic depth draw; see `layers.dropout`.
      return_metrics: whether to add the statistics of signal propagation.

    Returns:
      `logits` `[B, K]`, float32 or wider, and `pool` `[B, C]`, the pooled
      features before dropout.
      With `return_metrics` also scalars: `avg_sq_mean_{i}` and `avg_var_{i}`,
      the mean over channels of the squared mean and of the variance after the
      stem (i = 0) and after block i − 1; and `res_avg_var_{i}`, the variance of
      the residual branch of block i.

    Raises:
      ValueError: if `images` is not `[B, H, W, C]` of a floating dtype, or has
        no pixels.
    """
    if (
      images.ndim != 4
      or 0 in images.shape[1:]  # whose mean is NaN
      or not jnp.issubdtype(images.dtype, jnp.floating)
    ):
      raise ValueError(
        'images must be a floating array [B, H, W, C], got '
        f'{images.dtype}{list(images.shape)}; normalise uint8 images first'
      )
    outputs: dict[str, jax.Array] = {}
    out = images
    for segment in self._segments(is_training, image_index, return_metrics):
      if self.remat is not None:
        segment = hk.remat(segment)
      out, metrics = segment(out)
      outputs.update(metrics)
    pool = jnp.mean(self._features(out, is_training), axis=(1, 2))
    outputs['pool'] = pool
    kept = layers.dropout(
      pool, self.settings.drop_rate, is_training, image_index
    )
    logits = self.classifier(kept)
    # bfloat16's three digits are too few for a softmax over 1000 classes.
    outputs['logits'] = precision.widen(logits)
    return outputs

  @abc.abstractmethod
  def _stem(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Maps images to the input of the first block."""

  @abc.abstractmethod
  def _features(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Maps the output of the last block to the features to pool."""

  def _segments(
    self,
    is_training: bool,
    image_index: jax.Array | None,
    return_metrics: bool,
  ) -> Iterator[_Segment]:
    """Yields the parts that `remat` recomputes: stem, then stages or blocks."""

    def stem(x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
      x = self._stem(x, is_training)
      return x, _signal_metrics(x, 0) if return_metrics else {}

    def blocks(
      x: jax.Array, part: range
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
      metrics = {}
      for i in part:
        x, branch = self.blocks[i](x, is_training, image_index)
        if return_metrics:
          metrics.update(_signal_metrics(x, i + 1))
          variance = _signal_metrics(branch, i)[f'avg_var_{i}']
          metrics[f'res_avg_var_{i}'] = variance
      return x, metrics

    yield stem
    ones = [1] * len(self.blocks)
    first = 0
    for length in self.settings.depth if self.remat == 'stage' else ones:
      yield functools.partial(blocks, part=range(first, first + length))
      first += length


def _signal_metrics(x: jax.Array, index: int) -> dict[str, jax.Array]:
  x = x.astype(jnp.float32)
  return {
    f'avg_sq_mean_{index}': jnp.mean(jnp.mean(x, axis=(0, 1, 2)) ** 2),
    f'avg_var_{index}': jnp.mean(jnp.var(x, axis=(0, 1, 2))),
  }


def skip_init(branch: jax.Array, scale: float = 1.0) -> jax.Array:
  """Multiplies a branch by `scale` and by a learnt scalar, zero at first.

  Call it inside the block, which owns the parameter `skip_gain`.

  Args:
    branch: `[B, H, W, C]`.
    scale: constant factor.

  Returns:
    An array like `branch`.

  Reference:
    De and Smith 2020, https://arxiv.org/abs/2002.10444.
  """
  gain = hk.get_parameter(
    'skip_gain', (), jnp.float32, hk.initializers.Constant(0.0)
  )
  return (precision.widen(branch) * (gain * scale)).astype(branch.dtype)


def gated(
  x: jax.Array,
  squeeze_excite: layers.SqueezeExcite,
  scale: float = 2.0,
  mean: jax.Array | None = None,
) -> jax.Array:
  """Multiplies by the gate, and by two, as the gate is about one half at first.

  Args:
    x: `[B, H, W, C]`.
    squeeze_excite: the gate.
    scale: factor of the gate.
    mean: of `x` over the pixels, `[B, C]`; taken here if None.

  Returns:
    An array like `x`.
  """
  if mean is None:
    mean = jnp.mean(x, axis=(1, 2))
  gate = precision.widen(scale * squeeze_excite(mean))
  return (precision.widen(x) * gate).astype(x.dtype)


def grouped_width(width: int, expansion: float, group_width: int) -> int:
  """Returns the channels of a bottleneck, rounded down to whole groups.

  Args:
    width: channels that the bottleneck is relative to.
    expansion: of the bottleneck, relative to `width`.
    group_width: channels per group.

  Returns:
    The largest multiple of `group_width` in `width · expansion`.

  Raises:
    ValueError: if the bottleneck is narrower than one group.

  Example:
    >>> grouped_width(384, 0.5, 128)
    128
  """
  bottleneck = int(width * expansion)
  if bottleneck < group_width:
    raise ValueError(
      f'a bottleneck of {bottleneck} channels ({width} × {expansion}) '
      f'is narrower than one group of {group_width}; use a group_width of at '
      f'most {bottleneck} or a width of at least {group_width / expansion:g}'
    )
  return bottleneck // group_width * group_width


def check_stages(per: str = 'stage', /, **patterns: Sequence[int]) -> None:
  """Checks sequences of positive integers, all of the same length.

  Args:
    per: what each entry is for.
    **patterns: the sequences, by name.

  Raises:
    ValueError: if an entry is not a positive integer, or the lengths differ.
  """
  for name, pattern in patterns.items():
    if not isinstance(pattern, Sequence) or isinstance(pattern, str):
      raise ValueError(f'{name} must have one entry per {per}, got {pattern!r}')
  lengths = {len(pattern) for pattern in patterns.values()}
  if len(lengths) != 1 or 0 in lengths:
    raise ValueError(
      'each of '
      + ', '.join(f'{n} {tuple(p)}' for n, p in patterns.items())
      + f' must have one entry per {per}'
    )
  for name, pattern in patterns.items():
    if not all(_is_integer(x) and x >= 1 for x in pattern):
      raise ValueError(f'{name} {tuple(pattern)} must be positive integers')


def check_counts(**counts: int) -> None:
  """Raises a ValueError if one of `counts` is not a positive integer."""
  for name, count in counts.items():
    if not _is_integer(count):
      raise ValueError(f'{name} must be an integer, got {count!r}')
    if count < 1:
      raise ValueError(f'{name} must be at least 1, got {count}')


def check_factors(**factors: float) -> None:
  """Raises a ValueError if one of `factors` is not positive and finite."""
  for name, factor in factors.items():
    if not _is_real(factor) or not 0 < factor < math.inf:
      raise ValueError(f'{name} must be a positive number, got {factor!r}')


def check_rate(name: str, rate: float) -> None:
  """Raises a ValueError if `rate` is not in [0, 1)."""
  if not _is_real(rate) or not 0.0 <= rate < 1.0:
    raise ValueError(f'{name} must lie in [0, 1), got {rate!r}')


def check_norm(norm: str | None, cross_replica_axis: str | None) -> None:
  """Raises a ValueError if `norm` is unknown, or `cross_replica_axis` unused.

  Args:
    norm: one of `NORMS`.
    cross_replica_axis: name of the axis of devices of its statistics.
  """
  if norm not in NORMS:
    raise ValueError(
      f'norm is {norm!r}; choose one of {", ".join(map(repr, NORMS))}'
    )
  if norm is None and cross_replica_axis is not None:
    raise ValueError(
      f'cross_replica_axis is {cross_replica_axis!r}, but without a norm there '
      "are no statistics; use norm='batch' or cross_replica_axis=None"
    )


# bool is a subclass of int.
def _is_integer(value: object) -> bool:
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
  return isinstance(value, numbers.Real) and not isinstance(value, bool)
