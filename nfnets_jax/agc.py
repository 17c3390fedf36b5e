"""Adaptive gradient clipping (AGC) as an optax gradient transformation.

Needs jax and optax only, and can be used in any JAX project:

  optimizer = optax.chain(
      nfnets_jax.agc.adaptive_grad_clip(0.01), optax.sgd(0.1, 0.9))

For every unit i of a parameter W with gradient G, that is for all the weights
which feed one output, AGC bounds the gradient by the size of the weights:

  G_i → λ · max(‖W_i‖, ε) / ‖G_i‖ · G_i   if ‖G_i‖ > λ · max(‖W_i‖, ε)
  G_i → G_i                                otherwise

The paper clips every parameter but the weight matrix of the classifier; wrap
the transformation in `optax.masked` to do so.

Differences:
  * A parameter with at most one dimension longer than 1 is one unit, whatever
    its rank, as in the released code: so are `(1, O)` matrices.
  * Norms of float16 and bfloat16 leaves are taken in float32.

Reference:
  Brock et al. 2021, section 4, equation 3.
"""

import jax
import jax.numpy as jnp
import optax

# Keeps the division finite where a gradient is zero; published value.
_DIV_EPS = 1e-6


def unitwise_norm(x: jax.Array) -> jax.Array:
  """Returns the L2 norm of each unit, in a shape that broadcasts against `x`.

  Args:
    x: a scalar or vector, which is one unit; a matrix `[I, O]` or a rank-3
      array, whose units are reduced over axis 0; or a convolution's `[H, W, I,
      O]`, whose units are its output channels.

  Returns:
    The norms, float32 or wider.

  Raises:
    ValueError: if `x` has more than four dimensions.
    TypeError: if `x` is not of a real floating dtype.

  Example:
    >>> unitwise_norm(jnp.array([[3.0, 0.0], [4.0, 1.0]])).tolist()
    [[5.0, 1.0]]
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f'AGC needs real floating-point leaves, got {x.dtype}')
  if x.dtype.itemsize < 4:
    x = x.astype(jnp.float32)
  if sum(size > 1 for size in x.shape) <= 1:
    axes = tuple(range(x.ndim))
  elif x.ndim in (2, 3):
    axes = (0,)
  elif x.ndim == 4:
    axes = (0, 1, 2)
  else:
    raise ValueError(
      f'AGC does not know the units of a parameter of shape {x.shape}; leave '
      'it out with optax.masked, or reshape it to at most four dimensions'
    )
  return jnp.sqrt(jnp.sum(x**2, axis=axes, keepdims=True))


def adaptive_grad_clip(
  clipping: float, eps: float = 1e-3
) -> optax.GradientTransformation:
  """Clips each unit's gradient to a multiple of the norm of its weights.

  Args:
    clipping: λ, the largest allowed ratio of gradient norm to weight norm,
      above 0. The paper uses 0.01 for batches of 1024 to 4096; smaller batches
      bear larger values.
    eps: ε, lower bound of a weight norm, above 0, so that parameters which
      start at zero can move.

  Returns:
    A stateless transformation. Its `update(updates, state, params)` needs the
    parameters, keeps each leaf's dtype and raises a ValueError without them.

  Raises:
    ValueError: if `clipping` or `eps` is not positive.

  Example:
    >>> params = {'w': jnp.array([[3.0], [4.0]])}
    >>> grads = {'w': jnp.array([[30.0], [40.0]])}
    >>> agc = adaptive_grad_clip(0.1)
    >>> clipped, _ = agc.update(grads, agc.init(params), params)
    >>> bool(jnp.allclose(clipped['w'], 0.01 * grads['w']))  # norm 50 to 0.5
    True

  Reference:
    Brock et al. 2021, section 4, equation 3.
  """
  if clipping <= 0 or eps <= 0:
    raise ValueError(
      f'clipping and eps must be positive, got {clipping} and {eps}; to train '
      'without clipping, leave the transformation out'
    )

  def clip(grad: jax.Array, param: jax.Array) -> jax.Array:
    grad_norm = unitwise_norm(grad)
    max_norm = clipping * jnp.maximum(unitwise_norm(param), eps)
    wide = grad.astype(grad_norm.dtype)
    clipped = wide * (max_norm / jnp.maximum(grad_norm, _DIV_EPS))
    return jnp.where(grad_norm < max_norm, wide, clipped).astype(grad.dtype)

  def update(updates, state, params=None):
    if params is None:
      raise ValueError(
        'adaptive_grad_clip needs the parameters: call '
        'update(updates, state, params)'
      )
    return jax.tree.map(clip, updates, params), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
