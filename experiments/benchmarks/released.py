"""The released formulation of a net, rewritten to measure against.

`conv_general_dilated` with `feature_group_count` for all convolutions, weights
standardised over their three leading axes, `reduce_window` for average pooling,
and JAX's GELU. The values equal ours up to rounding.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax

from nfnets_jax.models import (
  activations,
  convolution,
  nfnet,
  pooling,
  standardization,
)


@contextlib.contextmanager
def formulation() -> Iterator[None]:
  """Gives nets traced inside it the released formulation."""
  gelu = {'gelu': (jax.nn.gelu, activations.gain('gelu'))}
  plain_stem = nfnet.NFNet._stem_of_pixels
  with (
    mock.patch.object(convolution, 'conv2d', conv2d),
    mock.patch.object(convolution, 'add_bias', add_bias),
    mock.patch.object(convolution, 'pointwise_with_mean', pointwise_with_mean),
    mock.patch.object(convolution, 'keep_layout', lambda w: w),
    mock.patch.object(convolution, 'keep_groups_apart', lambda x, groups: x),
    mock.patch.object(nfnet.NFNet, '_stem_of_blocks', plain_stem),
    mock.patch.object(pooling, 'avg_pool', avg_pool),
    mock.patch.object(
      standardization, 'standardize_weight', standardize_weight
    ),
    mock.patch.dict(activations._TABLE, gelu),
  ):
    yield


def conv2d(
  x: jax.Array,
  w: jax.Array,
  stride: int = 1,
  groups: int = 1,
  padding: str = 'same',
) -> jax.Array:
  """Replaces `convolution.conv2d`."""
  if padding != 'same':
    raise ValueError(f'the released code has no padding {padding!r}')
  return lax.conv_general_dilated(
    x,
    w,
    (stride, stride),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
  """Replaces `convolution.add_bias`."""
  return x + bias.astype(x.dtype).reshape(1, 1, 1, -1)


def pointwise_with_mean(
  x: jax.Array, w: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Replaces `convolution.pointwise_with_mean`."""
  y = add_bias(conv2d(x, w), bias)
  return y, jnp.mean(y, axis=(1, 2))


def avg_pool(x: jax.Array, size: int) -> jax.Array:
  """Pools, as `pooling.avg_pool` does."""

  def window_sum(x: jax.Array) -> jax.Array:
    window = (1, size, size, 1)
    return lax.reduce_window(x, 0.0, lax.add, window, window, 'SAME')

  return window_sum(x) / window_sum(jnp.ones_like(x))


def standardize_weight(
  w: jax.Array, gain: jax.Array, eps: float = standardization.WS_EPS
) -> jax.Array:
  """Standardises, as `standardization.standardize_weight` does."""
  fan_in = w.shape[0] * w.shape[1] * w.shape[2]
  mean = jnp.mean(w, axis=(0, 1, 2))
  var = jnp.var(w, axis=(0, 1, 2))
  scale = gain.reshape(-1) * lax.rsqrt(jnp.maximum(var * fan_in, eps))
  shift = mean * scale
  return w * scale.reshape(1, 1, 1, -1) - shift.reshape(1, 1, 1, -1)
