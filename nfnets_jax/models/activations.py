"""Nonlinearities with their gain γ, so that they keep unit variance.

Normaliser-free nets multiply a nonlinearity f by the gain γ = Var[f(z)]^(-1/2)
for z ~ N(0, 1), so that γ·f followed by a weight-standardised convolution
preserves variance. The docstrings derive Var[f(z)]; φ and Φ are the density and
the distribution function of N(0, 1).

Differences:
  * The table has the published γ, with which the released weights were trained.
    They were estimated from finite samples and are 0.01 % to 0.09 % above the
    exact values derived here, so `elu` and `celu`, the same function, differ.
  * Omits `glu` and `log_softmax` of the released table, which are not
    elementwise.

Reference:
  Brock et al. 2021, section 2; Brock, De, Smith, "Characterizing signal
  propagation to close the performance gap in unnormalized ResNets", section 4.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from nfnets_jax.models import checks, precision

Activation = Callable[[jax.Array], jax.Array]

# Of the tanh approximation: √(2/π) and the factor of x³.
_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


def identity(x: jax.Array) -> jax.Array:
  """Returns x. Var[z] = 1, so γ = 1."""
  return x


def relu(x: jax.Array) -> jax.Array:
  """Returns max(x, 0).

  E[f] = φ(0) = 1/√(2π) and E[f²] = ½, so Var = ½(1 − 1/π) and
  γ = √(2 / (1 − 1/π)) = 1.71286.
  """
  return jax.nn.relu(x)


def relu6(x: jax.Array) -> jax.Array:
  """Returns min(max(x, 0), 6).

  As `relu` but for the tail above 6: E[f] = φ(0) − φ(6) + 6Φ(−6) and
  E[f²] = ½ − Φ(−6) − 6φ(6) + 36Φ(−6), which moves γ = 1.71286 in the ninth
  digit only.
  """
  return jax.nn.relu6(x)


def leaky_relu(x: jax.Array) -> jax.Array:
  """Returns x above zero and a·x below, a = 0.01.

  E[f] = (1 − a)φ(0) and E[f²] = (1 + a²)/2, so Var = (1 + a²)/2 − (1 − a)²/2π
  and γ = 1.70483.
  """
  return jax.nn.leaky_relu(x)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """Returns x·Φ(x) in its tanh approximation, as the released nets do.

  For x·Φ(x) itself, Stein's lemma gives E[f] = 1/(2√π) and
  E[f²] = 1/3 + 1/(2π√3), so γ = 1.70093; quadrature of the tanh form gives
  1.70092.

  The backward pass needs only x; `jax.nn.gelu` saves two more arrays of that
  size, a quarter of the memory of a training step.
  """
  return lax.platform_dependent(x, tpu=jax.nn.gelu, default=_wide_gelu)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  return gelu(x), x


def _gelu_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
  dx = lax.platform_dependent(
    x, dy, tpu=_gelu_gradient, default=_wide_gelu_gradient
  )
  return (dx,)


gelu.defvjp(_gelu_forward, _gelu_backward)


def _gelu_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
  return jax.vjp(jax.nn.gelu, x)[1](dy)[0]


def _wide_gelu(x: jax.Array) -> jax.Array:
  # (1 + tanh u)/2 = 1/(1 + exp(−2u)) takes fewer operations. The gradient uses
  # tanh, or XLA would save the common subexpressions.
  wide = precision.widen(x)
  return (wide / (1.0 + jnp.exp(-2.0 * _gelu_argument(wide)))).astype(x.dtype)


def _wide_gelu_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
  wide = precision.widen(x)
  tanh = jnp.tanh(_gelu_argument(wide))
  slope = _GELU_SCALE * (1.0 + 3.0 * _GELU_CUBIC * wide * wide)
  dx = 0.5 * (1.0 + tanh) + 0.5 * wide * (1.0 - tanh * tanh) * slope
  return (dx * precision.widen(dy)).astype(x.dtype)


def _gelu_argument(x: jax.Array) -> jax.Array:
  return _GELU_SCALE * x * (1.0 + _GELU_CUBIC * x * x)


def silu(x: jax.Array) -> jax.Array:
  """Returns x·sigmoid(x), also called swish.

  Quadrature against φ: E[f] = 0.20662, E[f²] = 0.35578, γ = 1.78719.
  """
  return jax.nn.silu(x)


def elu(x: jax.Array) -> jax.Array:
  """Returns x above zero and eˣ − 1 below.

  Completing the square in ∫eˣφ gives E[f] = φ(0) + √e·Φ(−1) − ½ and
  E[f²] = ½ + e²Φ(−2) − 2√e·Φ(−1) + ½, so γ = 1.27084.
  """
  return jax.nn.elu(x)


def celu(x: jax.Array) -> jax.Array:
  """Returns x above zero and a(e^(x/a) − 1) below, a = 1.

  With a = 1 this is `elu`, and so is the derivation: γ = 1.27084.
  """
  return jax.nn.celu(x)


def selu(x: jax.Array) -> jax.Array:
  """Returns s·x above zero and s·a(eˣ − 1) below.

  Its constants a = 1.67326 and s = 1.05070 solve E[f] = 0 and Var[f] = 1, which
  makes γ = 1 by construction.
  """
  return jax.nn.selu(x)


def tanh(x: jax.Array) -> jax.Array:
  """Returns the hyperbolic tangent.

  Odd, so E[f] = 0; quadrature gives Var = E[f²] = 0.39429, γ = 1.59254.
  """
  return jnp.tanh(x)


def sigmoid(x: jax.Array) -> jax.Array:
  """Returns 1/(1 + e⁻ˣ).

  E[f] = ½ by symmetry; quadrature gives E[f²] = 0.29338, γ = 4.80131.
  """
  return jax.nn.sigmoid(x)


def softplus(x: jax.Array) -> jax.Array:
  """Returns log(1 + eˣ).

  Quadrature against φ: E[f] = 0.80606, E[f²] = 0.92125, γ = 1.91913.
  """
  return jax.nn.softplus(x)


def log_sigmoid(x: jax.Array) -> jax.Array:
  """Returns log(1/(1 + e⁻ˣ)).

  This is −softplus(−x), and −z has the distribution of z: γ = 1.91913.
  """
  return jax.nn.log_sigmoid(x)


def soft_sign(x: jax.Array) -> jax.Array:
  """Returns x/(1 + |x|).

  Odd, so E[f] = 0; quadrature gives Var = E[f²] = 0.18301, γ = 2.33753.
  """
  return jax.nn.soft_sign(x)


# The published gains; see Differences above.
_TABLE: dict[str, tuple[Activation, float]] = {
  'identity': (identity, 1.0),
  'celu': (celu, 1.270926833152771),
  'elu': (elu, 1.2716004848480225),
  'gelu': (gelu, 1.7015043497085571),
  'leaky_relu': (leaky_relu, 1.70590341091156),
  'log_sigmoid': (log_sigmoid, 1.9193484783172607),
  'relu': (relu, 1.7139588594436646),
  'relu6': (relu6, 1.7131484746932983),
  'selu': (selu, 1.0008515119552612),
  'sigmoid': (sigmoid, 4.803835391998291),
  'silu': (silu, 1.7881293296813965),
  'soft_sign': (soft_sign, 2.338853120803833),
  'softplus': (softplus, 1.9203323125839233),
  'tanh': (tanh, 1.5939117670059204),
}


def gain(name: str) -> float:
  """Returns γ of a nonlinearity, by its name in `checks.ACTIVATIONS`.

  Example:
    >>> round(gain('relu'), 3)
    1.714
  """
  return _lookup(name)[1]


def scaled(name: str) -> Activation:
  """Returns the variance-preserving nonlinearity x ↦ γ·f(x).

  `name` is one of `checks.ACTIVATIONS`, else a ValueError is raised. The
  function is elementwise and keeps the dtype.

  Example:
    >>> z = jax.random.normal(jax.random.key(0), (100_000,))
    >>> round(float(scaled('gelu')(z).std()), 1)
    1.0
  """
  function, gamma = _lookup(name)
  return functools.partial(_scale, function, gamma)


def unscaled(name: str) -> Activation:
  """Returns the nonlinearity itself, for nets that normalise; see `scaled`."""
  return _lookup(name)[0]


def _scale(function: Activation, gamma: float, x: jax.Array) -> jax.Array:
  return function(x) * gamma


def _lookup(name: str) -> tuple[Activation, float]:
  checks.activation(name)
  return _TABLE[name]
