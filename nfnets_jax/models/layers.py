"""The layers that the families share.

All layers take and return `[B, H, W, C]` arrays, create float32 parameters and
compute in the dtype of their input: give bfloat16 images and the net runs in
bfloat16 with float32 parameters. Sums over pixels and images are float32 even
then, in the forward and in the backward pass.

Differences:
  * The released code casts all parameters to bfloat16 before a pass, and so
    standardises weights in bfloat16. Here weights are standardised in float32
    and then cast.
  * `WSConv2D` always has a bias, as in the released code, which ignores
    `with_bias`.
  * Stochastic depth draws in float32. The released code draws in the dtype of
    the features, where bfloat16 rounds the rates to about 1/128.
"""

import functools
from collections.abc import Callable, MutableMapping

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nfnets_jax.models import activations, convolution, precision

# Guards the standard deviation of a constant filter; published value.
WS_EPS = 1e-4
# Elements of a filter that give a first estimate of its mean.
_NEAR_MEAN = 32


def standardize_weight(
  w: jax.Array, gain: jax.Array, eps: float = WS_EPS
) -> jax.Array:
  """Standardises a convolution's weight over its fan-in N and scales it.

  Ŵ_i = gain_i · (W_i − μ_i) / √max(N·σ²_i, eps), with mean and (biased)
  variance of each output channel i. For an input of independent channels of
  unit variance every output then has variance gain².

  Args:
    w: weights `[kh, kw, I, O]`.
    gain: `[O]`.
    eps: lower bound of N·σ².

  Returns:
    The standardised weights `[kh, kw, I, O]`.

  Example:
    >>> w = jax.random.normal(jax.random.key(0), (3, 3, 8, 4))
    >>> w_hat = standardize_weight(w, jnp.ones(4))
    >>> bool(jnp.allclose((w_hat**2).sum((0, 1, 2)), 1.0, atol=1e-4))
    True

  Reference:
    Brock et al. 2021, section 2, equation 1.
  """
  return _standardize(w, gain, eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _standardize(w: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
  return _standardize_forward(w, gain, eps)[0]


def _standardize_forward(
  w: jax.Array, gain: jax.Array, eps: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  # As a matrix: XLA for CPU takes ten times as long for the gradient of sums
  # over leading axes of length one, which 1×1 convolutions have.
  flat = w.reshape(-1, w.shape[3])
  fan_in = flat.shape[0]
  # Both moments in one pass, about an estimate of the mean: E[x²] − E[x]² would
  # cancel where the mean is large.
  origin = jnp.mean(flat[:_NEAR_MEAN], axis=0, keepdims=True)
  shifted = flat - origin
  shift = jnp.mean(shifted, axis=0, keepdims=True)
  power = jnp.sum(jnp.square(shifted), axis=0, keepdims=True)
  power = power - fan_in * jnp.square(shift)
  scale = lax.rsqrt(jnp.maximum(power, eps))
  out = (shifted - shift) * (scale * gain.reshape(1, -1))
  return out.reshape(w.shape), (w, gain, origin, shift, scale, power > eps)


def _standardize_backward(
  eps: float, kept: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
  del eps
  # With û = (W − μ)·s, of length one, dgain = Σ dy·û and
  # dW = gain·s·(dy − mean(dy) − û·dgain), without the last term if N·σ² < eps.
  w, gain, origin, shift, scale, varies = kept
  flat, dy_flat = (x.reshape(-1, x.shape[3]) for x in (w, dy))
  unit = (flat - origin - shift) * scale
  dgain = jnp.sum(dy_flat * unit, axis=0, keepdims=True)
  along = unit * jnp.where(varies, dgain, 0.0)
  dw = dy_flat - jnp.mean(dy_flat, axis=0, keepdims=True) - along
  dw = dw * (scale * gain.reshape(1, -1))
  return dw.reshape(w.shape), dgain.reshape(gain.shape)


_standardize.defvjp(_standardize_forward, _standardize_backward)


def fold(params: hk.MutableParams) -> hk.MutableParams:
  """Standardises the weights of every `WSConv2D` of a net in advance.

  For inference, and for passes that share their weights, such as those of
  micro-batches. The result is for a net made with `standardized=True`; other
  modules keep their parameters. It can be differentiated.

  Args:
    params: of any net; a module with `w` and `gain` is a `WSConv2D`.

  Returns:
    The same, but `w` `[kh, kw, I, O]` standardised and scaled, and no `gain`.

  Example:
    >>> def forward(x, standardized=False):
    ...   return WSConv2D(4, 3, standardized=standardized)(x)
    >>> net = hk.transform(forward)
    >>> x = jnp.ones((1, 8, 8, 2))
    >>> params = net.init(jax.random.key(0), x)
    >>> y = net.apply(fold(params), None, x, standardized=True)
    >>> bool(jnp.allclose(y, net.apply(params, None, x)))
    True
  """

  def fold_module(
    parameters: MutableMapping[str, jax.Array],
  ) -> dict[str, jax.Array]:
    if not parameters.keys() >= {'w', 'gain'}:
      return dict(parameters)
    kept = {k: v for k, v in parameters.items() if k != 'gain'}
    return kept | {'w': standardize_weight(parameters['w'], parameters['gain'])}

  return {name: fold_module(module) for name, module in params.items()}


class WSConv2D(hk.Module):
  """2-D convolution with Scaled Weight Standardisation, padded.

  Parameters: `w` `[k, k, I / groups, O]` ~ N(0, 1 / fan_in), `gain` `[O]` = 1
  and `bias` `[O]` = 0, float32. The nonlinearity's gain γ is applied with the
  nonlinearity, not here. With `standardized`, `w` is used as it is, without
  `gain`.

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
      standardized: whether `w` is standardised already, by `fold`.
      name: of the Haiku module.

    Raises:
      ValueError: if `groups` does not divide `output_channels`, or `padding` is
        neither.
    """
    super().__init__(name=name)
    _check_groups(output_channels, groups)
    convolution.check_padding(padding)
    self.output_channels = output_channels
    self.kernel_size = kernel_size
    self.stride = stride
    self.groups = groups
    self.padding = padding
    self.standardized = standardized

  def __call__(self, x: jax.Array) -> jax.Array:
    """Convolves `x` `[B, H, W, I]`; returns `[B, H', W', O]` of its dtype."""
    w, bias = self._weights(x)
    out = convolution.conv2d(x, w, self.stride, self.groups, self.padding)
    return convolution.add_bias(out, bias)

  def with_mean(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Convolves by 1×1 pixels; see `convolution.pointwise_with_mean`.

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
    return convolution.pointwise_with_mean(x, *self._weights(x))

  def _weights(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weight, in the dtype of `x`, and the bias."""
    _check_input_groups(x.shape[3], self.groups)
    k, channels = self.kernel_size, self.output_channels
    w = _parameter(
      'w',
      (k, k, x.shape[3] // self.groups, channels),
      hk.initializers.VarianceScaling(1.0, 'fan_in', 'normal'),
    )
    if not self.standardized:
      gain = _parameter('gain', (channels,), hk.initializers.Constant(1.0))
      w = standardize_weight(w, gain)
    bias = _parameter('bias', (channels,), hk.initializers.Constant(0.0))
    return w.astype(x.dtype), bias


class Conv2D(hk.Module):
  """2-D convolution with 'SAME' padding and a weight used as it is.

  Parameters: `w` `[k, k, I / groups, O]` and, if asked for, `b` `[O]` = 0,
  float32; `hk.Conv2D`'s would be of the input's dtype.
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
      w_init: of the weight; None is He's normal, of variance 2 / fan_in.
      name: of the Haiku module.

    Raises:
      ValueError: if `groups` does not divide `output_channels`.
    """
    super().__init__(name=name)
    _check_groups(output_channels, groups)
    self.output_channels = output_channels
    self.kernel_size = kernel_size
    self.stride = stride
    self.groups = groups
    self.with_bias = with_bias
    self.w_init = w_init

  def __call__(self, x: jax.Array) -> jax.Array:
    """Convolves `x` `[B, H, W, I]`; returns `[B, H', W', O]` of its dtype."""
    _check_input_groups(x.shape[3], self.groups)
    k, channels = self.kernel_size, self.output_channels
    w = _parameter(
      'w',
      (k, k, x.shape[3] // self.groups, channels),
      self.w_init or hk.initializers.VarianceScaling(2.0, 'fan_in', 'normal'),
    )
    out = convolution.conv2d(x, w.astype(x.dtype), self.stride, self.groups)
    if not self.with_bias:
      return out
    b = _parameter('b', (channels,), hk.initializers.Constant(0.0))
    return convolution.add_bias(out, b)


class BatchNorm(hk.Module):
  """Batch normalisation with float32 parameters, statistics and state.

  The parameters `scale` (1) and `offset` (0) are `[1, 1, 1, C]`, and the state
  holds moving averages of the mean and the (biased) variance. In training the
  statistics are those of one call: of a micro-batch on one device, or all with
  `cross_replica_axis`. Names and state are those of `hk.BatchNorm`, which
  computes in the dtype of the input and takes the variance as E[x²] − E[x]²,
  which cancels for a large mean.

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
      decay_rate: of the moving averages, in [0, 1).
      eps: added to the variance.
      cross_replica_axis: name of the mapped axis of devices to take the
        statistics over; None takes each device's own.
      name: of the Haiku module.
    """
    super().__init__(name=name)
    self.eps = eps
    # Parameters are initialised outside of the map over devices.
    self.axis = None if hk.running_init() else cross_replica_axis
    self.mean_ema = hk.ExponentialMovingAverage(decay_rate, name='mean_ema')
    self.var_ema = hk.ExponentialMovingAverage(decay_rate, name='var_ema')

  def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Normalises `x` `[B, H, W, C]`; in training, with its own statistics."""
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

  `hk.Linear` creates its parameters in the input's dtype, so a bfloat16 input
  would give bfloat16 parameters. The parameter names are those of `hk.Linear`.
  """

  def __init__(
    self,
    output_size: int,
    *,
    w_init: hk.initializers.Initializer | None = None,
    name: str | None = None,
  ):
    """Constructs the layer; `w_init` None is LeCun's truncated normal."""
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


class SqueezeExcite(hk.Module):
  """Squeeze-and-excitation gate: sigmoid(W₂·act(W₁·mean(h))).

  Returns only the gate, in (0, 1). The caller multiplies; normaliser-free nets
  also multiply by 2, which preserves the variance.

  Differences:
    The paper's formula has the scaled GELU between the two layers; the released
    code, and so this module, has an unscaled ReLU.

  Reference:
    Hu et al. 2018, https://arxiv.org/abs/1709.01507; Brock et al. 2021,
    appendix C.
  """

  def __init__(
    self,
    channels: int,
    hidden_channels: int,
    *,
    act: Callable[[jax.Array], jax.Array] = activations.relu,
    w_init: hk.initializers.Initializer | None = None,
    name: str | None = None,
  ):
    """Constructs the gate.

    Args:
      channels: C, of the gated features.
      hidden_channels: between the two layers.
      act: nonlinearity between them.
      w_init: of both weights; None is that of `Linear`.
      name: of the Haiku module.
    """
    super().__init__(name=name)
    self.act = act
    self.reduce = Linear(hidden_channels, w_init=w_init, name='linear')
    self.expand = Linear(channels, w_init=w_init, name='linear_1')

  def __call__(self, mean: jax.Array) -> jax.Array:
    """Maps the mean over the pixels `[B, C]` to the gate `[B, 1, 1, C]`."""
    gate = jax.nn.sigmoid(self.expand(self.act(self.reduce(mean))))
    return gate[:, None, None, :]


def stochastic_depth(
  x: jax.Array,
  rate: float,
  is_training: bool,
  image_index: jax.Array | None = None,
  *,
  rescale: bool = False,
) -> jax.Array:
  """Drops the whole residual branch of an image with probability `rate`.

  As in the released code, kept branches are not rescaled by 1 / (1 − rate),
  unless `rescale` is set.

  Args:
    x: residual branch `[B, H, W, C]`.
    rate: probability of dropping, in [0, 1).
    is_training: False returns `x` as it is. True needs a Haiku random key when
      `rate` is above 0.
    image_index: int32 `[B]`; see `dropout`.
    rescale: whether to divide kept branches by 1 − rate.

  Returns:
    `x` with zeros for the dropped images.

  Reference:
    Huang et al. 2016, https://arxiv.org/abs/1603.09382.
  """
  if not is_training or rate == 0.0:
    return x
  keep = _draw_kept(rate, (x.shape[0], 1, 1, 1), image_index).astype(x.dtype)
  return x * (keep / (1.0 - rate) if rescale else keep)


def dropout(
  x: jax.Array,
  rate: float,
  is_training: bool,
  image_index: jax.Array | None = None,
) -> jax.Array:
  """Zeroes each element with probability `rate` and rescales the others.

  Given `image_index`, the mask of an image depends only on the Haiku key and
  its index, so that a batch may be split over devices and micro-batches that
  have the same key. None draws one mask for all images of the call.

  Args:
    x: `[B, ...]`.
    rate: probability of zeroing, in [0, 1).
    is_training: False returns `x` as it is. True needs a Haiku random key when
      `rate` is above 0.
    image_index: int32 `[B]`, the index of each image in the global batch.

  Returns:
    An array like `x`, with the same mean over draws.

  Example:
    >>> net = hk.transform(lambda x, index: dropout(x, 0.5, True, index))
    >>> key, x, index = jax.random.key(0), jnp.ones((4, 8)), jnp.arange(4)
    >>> whole = net.apply({}, key, x, index)
    >>> half = net.apply({}, key, x[2:], index[2:])
    >>> bool((half == whole[2:]).all())
    True

  Reference:
    Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html.
  """
  if not is_training or rate == 0.0:
    return x
  kept = _draw_kept(rate, x.shape, image_index)
  return jnp.where(kept, x / (1.0 - rate), 0.0)


def _draw_kept(
  rate: float, shape: tuple[int, ...], image_index: jax.Array | None
) -> jax.Array:
  """Draws which elements of `[B, ...]` are kept, each with 1 − `rate`."""
  key = hk.next_rng_key()
  if image_index is None:
    return jax.random.bernoulli(key, 1.0 - rate, shape)
  keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, image_index)
  draw = functools.partial(jax.random.bernoulli, p=1.0 - rate, shape=shape[1:])
  return jax.vmap(draw)(keys)


def avg_pool(x: jax.Array, size: int) -> jax.Array:
  """Averages `size`×`size` windows at stride `size`, 'SAME' padding.

  Padding is not counted: a window at the border averages its pixels inside the
  image.

  Args:
    x: inputs `[B, H, W, C]`.
    size: side and stride of the window, in pixels.

  Returns:
    `[B, ceil(H / size), ceil(W / size), C]`.

  Example:
    >>> avg_pool(jnp.ones((1, 3, 3, 1)), 2)[0, :, :, 0].tolist()
    [[1.0, 1.0], [1.0, 1.0]]
  """
  pool = convolution.per_platform(
    cpu=lambda x: _mean_of_reshaped(x, size),
    default=lambda x: _mean_of_windows(x, size),
  )
  return pool(x)


def _mean_of_windows(x: jax.Array, size: int) -> jax.Array:
  window = (1, size, size, 1)

  def total(x: jax.Array) -> jax.Array:
    return lax.reduce_window(x, 0.0, lax.add, window, window, 'SAME')

  if x.shape[1] % size == 0 and x.shape[2] % size == 0:
    return total(x) * (1.0 / size**2)
  return total(x) / total(jnp.ones_like(x[:1, ..., :1]))


def _mean_of_reshaped(x: jax.Array, size: int) -> jax.Array:
  """For CPU: its gradient is far cheaper than that of `reduce_window`."""
  _, height, width, _ = x.shape
  rows = -(-height // size)
  columns = -(-width // size)
  # Multiples of the window, the usual case, need neither padding nor counts.
  pad = (rows * size - height, columns * size - width)
  before = (pad[0] // 2, pad[1] // 2)
  if pad != (0, 0):
    around = [(b, p - b) for b, p in zip(before, pad, strict=True)]
    x = jnp.pad(x, ((0, 0), *around, (0, 0)))
  windows = x.reshape(x.shape[0], rows, size, columns, size, x.shape[3])
  if pad == (0, 0):
    return jnp.mean(windows, axis=(2, 4))
  inside = np.pad(
    np.ones((height, width)),
    [(b, p - b) for b, p in zip(before, pad, strict=True)],
  )
  counts = inside.reshape(rows, size, columns, size).sum((1, 3))
  total = jnp.sum(windows, axis=(2, 4))
  return total / jnp.asarray(counts, x.dtype).reshape(1, rows, columns, 1)


def max_pool(
  x: jax.Array, size: int, stride: int, padding: str = 'same'
) -> jax.Array:
  """Takes the maximum of `size`×`size` windows, padded.

  Padding is not counted. The gradient of equal maxima goes to one of them or is
  shared, depending on the platform.

  Args:
    x: inputs `[B, H, W, C]`.
    size: side of the window, in pixels.
    stride: step in both directions, in pixels.
    padding: 'same' or 'symmetric'; see `convolution.conv2d`.

  Returns:
    `[B, ceil(H / stride), ceil(W / stride), C]`.

  Example:
    >>> x = jnp.arange(5.0).reshape(1, 1, 5, 1)
    >>> max_pool(x, 3, stride=2)[0, 0, :, 0].tolist()
    [1.0, 3.0, 4.0]
  """
  convolution.check_padding(padding)
  around = lax.padtype_to_pads(
    x.shape[1:3], (size, size), (stride, stride), 'SAME'
  )
  if padding == 'symmetric':
    around = [((size - 1) // 2, (size - 1) // 2)] * 2
  pool = convolution.per_platform(
    cpu=lambda x: _max_of_shifted(x, size, stride, around),
    default=lambda x: _max_of_windows(x, size, stride, around),
  )
  return pool(x)


def _max_of_windows(
  x: jax.Array, size: int, stride: int, around: convolution.Padding
) -> jax.Array:
  window, strides = (1, size, size, 1), (1, stride, stride, 1)
  pads = ((0, 0), *around, (0, 0))
  return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, pads)


def _max_of_shifted(
  x: jax.Array, size: int, stride: int, around: convolution.Padding
) -> jax.Array:
  """For CPU, where XLA's own gradient is ten times slower."""
  x = jnp.pad(x, ((0, 0), *around, (0, 0)), constant_values=-jnp.inf)
  rows, columns = x.shape[1] - size, x.shape[2] - size
  shifted = [
    x[:, i : i + rows + 1 : stride, j : j + columns + 1 : stride]
    for i in range(size)
    for j in range(size)
  ]
  return functools.reduce(jnp.maximum, shifted)


def _check_groups(output_channels: int, groups: int) -> None:
  if groups < 1 or output_channels % groups:
    raise ValueError(
      f'{output_channels} output channels cannot be split into {groups} '
      'groups; give a multiple of the number of groups'
    )


def _check_input_groups(channels: int, groups: int) -> None:
  if channels % groups:
    raise ValueError(
      f'{channels} input channels cannot be split into {groups} groups'
    )


def _parameter(
  name: str, shape: tuple[int, ...], init: hk.initializers.Initializer
) -> jax.Array:
  return hk.get_parameter(name, shape, jnp.float32, init)
