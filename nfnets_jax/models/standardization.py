"""Scaled Weight Standardisation.

Reference:
  Brock et al. 2021, section 2, equation 1.
"""

from collections.abc import MutableMapping

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax

# ε, which guards the standard deviation of a constant filter; as published.
WS_EPS = 1e-4
# Elements of a filter that give a first estimate of its mean.
_NEAR_MEAN = 32


@jax.custom_vjp
def standardize_weight(w: jax.Array, gain: jax.Array) -> jax.Array:
  """Standardises a convolution's weight over its fan-in N and scales it.

  Ŵ_i = gain_i · (W_i − μ_i) / √max(N·σ²_i, ε), with the mean and (biased)
  variance of each output channel i. Independent inputs of unit variance then
  give outputs of variance gain².

  Args:
    w: weights `[kh, kw, I, O]`.
    gain: gains `[O]`.

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
  return _standardize_forward(w, gain)[0]


def _standardize_forward(
  w: jax.Array, gain: jax.Array
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
  scale = lax.rsqrt(jnp.maximum(power, WS_EPS))
  out = (shifted - shift) * (scale * gain.reshape(1, -1))
  return out.reshape(w.shape), (w, gain, origin, shift, scale, power > WS_EPS)


def _standardize_backward(
  kept: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
  # With û = (W − μ)·s, of length one, dgain = Σ dy·û and
  # dW = gain·s·(dy − mean(dy) − û·dgain), without the last term if N·σ² < ε.
  w, gain, origin, shift, scale, varies = kept
  flat, dy_flat = (x.reshape(-1, x.shape[3]) for x in (w, dy))
  unit = (flat - origin - shift) * scale
  dgain = jnp.sum(dy_flat * unit, axis=0, keepdims=True)
  along = unit * jnp.where(varies, dgain, 0.0)
  dw = dy_flat - jnp.mean(dy_flat, axis=0, keepdims=True) - along
  dw = dw * (scale * gain.reshape(1, -1))
  return dw.reshape(w.shape), dgain.reshape(gain.shape)


standardize_weight.defvjp(_standardize_forward, _standardize_backward)


def fold(params: hk.MutableParams) -> hk.MutableParams:
  """Standardises all weights of a net in advance, for `standardized=True`.

  For inference, and for several passes with the same weights, such as those of
  micro-batches. Differentiable.

  Args:
    params: parameters of any net.

  Returns:
    The parameters, with `w` `[kh, kw, I, O]` standardised and scaled in modules
    with a `gain`, which is removed.

  Example:
    >>> from nfnets_jax.models import layers
    >>> def forward(x, standardized=False):
    ...   return layers.WSConv2D(4, 3, standardized=standardized)(x)
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
