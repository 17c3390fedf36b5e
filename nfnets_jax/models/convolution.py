"""The convolution beneath all layers, in the fastest form of each platform."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Padding = list[tuple[int, int]]

# On CPU, of a grouped convolution.
_MAX_CONVOLUTIONS = 16


# Compiled functions are traced once for each shape, however many blocks there
# are: both forms, of the convolution and of its gradients, take Python's time.
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def conv2d(
  x: jax.Array,
  w: jax.Array,
  stride: int = 1,
  groups: int = 1,
  padding: str = 'same',
) -> jax.Array:
  """Convolves, with padding, in the fastest known form of each platform.

  The forms agree to rounding. On a TPU and a GPU it is XLA's convolution, into
  which their compilers fuse what comes before and after. On CPU:

  * A 1×1 convolution is a matrix product, and written as one: XLA for CPU is
    several times slower at the weight gradient of the convolution. At a stride
    it is that of the pixels that it meets.
    The gradients are written as products too, of arrays as they lie in memory:
    differentiated by JAX, dw's would first turn dy, in a pass of its own.
  * A depthwise convolution, of one channel a group, is a sum over the kernel's
    pixels of shifted inputs times weights, and so are its gradients: faster
    than XLA's own by an order, which has no such convolution there.
  * Any other grouped convolution is one convolution per group, concatenated:
    XLA's own gradient of a grouped convolution is slower there by one or two
    orders. Of more than 16 groups, neighbours go together, as one convolution
    with zeros between them, so that 16 are left at most: a program of a hundred
    small convolutions takes seconds to compile.
  * The gradients are written with channels last, as the convolution is. XLA
    brings them into that form itself, but not inside a loop, such as that over
    micro-batches; there they would be slower by an order.
  * The gradient of the input of a strided convolution is a convolution for each
    of stride² phases of the pixels: XLA's own is a single one that multiplies
    with zeros, three times of four at stride 2.

  `experiments/benchmarks/compiled.py` shows what the compilers of TPUs and GPUs
  say of a whole net, `experiments/benchmarks/speed.py` measures one, and
  `experiments/benchmarks/convolutions.py` a grouped one alone;
  `experiments/README.md` holds what came out.

  Args:
    x: inputs `[B, H, W, I]`.
    w: weights `[kh, kw, I / groups, O]`, of the dtype of `x`.
    stride: step in both directions, in pixels.
    groups: number of groups that input and output channels are split into.
    padding: 'same', of XLA and TensorFlow: as little as needed, the odd pixel
      after the end; or 'symmetric', of PyTorch: (k - 1) / 2 on all sides. They
      differ where there is a stride; 'symmetric' is then left to XLA.

  Returns:
    Outputs `[B, ceil(H / stride), ceil(W / stride), O]`.

  Raises:
    ValueError: for another padding.

  Example:
    >>> x, w = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 2, 6))
    >>> conv2d(x, w, stride=2, groups=2).shape
    (2, 4, 4, 6)
  """
  check_padding(padding)
  options = (stride, groups, padding)
  return per_platform(
    cpu=lambda x, w: _cpu_conv2d(x, w, *options),
    default=lambda x, w: _xla_conv2d(x, w, *options),
  )(x, w)


def check_padding(padding: str) -> None:
  """Raises a ValueError if there is no such padding."""
  if padding not in ('same', 'symmetric'):
    raise ValueError(f"padding {padding!r} is neither 'same' nor 'symmetric'")


def per_platform(
  *, default: Callable[..., Any], **others: Callable[..., Any]
) -> Callable[..., Any]:
  """Chooses a form by the platform that a program is compiled for.

  Not by the machine that compiles: a program for a TPU may be compiled without
  one, and a program for several platforms holds all forms.

  Args:
    default: maps arrays to an array or a tuple of them.
    **others: the same function but for rounding, on the platforms of these
      names, such as `cpu` and `tpu`.

  Returns:
    That function. The forward pass keeps its arguments alone for the backward
    pass, which is the chosen form's. It has no forward-mode derivative.

  Example:
    >>> twice = per_platform(default=lambda x: 2 * x, cpu=lambda x: x + x)
    >>> float(jax.grad(twice)(3.0))
    2.0
  """

  @jax.custom_vjp
  def call(*args: jax.Array) -> Any:
    return lax.platform_dependent(*args, default=default, **others)

  def forward(*args: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
    return call(*args), args

  # Differentiated as a whole, it would keep what any of the forms needs.
  def pull_back(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    return lambda args, dy: jax.vjp(function, *args)[1](dy)

  def backward(args: tuple[jax.Array, ...], dy: Any) -> Any:
    pulled = {name: pull_back(function) for name, function in others.items()}
    return lax.platform_dependent(
      args, dy, default=pull_back(default), **pulled
    )

  call.defvjp(forward, backward)
  return call


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
  """Adds a bias in the dtype of the features, so that it fuses.

  A convolution's compiler takes the addition in where it has the same dtype;
  the gradient of the bias, a sum over all pixels, is float32 all the same.

  Args:
    x: features `[B, H, W, C]`.
    bias: `[C]`, float32 or of the dtype of `x`.

  Returns:
    `[B, H, W, C]` of the dtype of `x`.

  Example:
    >>> add_bias(jnp.zeros((1, 1, 1, 2)), jnp.arange(2.0)).ravel().tolist()
    [0.0, 1.0]
  """
  return x + bias.astype(x.dtype).reshape(1, 1, 1, -1)


def _add_bias_forward(
  x: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
  return add_bias(x, bias), bias


def _add_bias_backward(
  bias: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
  total = jnp.sum(dy.astype(bias.dtype), axis=(0, 1, 2))
  return dy, total


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@jax.jit
def pointwise_with_mean(
  x: jax.Array, w: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Convolves by 1×1 pixels, adds a bias, and returns the mean as well.

  The mean over the pixels of what is linear in them is that of their mean. On a
  TPU it is taken so, before the convolution, which then fuses with what
  multiplies it by a gate that depends on the mean.

  Args:
    x: inputs `[B, H, W, I]`.
    w: weights `[1, 1, I, O]`, of the dtype of `x`.
    bias: `[O]`.

  Returns:
    Outputs `[B, H, W, O]`, and their mean over the pixels, `[B, O]`.

  Example:
    >>> x, w = jnp.ones((2, 8, 8, 4)), jnp.ones((1, 1, 4, 6))
    >>> y, mean = pointwise_with_mean(x, w, jnp.ones(6))
    >>> y.shape, mean.shape, float(mean[0, 0])
    ((2, 8, 8, 6), (2, 6), 5.0)
  """
  return per_platform(default=_mean_after, tpu=_mean_before)(x, w, bias)


def _mean_after(
  x: jax.Array, w: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
  y = add_bias(conv2d(x, w), bias)
  return y, jnp.mean(y, axis=(1, 2))


def _mean_before(
  x: jax.Array, w: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
  mean = jnp.mean(x, axis=(1, 2), keepdims=True)
  mean = add_bias(conv2d(mean, w), bias)
  return add_bias(conv2d(x, w), bias), mean[:, 0, 0]


def _around(w: jax.Array, stride: int, padding: str) -> str | Padding:
  if padding == 'symmetric' and stride > 1:
    return [((k - 1) // 2, (k - 1) // 2) for k in w.shape[:2]]
  return 'SAME'


def _xla_conv2d(
  x: jax.Array, w: jax.Array, stride: int, groups: int, padding: str
) -> jax.Array:
  around = _around(w, stride, padding)
  return _conv(x, w, around, stride=stride, groups=groups)


def _cpu_conv2d(
  x: jax.Array, w: jax.Array, stride: int, groups: int, padding: str
) -> jax.Array:
  if w.shape[:2] == (1, 1) and groups == 1:
    return _pointwise(x[:, ::stride, ::stride], w[0, 0])
  if padding == 'symmetric' and stride > 1:
    if groups == 1:
      return _conv(x, w, _around(w, stride, padding), stride=stride)
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
  # XLA for CPU first turns the array on the left: let that be the smaller one.
  if x.shape[3] <= dy.shape[3]:
    return dx, lax.dot_general(x, dy, (pixels, ((), ())))
  return dx, lax.dot_general(dy, x, (pixels, ((), ()))).T


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)


def _conv(
  x: jax.Array,
  w: jax.Array,
  padding: str | Padding,
  *,
  stride: int = 1,
  w_dilation: int = 1,
  groups: int = 1,
) -> jax.Array:
  return lax.conv_general_dilated(
    x,
    w,
    window_strides=(stride, stride),
    padding=padding,
    rhs_dilation=(w_dilation, w_dilation),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_for_loops(x: jax.Array, w: jax.Array, stride: int) -> jax.Array:
  return _conv(x, w, 'SAME', stride=stride)


def _conv_forward(
  x: jax.Array, w: jax.Array, stride: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _conv_for_loops(x, w, stride), (x, w)


def _conv_backward(
  stride: int, kept: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Gradients of a convolution, themselves convolutions of stride 1.

  dw is x with dy as its kernel, images as channels and channels as images.
  """
  x, w = kept
  dw = _conv(
    x.transpose(3, 1, 2, 0),
    dy.transpose(1, 2, 0, 3),
    _padding_for_dw(x, w, dy, stride),
    w_dilation=stride,
  )
  turned = w.transpose(0, 1, 3, 2)
  dx = _input_gradient(_conv, x.shape[1:3], turned, dy, stride)
  return dx, dw.transpose(1, 2, 0, 3)


_conv_for_loops.defvjp(_conv_forward, _conv_backward)


def _padding_for_dw(
  x: jax.Array, w: jax.Array, dy: jax.Array, stride: int
) -> Padding:
  """Returns the padding of x of which dw is the sum.

  Of n pixels padded by p before them, y has those at stride s; between them dy
  has s − 1 zeros and so spans d = (m − 1)·s + 1. k pixels of dw come out.
  """
  sizes, strides = w.shape[:2], (stride, stride)
  around = lax.padtype_to_pads(x.shape[1:3], sizes, strides, 'SAME')
  sides = zip(x.shape[1:3], sizes, dy.shape[1:3], around, strict=True)
  return [
    (before, k + (m - 1) * stride - n - before)
    for n, k, m, (before, _) in sides
  ]


class _Phase(NamedTuple):
  """One of each `stride` pixels of a side, in the gradient of the input.

  Attributes:
    first: of the kernel's pixels that they meet, again one of each `stride`.
    padding: of dy.
  """

  first: int
  padding: tuple[int, int]


def _phases(n: int, k: int, m: int, stride: int) -> list[_Phase]:
  """Splits a side of n pixels, convolved with k to m."""
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
  """Gradient of the input, one of each `stride` pixels at a time.

  Those pixels meet the same of the kernel's, one of each `stride`, and all of
  dy: convolutions of small kernels, where one convolution of dy with zeros
  between its pixels multiplies mostly zeros.

  Args:
    convolve: dy with a kernel, at stride 1.
    size: sides of the input in pixels.
    w: `[kh, kw, ., C]`, from the channels of dy to those of the input.
    dy: gradient of the output.
    stride: of the convolution.

  Returns:
    `[B, *size, C]`.
  """
  sides = zip(size, w.shape[:2], dy.shape[1:3], strict=True)
  rows, columns = (_phases(n, k, m, stride) for n, k, m in sides)
  height, width = (-(-n // stride) for n in size)
  shape = (dy.shape[0], height, width, w.shape[3])

  def pixels(row: _Phase, column: _Phase) -> jax.Array:
    part = jnp.flip(w[row.first :: stride, column.first :: stride], (0, 1))
    if part.size == 0:  # a stride beyond the kernel passes over these
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
    # Input channels of a group meet output channels of the same group alone.
    same = jnp.repeat(jnp.eye(count, dtype=bool), fan_in, axis=0)
    same = jnp.repeat(same, fan_out, axis=1)
    dense = jnp.where(same, jnp.tile(part, (1, 1, count, 1)), 0)
    inputs = x[..., first * fan_in : (first + count) * fan_in]
    weights = dense if count > 1 else part
    parts.append(_cpu_conv2d(inputs, weights, stride, 1, padding))
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
  """The sums of `_conv_backward`, channel by channel.

  dw sums over all pixels of a channel, which lie far apart: row by row it is
  several times faster than as one sum.
  """
  x, w = kept
  dx = _input_gradient(_sum_of_taps, x.shape[1:3], w, dy, stride)
  around = _padding_for_dw(x, w, dy, stride)
  padded_x = _pad(x, around)
  width = (dy.shape[2] - 1) * stride + 1

  def add_row(row: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
    rows = lax.dynamic_slice_in_dim(padded_x, row * stride, w.shape[0], axis=1)
    dy_row = _widen(lax.dynamic_slice_in_dim(dy, row, 1, axis=1))
    return [
      total + _widen(rows[:, i : i + 1, j : j + width : stride]) * dy_row
      for total, (i, j) in zip(sums, np.ndindex(w.shape[:2]), strict=True)
    ]

  nothing = jnp.zeros_like(_widen(dy[:, :1]))
  taps = w.shape[0] * w.shape[1]
  sums = lax.fori_loop(0, dy.shape[1], add_row, [nothing] * taps)
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
  wide_x, wide_w = _widen(padded), _widen(w).reshape(*size, 1, 1, 1, channels)
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
  """Surrounds pixels with zeros; a negative number takes pixels away."""
  around = [(0, 0), *padding, (0, 0)]
  zero = jnp.zeros((), x.dtype)
  return lax.pad(x, zero, [(before, after, 0) for before, after in around])


def _widen(x: jax.Array) -> jax.Array:
  return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
