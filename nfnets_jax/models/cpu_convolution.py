"""Convolutions and their gradients in forms that are fast on CPU.

* 1×1 convolutions are matrix products of every `stride`th pixel: XLA's weight
  gradient is several times slower, and JAX's gradient of the product
  transposes dy first.
* Depthwise convolutions are sums of shifted inputs times weights, ten times
  faster than XLA's.
* Other grouped convolutions are one convolution per group: XLA's gradient of
  a grouped convolution is ten to a hundred times slower. Beyond 16 groups,
  neighbours are merged into one block-diagonal convolution, since a hundred
  small convolutions take seconds to compile.
* Gradients keep channels last. XLA changes the layout by itself, but not
  inside loops, such as that over micro-batches, where the gradients would be
  ten times slower.
* The input gradient of a strided convolution is one convolution for each of
  stride² phases of the pixels. In XLA's single one, three of four products
  are with zeros at stride 2.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nfnets_jax.models import precision, xla_convolution
from nfnets_jax.models.xla_convolution import Padding

# Largest number of convolutions that a grouped one is split into.
_MAX_CONVOLUTIONS = 16


def conv2d(
  x: jax.Array, w: jax.Array, stride: int, groups: int, padding: str
) -> jax.Array:
  """Convolves; see `convolution.conv2d`."""
  if w.shape[:2] == (1, 1) and groups == 1:
    return _pointwise(x[:, ::stride, ::stride], w[0, 0])
  if padding == 'symmetric' and stride > 1:
    if groups == 1:
      return xla_convolution.conv2d(x, w, stride, groups, padding)
    return _grouped_conv2d(x, w, stride, groups, padding)
  if groups == 1:
    return _conv_for_loops(x, w, stride)
  if groups == x.shape[3] == w.shape[3]:
    return _depthwise(x, w, stride)
  return _grouped_conv2d(x, w, stride, groups)


@jax.custom_vjp
def _pointwise(x: jax.Array, w: jax.Array) -> jax.Array:
  return lax.dot_general(x, w, (((3,), (0,)), ((), ())))


def _pointwise_forward(
  x: jax.Array, w: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _pointwise(x, w), (x, w)


def _pointwise_backward(
  kept: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x, w = kept
  dx = lax.dot_general(dy, w, (((3,), (1,)), ((), ())))
  pixels = ((0, 1, 2), (0, 1, 2))
  # XLA for CPU transposes the left operand: let that be the smaller one.
  if x.shape[3] <= dy.shape[3]:
    return dx, lax.dot_general(x, dy, (pixels, ((), ())))
  return dx, lax.dot_general(dy, x, (pixels, ((), ()))).T


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_for_loops(x: jax.Array, w: jax.Array, stride: int) -> jax.Array:
  return xla_convolution.conv(x, w, 'SAME', stride=stride)


def _conv_forward(
  x: jax.Array, w: jax.Array, stride: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _conv_for_loops(x, w, stride), (x, w)


def _conv_backward(
  stride: int, kept: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x, w = kept
  # x convolved with dy, with images as channels and channels as images.
  dw = xla_convolution.conv(
    x.transpose(3, 1, 2, 0),
    dy.transpose(1, 2, 0, 3),
    _padding_for_dw(x, w, dy, stride),
    w_dilation=stride,
  )
  transposed = w.transpose(0, 1, 3, 2)
  dx = _input_gradient(
    xla_convolution.conv, x.shape[1:3], transposed, dy, stride
  )
  return dx, dw.transpose(1, 2, 0, 3)


_conv_for_loops.defvjp(_conv_forward, _conv_backward)


def _padding_for_dw(
  x: jax.Array, w: jax.Array, dy: jax.Array, stride: int
) -> Padding:
  """The padding of x with which dy, dilated by the stride, yields k pixels."""
  sizes, strides = w.shape[:2], (stride, stride)
  around = lax.padtype_to_pads(x.shape[1:3], sizes, strides, 'SAME')
  sides = zip(x.shape[1:3], sizes, dy.shape[1:3], around, strict=True)
  return [
    (before, k + (m - 1) * stride - n - before)
    for n, k, m, (before, _) in sides
  ]


class _Phase(NamedTuple):
  """Every `stride`th pixel along an axis, in the gradient of the input.

  Attributes:
    first: of the kernel's pixels that contribute, every `stride`th one.
    padding: of dy.
  """

  first: int
  padding: tuple[int, int]


def _phases(n: int, k: int, m: int, stride: int) -> list[_Phase]:
  """Splits an axis of n pixels, which a kernel of k maps to m."""
  ((before, _),) = lax.padtype_to_pads((n,), (k,), (stride,), 'SAME')
  phases = []
  for phase in range(stride):
    # dx[stride·u + phase] sums dy[u + shift − tap]·w[first + stride·tap].
    shift, first = divmod(phase + before, stride)
    taps = len(range(first, k, stride))
    padding = (taps - 1 - shift, -(-n // stride) - m + shift)
    phases.append(_Phase(first, padding))
  return phases


def _input_gradient(
  convolve: Callable[[jax.Array, jax.Array, Padding], jax.Array],
  size: tuple[int, ...],
  w: jax.Array,
  dy: jax.Array,
  stride: int,
) -> jax.Array:
  """The gradient `[B, *size, C]` of the input, phase by phase of the stride."""
  sides = zip(size, w.shape[:2], dy.shape[1:3], strict=True)
  rows, columns = (_phases(n, k, m, stride) for n, k, m in sides)
  height, width = (-(-n // stride) for n in size)
  shape = (dy.shape[0], height, width, w.shape[3])

  def pixels(row: _Phase, column: _Phase) -> jax.Array:
    part = jnp.flip(w[row.first :: stride, column.first :: stride], (0, 1))
    if part.size == 0:  # the stride is larger than the kernel
      return jnp.zeros(shape, dy.dtype)
    return convolve(dy, part, [row.padding, column.padding])

  if stride == 1:
    return pixels(rows[0], columns[0])
  parts = [[pixels(row, column) for column in columns] for row in rows]
  dx = jnp.stack([jnp.stack(each, axis=3) for each in parts], axis=2)
  dx = dx.reshape(shape[0], height * stride, width * stride, shape[3])
  return dx[:, : size[0], : size[1]]


def _grouped_conv2d(
  x: jax.Array, w: jax.Array, stride: int, groups: int, padding: str = 'same'
) -> jax.Array:
  """Convolves groups of channels with at most 16 convolutions."""
  merged = -(-groups // _MAX_CONVOLUTIONS)
  fan_in, fan_out = w.shape[2], w.shape[3] // groups
  parts = []
  for first in range(0, groups, merged):
    count = min(merged, groups - first)
    part = w[..., first * fan_out : (first + count) * fan_out]
    # Block-diagonal: the groups do not mix.
    same = jnp.repeat(jnp.eye(count, dtype=bool), fan_in, axis=0)
    same = jnp.repeat(same, fan_out, axis=1)
    dense = jnp.where(same, jnp.tile(part, (1, 1, count, 1)), 0)
    inputs = x[..., first * fan_in : (first + count) * fan_in]
    weights = dense if count > 1 else part
    parts.append(conv2d(inputs, weights, stride, 1, padding))
  return jnp.concatenate(parts, axis=3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x: jax.Array, w: jax.Array, stride: int) -> jax.Array:
  """Convolves each channel by itself."""
  strides = (stride, stride)
  around = lax.padtype_to_pads(x.shape[1:3], w.shape[:2], strides, 'SAME')
  return _sum_of_taps(x, w, around, stride)


def _depthwise_forward(
  x: jax.Array, w: jax.Array, stride: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _depthwise(x, w, stride), (x, w)


def _depthwise_backward(
  stride: int, kept: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x, w = kept
  # dw row by row, which is several times faster than one sum over all pixels of
  # a channel, since these are far apart in memory.
  dx = _input_gradient(_sum_of_taps, x.shape[1:3], w, dy, stride)
  around = _padding_for_dw(x, w, dy, stride)
  padded_x = _pad(x, around)
  width = (dy.shape[2] - 1) * stride + 1

  def add_row(row: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
    rows = lax.dynamic_slice_in_dim(padded_x, row * stride, w.shape[0], axis=1)
    dy_row = precision.widen(lax.dynamic_slice_in_dim(dy, row, 1, axis=1))
    return [
      total
      + precision.widen(rows[:, i : i + 1, j : j + width : stride]) * dy_row
      for total, (i, j) in zip(sums, np.ndindex(w.shape[:2]), strict=True)
    ]

  zeros = jnp.zeros_like(precision.widen(dy[:, :1]))
  taps = w.shape[0] * w.shape[1]
  sums = lax.fori_loop(0, dy.shape[1], add_row, [zeros] * taps)
  dw = jnp.stack([jnp.sum(total, axis=(0, 1, 2)) for total in sums])
  return dx, dw.reshape(w.shape).astype(w.dtype)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _sum_of_taps(
  x: jax.Array, w: jax.Array, padding: Padding, stride: int = 1
) -> jax.Array:
  """Sums shifted `x` `[B, H, W, C]` times `w` `[kh, kw, 1, C]`."""
  size, channels = w.shape[:2], w.shape[3]
  padded = _pad(x, padding)
  batch, *sides, _ = padded.shape
  height, width = (n - k + 1 for n, k in zip(sides, size, strict=True))
  wide_x = precision.widen(padded)
  wide_w = precision.widen(w).reshape(*size, 1, 1, 1, channels)
  total = sum(
    lax.slice(
      wide_x,
      (0, i, j, 0),
      (batch, i + height, j + width, channels),
      (1, stride, stride, 1),
    )
    * wide_w[i, j]
    for i, j in np.ndindex(size)
  )
  return jnp.asarray(total, x.dtype)


def _pad(x: jax.Array, padding: Padding) -> jax.Array:
  """Pads with zeros; a negative number crops."""
  around = [(0, 0), *padding, (0, 0)]
  zero = jnp.zeros((), x.dtype)
  return lax.pad(x, zero, [(before, after, 0) for before, after in around])
