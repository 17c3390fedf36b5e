"""The base class of the families: stem, residual blocks, classifier."""

import abc
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from nfnets_jax.models import checks, dropout, layers, layout, precision
from nfnets_jax.models.settings import Settings

# Granularity of rematerialisation.
REMAT = (None, 'block', 'stage')

# Maps features, `is_training` and `image_index` to features and the residual
# branch.
Block = Callable[
  [jax.Array, bool, jax.Array | None], tuple[jax.Array, jax.Array]
]

# Maps features to features and statistics of them.
_Segment = Callable[[jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class ResidualNet(hk.Module):
  """An image classifier of residual blocks.

  A family sets `blocks` and defines `_stem` and `_activate`.
  """

  blocks: Sequence[Block]

  def __init__(
    self,
    num_classes: int,
    settings: Settings,
    *,
    remat: str | None,
    w_init: hk.initializers.Initializer,
    name: str,
  ):
    """Constructs the net.

    Args:
      num_classes: K, number of logits.
      settings: settings of the family.
      remat: granularity of rematerialisation: 'block' and 'stage' keep only
        the inputs of the stem and of each block or stage for the backward pass,
        and recompute the rest; None keeps all that it needs.
      w_init: initialiser of the classifier's weight.
      name: name of the Haiku module.

    Raises:
      ValueError: if `num_classes` or `remat` is invalid.
    """
    super().__init__(name=name)
    checks.counts(num_classes=num_classes)
    checks.choice('remat', remat, REMAT)
    self.settings = settings
    self.specs = layout.block_specs(settings)
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
      images: normalised images `[B, H, W, 3]`, of the dtype to compute in.
      is_training: whether to apply dropout and stochastic depth, which need a
        random key, and to normalise by batch statistics.
      image_index: index of each image in the global batch, int32 `[B]`, that
        dropout and stochastic depth depend on; see `dropout.dropout`.
      return_metrics: whether to return statistics of signal propagation.

    Returns:
      `logits` `[B, K]`, float32 or wider, and `pool` `[B, C]`, the pooled
      features before dropout.
      With `return_metrics` also scalars: `avg_sq_mean_{i}` and `avg_var_{i}`,
      the mean over channels of the squared mean and of the variance after the
      stem (i = 0) and after block i − 1; and `res_avg_var_{i}`, the variance of
      the residual branch of block i.

    Raises:
      ValueError: if `images` is not a floating-point array `[B, H, W, C]`, is
        empty, or is sharded over explicit axes of a mesh.
    """
    _check_images(images)
    x, outputs = images, {}
    for segment in self._segments(is_training, image_index, return_metrics):
      x, metrics = segment(x)
      outputs.update(metrics)
    x = self._activate(self._last_map(x), is_training)
    outputs['pool'] = jnp.mean(x, axis=(1, 2))
    kept = dropout.dropout(
      outputs['pool'], self.settings.drop_rate, is_training, image_index
    )
    # bfloat16's three digits are too few for a softmax over 1000 classes.
    outputs['logits'] = precision.widen(self.classifier(kept))
    return outputs

  def features(
    self,
    images: jax.Array,
    is_training: bool,
    image_index: jax.Array | None = None,
  ) -> list[jax.Array]:
    """Returns the last feature map at each stride, before its activation.

    `layout.feature_info` gives their channels and strides. A map is the output
    of a convolution of the stem, of a block, or of the last convolution of
    NFNets and NF-RegNets; max-pooled ones count only if no block follows at
    their stride.

    Args:
      images: as in `__call__`.
      is_training: as in `__call__`.
      image_index: as in `__call__`.

    Returns:
      Maps `[B, ceil(H / stride), ceil(W / stride), C]`, finest first.

    Raises:
      ValueError: as in `__call__`.
    """
    _check_images(images)
    stem_maps = self._remat(lambda x: self._stem(x, is_training))(images)
    maps = {
      size.stride: x
      for size, x in zip(self.settings.stem_maps, stem_maps, strict=True)
    }
    x, stride = stem_maps[-1], 1
    segments = self._block_segments(is_training, image_index, False)
    for run, segment in zip(self._runs(), segments, strict=True):
      x, _ = segment(x)
      stride = self.specs[run[-1]].total_stride
      maps[stride] = x
    maps[stride] = self._last_map(x)
    return list(maps.values())

  @abc.abstractmethod
  def _stem(self, x: jax.Array, is_training: bool) -> list[jax.Array]:
    """Maps images to the outputs of the stem's layers."""

  def _last_map(self, x: jax.Array) -> jax.Array:
    """Maps the output of the last block to the last feature map."""
    return x

  @abc.abstractmethod
  def _activate(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Maps the last feature map to the features to pool."""

  def _segments(
    self,
    is_training: bool,
    image_index: jax.Array | None,
    return_metrics: bool,
  ) -> Iterator[_Segment]:
    """Yields the stem, and then the blocks or stages."""

    def stem(x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
      x = self._stem(x, is_training)[-1]
      return x, _signal_metrics(x, 0) if return_metrics else {}

    yield self._remat(stem)
    yield from self._block_segments(is_training, image_index, return_metrics)

  def _block_segments(
    self,
    is_training: bool,
    image_index: jax.Array | None,
    return_metrics: bool,
  ) -> Iterator[_Segment]:
    def blocks(
      x: jax.Array, run: range
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
      metrics = {}
      for i in run:
        x, branch = self.blocks[i](x, is_training, image_index)
        if return_metrics:
          metrics.update(_signal_metrics(x, i + 1))
          metrics[f'res_avg_var_{i}'] = _mean_variance(branch)
      return x, metrics

    for run in self._runs():
      yield self._remat(functools.partial(blocks, run=run))

  def _runs(self) -> Iterator[range]:
    """Yields the indices of the blocks that are recomputed together."""
    ones = [1] * len(self.blocks)
    first = 0
    for length in self.settings.depth if self.remat == 'stage' else ones:
      yield range(first, first + length)
      first += length

  def _remat(self, function: Callable[..., Any]) -> Callable[..., Any]:
    return function if self.remat is None else hk.remat(function)


def _check_images(images: jax.Array) -> None:
  if (
    images.ndim != 4
    or 0 in images.shape[1:]  # whose mean is NaN
    or not jnp.issubdtype(images.dtype, jnp.floating)
  ):
    raise ValueError(
      'images must be a floating array [B, H, W, C], got '
      f'{images.dtype}{list(images.shape)}; normalise uint8 images first'
    )
  # The backward passes of the convolutions do not say how results are sharded.
  spec = jax.typeof(images).sharding.spec
  if explicit := [axis for axis in spec if axis is not None]:
    raise ValueError(
      f'images are sharded over {explicit}, explicit axes of a mesh; create '
      'it with jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,))'
    )


def _signal_metrics(x: jax.Array, index: int) -> dict[str, jax.Array]:
  x = x.astype(jnp.float32)
  return {
    f'avg_sq_mean_{index}': jnp.mean(jnp.mean(x, axis=(0, 1, 2)) ** 2),
    f'avg_var_{index}': _mean_variance(x),
  }


def _mean_variance(x: jax.Array) -> jax.Array:
  return jnp.mean(jnp.var(x.astype(jnp.float32), axis=(0, 1, 2)))
