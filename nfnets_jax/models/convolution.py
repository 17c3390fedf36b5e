"""Convolutions, in the fastest form for each platform."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import layout

from nfnets_jax.models import (
  checks,
  cpu_convolution,
  precision,
  xla_convolution,
)

# Elements in a row of a TPU's vector register.
_LANES = 128


# Jitted so that each shape is traced once, however many blocks share it.
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def conv2d(
  x: jax.Array,
  w: jax.Array,
  stride: int = 1,
  groups: int = 1,
  padding: str = 'same',
) -> jax.Array:
  """Convolves, with padding, in the fastest known form for each platform.

  TPU and GPU use XLA's convolution, which fuses with its neighbours; the CPU
  uses `cpu_convolution`. Both agree up to rounding. `experiments/benchmarks`
  measures them; `docs/results/benchmarks.md` has the results.

  Args:
    x: inputs `[B, H, W, I]`.
    w: weights `[kh, kw, I / groups, O]`, of the dtype of `x`.
    stride: step in both directions, in pixels.
    groups: number of groups that input and output channels are split into.
    padding: 'same', of XLA and TensorFlow: as little as needed, with the odd
      pixel at the end; or 'symmetric', of PyTorch: (k − 1) / 2 on all sides.
      They differ only for a stride above 1.

  Returns:
    Outputs `[B, ceil(H / stride), ceil(W / stride), O]`.

  Raises:
    ValueError: for another padding.

  Example:
    >>> x, w = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 2, 6))
    >>> conv2d(x, w, stride=2, groups=2).shape
    (2, 4, 4, 6)
  """
  checks.padding(padding)
  options = (stride, groups, padding)
  return per_platform(
    cpu=lambda x, w: cpu_convolution.conv2d(x, w, *options),
    default=lambda x, w: xla_convolution.conv2d(x, w, *options),
  )(x, w)


def per_platform(
  *, default: Callable[..., Any], **others: Callable[..., Any]
) -> Callable[..., Any]:
  """Selects an implementation by the platform that a program is compiled for.

  That need not be the platform of the machine that compiles it.

  Args:
    default: a function of arrays to an array or a tuple of arrays.
    **others: implementations for certain platforms, such as `cpu` and `tpu`,
      equal up to rounding.

  Returns:
    A function that saves only its arguments for the backward pass, without a
    forward-mode derivative.

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

  # Differentiated as a whole, it would save the residuals of every branch.
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
def keep_layout(w: jax.Array) -> jax.Array:
  """Keeps a weight in the layout of parameters where it is trained on TPUs.

  TPUs want the weights of grouped convolutions in another layout. Without this,
  XLA transposes the float32 parameters and gradients; with it, the weight in
  its own dtype. Programs that do not differentiate are as without it, since
  `jax.export` refuses layouts.

  Args:
    w: weights `[kh, kw, I / groups, O]`.

  Returns:
    The weights.

  Example:
    >>> keep_layout(jnp.ones((3, 3, 2, 6))).shape
    (3, 3, 2, 6)
  """
  return w


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def keep_groups_apart(x: jax.Array, groups: int) -> jax.Array:
  """Keeps features in the layout of grouped convolutions where TPUs train.

  TPUs want the groups of such features apart. Without this, XLA copies the
  activated features to that layout and keeps the copy for the backward pass;
  with it, the operation before writes them so, and the one after writes their
  gradient so. Nothing changes unless groups are of whole lanes, multiples of
  128 channels, or in programs that do not differentiate. `jax.export` refuses
  gradients with layouts for TPUs, unless `disabled_checks` has
  `jax.export.DisabledSafetyCheck.custom_call('LayoutConstraint')`.

  Args:
    x: features `[B, H, W, C]`.
    groups: number of groups, which divides C.

  Returns:
    The features.

  Example:
    >>> keep_groups_apart(jnp.ones((2, 8, 8, 256)), 2).shape
    (2, 8, 8, 256)
  """
  return x


def _groups_apart_on_tpu(x: jax.Array, groups: int) -> jax.Array:
  width = x.shape[3] // groups
  if groups == 1 or width % _LANES:
    return x

  def apart(x: jax.Array) -> jax.Array:
    split = x.reshape(*x.shape[:3], groups, width)
    return _with_layout(split, (1, 2, 3, 0, 4)).reshape(x.shape)

  return lax.platform_dependent(x, tpu=apart, default=lambda x: x)


keep_groups_apart.defvjp(
  lambda x, groups: (_groups_apart_on_tpu(x, groups), None),
  lambda groups, _, dx: (_groups_apart_on_tpu(dx, groups),),
)


def _with_layout(x: jax.Array, order: Sequence[int]) -> jax.Array:
  return layout.with_layout_constraint(x, layout.Layout(tuple(order)))


def _row_major_on_tpu(w: jax.Array) -> jax.Array:
  return lax.platform_dependent(
    w,
    default=lambda w: w,
    tpu=lambda w: _with_layout(w, range(w.ndim)),
  )


keep_layout.defvjp(
  lambda w: (_row_major_on_tpu(w), None),
  lambda _, dw: (_row_major_on_tpu(dw),),
)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
  """Adds a bias in the dtype of the features.

  XLA fuses the addition into a convolution of the same dtype. The gradient of
  the bias, a sum over all pixels, is computed in the dtype of the bias.

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
  if (dy.dtype, bias.dtype) == (jnp.bfloat16, jnp.float32):
    wide = lax.platform_dependent(
      dy, cpu=precision.widen, tpu=precision.widen, default=_widen_bits
    )
  else:
    wide = dy.astype(bias.dtype)
  return dy, jnp.sum(wide, axis=(0, 1, 2))


@jax.custom_jvp
def _widen_bits(x: jax.Array) -> jax.Array:
  # On GPUs, XLA removes the rounding of a gradient that is widened again, and
  # stores it as float32. It does not simplify a shift of the bits.
  bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
  return lax.bitcast_convert_type(bits, jnp.float32)


# A bitcast has no derivative.
_widen_bits.defjvps(lambda dx, _, x: precision.widen(dx))


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@jax.jit
def pointwise_with_mean(
  x: jax.Array, w: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Applies a 1×1 convolution with bias, and returns its mean over pixels too.

  The mean of the outputs is the output of the mean. TPUs compute it that way,
  which lets the convolution fuse with the multiplication by a gate of the mean.

  Args:
    x: inputs `[B, H, W, I]`.
    w: weights `[1, 1, I, O]`, of the dtype of `x`.
    bias: `[O]`.

  Returns:
    Outputs `[B, H, W, O]` and their mean over the pixels `[B, O]`.

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
