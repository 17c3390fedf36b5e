"""Convolution, batch normalisation and linear layers.

Arrays are `[B, H, W, C]`. Parameters are float32, and computation is in the
dtype of the input: bfloat16 images make the network compute in bfloat16. Sums
over pixels and images are float32 in the forward and the backward pass.

Differences:
  * The released code casts all parameters to bfloat16 before a pass, and so
    standardises weights in bfloat16. Here they are cast after standardisation.
  * `WSConv2D` always has a bias, as in the released code, which ignores
    `with_bias`.
"""

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax

from nfnets_jax.models import (
  checks,
  convolution,
  precision,
  standardization,
)


class WSConv2D(hk.Module):
  """2-D convolution with Scaled Weight Standardisation, padded.

  Parameters: `w` `[k, k, I / groups, O]` ~ N(0, 1 / fan_in), `gain` `[O]` = 1
  and `bias` `[O]` = 0, float32; no `gain` with `standardized`. The gain γ is
  part of the nonlinearity.

  Reference:
    Brock et al. 2021, section 2, equation 1.
  """

  def __init__(
    self,
    output_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    padding: str = 'same',
    standardized: bool = False,
    name: str | None = None,
  ):
    """Constructs the layer.

    Args:
      output_channels: O, a multiple of `groups`.
      kernel_size: k, in pixels.
      stride: in pixels.
      groups: number of channel groups.
      padding: 'same' or 'symmetric'; see `convolution.conv2d`.
      standardized: whether `w` comes from `standardization.fold`.
      name: name of the Haiku module.

    Raises:
      ValueError: if the padding is unknown; in a call, if `groups` does not
        divide the channels.
    """
    super().__init__(name=name)
    checks.padding(padding)
    self.output_channels = output_channels
    self.kernel_size = kernel_size
    self.stride = stride
    self.groups = groups
    self.padding = padding
    self.standardized = standardized

  def __call__(
    self, x: jax.Array, params: tuple[jax.Array, jax.Array] | None = None
  ) -> jax.Array:
    """Convolves images.

    Args:
      x: inputs `[B, H, W, I]`.
      params: result of `weight_and_bias`, which is called if None.

    Returns:
      `[B, H', W', O]`, of the dtype of `x`.
    """
    w, bias = params or self.weight_and_bias(x.shape[3], x.dtype)
    out = convolution.conv2d(x, w, self.stride, self.groups, self.padding)
    return convolution.add_bias(out, bias)

  def with_mean(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Applies a 1×1 convolution; see `convolution.pointwise_with_mean`.

    Args:
      x: inputs `[B, H, W, I]`.

    Returns:
      `[B, H, W, O]`, and its mean over the pixels, `[B, O]`.

    Raises:
      ValueError: if the convolution has a larger kernel, a stride or groups.
    """
    if (self.kernel_size, self.stride, self.groups) != (1, 1, 1):
      raise ValueError(
        f'with_mean is for 1×1 convolutions, not for kernel_size '
        f'{self.kernel_size}, stride {self.stride} and groups {self.groups}'
      )
    w, bias = self.weight_and_bias(x.shape[3], x.dtype)
    return convolution.pointwise_with_mean(x, w, bias)

  def weight_and_bias(
    self, in_channels: int, dtype: jax.typing.DTypeLike
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the standardised weight and the bias.

    Args:
      in_channels: I, a multiple of `groups`.
      dtype: that of the inputs.

    Returns:
      `[k, k, I / groups, O]` of `dtype`, and `[O]`, float32.

    Raises:
      ValueError: if `groups` does not divide the channels.
    """
    channels = self.output_channels
    shape = _kernel_shape(in_channels, self.kernel_size, channels, self.groups)
    init = hk.initializers.VarianceScaling(1.0, 'fan_in', 'normal')
    w = _parameter('w', shape, init)
    if not self.standardized:
      gain = _parameter('gain', (channels,), hk.initializers.Constant(1.0))
      w = standardization.standardize_weight(w, gain)
    w = w.astype(dtype)
    if self.groups > 1 and not self.standardized:
      w = convolution.keep_layout(w)
    bias = _parameter('bias', (channels,), hk.initializers.Constant(0.0))
    return w, bias


class Conv2D(hk.Module):
  """2-D convolution with 'SAME' padding, without weight standardisation.

  Parameters: `w` `[k, k, I / groups, O]` and, with `with_bias`, `b` `[O]` = 0,
  float32; those of `hk.Conv2D` have the dtype of the input.
  """

  def __init__(
    self,
    output_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    with_bias: bool = False,
    w_init: hk.initializers.Initializer | None = None,
    name: str | None = None,
  ):
    """Constructs the layer.

    Args:
      output_channels: O, a multiple of `groups`.
      kernel_size: k, in pixels.
      stride: in pixels.
      groups: number of channel groups.
      with_bias: whether to add `b`.
      w_init: initialiser of the weight; None means He's normal, of variance
        2 / fan_in.
      name: name of the Haiku module.

    Raises:
      ValueError: in a call, if `groups` does not divide the channels.
    """
    super().__init__(name=name)
    self.output_channels = output_channels
    self.kernel_size = kernel_size
    self.stride = stride
    self.groups = groups
    self.with_bias = with_bias
    self.w_init = w_init

  def __call__(self, x: jax.Array) -> jax.Array:
    """Convolves `x` `[B, H, W, I]`; returns `[B, H', W', O]` of its dtype."""
    channels = self.output_channels
    shape = _kernel_shape(x.shape[3], self.kernel_size, channels, self.groups)
    he_normal = hk.initializers.VarianceScaling(2.0, 'fan_in', 'normal')
    w = _parameter('w', shape, self.w_init or he_normal)
    out = convolution.conv2d(x, w.astype(x.dtype), self.stride, self.groups)
    if not self.with_bias:
      return out
    b = _parameter('b', (channels,), hk.initializers.Constant(0.0))
    return convolution.add_bias(out, b)


class BatchNorm(hk.Module):
  """Batch normalisation with float32 parameters, statistics and state.

  Parameters: `scale` = 1 and `offset` = 0, `[1, 1, 1, C]`. State: moving
  averages of the mean and the (biased) variance. Training uses the statistics
  of the micro-batch, on one device or with `cross_replica_axis` on all. Names
  are those of `hk.BatchNorm`, which computes in the dtype of the input, and the
  variance as E[x²] − E[x]², which cancels for a large mean.

  Reference:
    Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
  """

  def __init__(
    self,
    *,
    decay_rate: float = 0.9,
    eps: float = 1e-5,
    cross_replica_axis: str | None = None,
    name: str | None = None,
  ):
    """Constructs the layer.

    Args:
      decay_rate: decay of the moving averages, in [0, 1).
      eps: added to the variance.
      cross_replica_axis: mapped axis of devices to average batch statistics
        over; None keeps them per device.
      name: name of the Haiku module.
    """
    super().__init__(name=name)
    self.eps = eps
    # Parameters are initialised outside of the map over devices.
    self.axis = None if hk.running_init() else cross_replica_axis
    self.mean_ema = hk.ExponentialMovingAverage(decay_rate, name='mean_ema')
    self.var_ema = hk.ExponentialMovingAverage(decay_rate, name='var_ema')

  def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Normalises `x` `[B, H, W, C]`, in training by its own statistics."""
    wide = precision.widen(x)
    # Initialisation must create the moving averages.
    if is_training or hk.running_init():
      mean = self._mean(wide)
      var = self._mean(jnp.square(wide - mean))
      # Haiku's moving averages mix float32 with a counter of int32.
      with jax.numpy_dtype_promotion('standard'):
        self.mean_ema(mean)
        self.var_ema(var)
    else:
      mean, var = self.mean_ema.average, self.var_ema.average
    shape = (1, 1, 1, x.shape[3])
    scale = _parameter('scale', shape, hk.initializers.Constant(1.0))
    offset = _parameter('offset', shape, hk.initializers.Constant(0.0))
    factor = scale * lax.rsqrt(var + self.eps)
    return ((wide - mean) * factor + offset).astype(x.dtype)

  def _mean(self, x: jax.Array) -> jax.Array:
    mean = jnp.mean(x, axis=(0, 1, 2), keepdims=True)
    return lax.pmean(mean, self.axis) if self.axis else mean


class Linear(hk.Module):
  """x·W + b with float32 parameters, computed in the dtype of the input.

  Parameter names are those of `hk.Linear`, whose parameters have the dtype of
  the input.
  """

  def __init__(
    self,
    output_size: int,
    *,
    w_init: hk.initializers.Initializer | None = None,
    name: str | None = None,
  ):
    """Constructs the layer; `w_init` None means LeCun's truncated normal."""
    super().__init__(name=name)
    self.output_size = output_size
    self.w_init = w_init

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `x` `[B, I]` to `[B, output_size]`."""
    fan_in = x.shape[1]
    w_init = self.w_init or hk.initializers.TruncatedNormal(fan_in**-0.5)
    w = _parameter('w', (fan_in, self.output_size), w_init)
    b = _parameter('b', (self.output_size,), hk.initializers.Constant(0.0))
    product = precision.widen(x @ w.astype(x.dtype))
    return (product + b.reshape(1, -1)).astype(x.dtype)


def _kernel_shape(
  in_channels: int, size: int, output_channels: int, groups: int
) -> tuple[int, ...]:
  for kind, channels in (('input', in_channels), ('output', output_channels)):
    if groups < 1 or channels % groups:
      raise ValueError(
        f'{channels} {kind} channels cannot be split into {groups} groups'
      )
  return size, size, in_channels // groups, output_channels


def _parameter(
  name: str, shape: tuple[int, ...], init: hk.initializers.Initializer
) -> jax.Array:
  return hk.get_parameter(name, shape, jnp.float32, init)
