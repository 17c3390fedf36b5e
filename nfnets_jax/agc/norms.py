"""Norms in float32 or wider that do not overflow."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def sums(x: jax.Array, axes: tuple[int, ...], axis_name: Any) -> jax.Array:
  """Returns complex sums per unit: of squares of x, and of small · x."""

  def both(x: jax.Array) -> jax.Array:
    # Otherwise XLA may rewrite a scalar (s·x)² as s²·x², which is 0·∞.
    y = x * jax.lax.optimization_barrier(_small(x.dtype))
    return jax.lax.complex(x**2, y**2).sum(axes, keepdims=True)

  def second_if_needed(x: jax.Array) -> jax.Array:
    total = jnp.sum(x**2, axes, keepdims=True)
    overflows = jnp.any(jnp.isinf(total))
    second = jax.lax.cond(
      overflows, lambda: both(x).imag, lambda: jnp.zeros_like(total)
    )
    return jax.lax.complex(total, second)

  # A GPU reads x once for a complex sum, and three times for two sums. On CPU a
  # second pass is rare.
  total = jax.lax.platform_dependent(x, cpu=second_if_needed, default=both)
  return total if axis_name is None else jax.lax.psum(total, axis_name)


def scaled_norm(sums: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns s and ‖s·x‖ per unit; s is 1 unless the squares overflow."""
  total = sums.real
  overflows = jnp.isinf(total)
  scale = jnp.where(overflows, _small(total.dtype), total.dtype.type(1))
  return scale, sqrt(jnp.where(overflows, sums.imag, total))


def _small(dtype: Any) -> np.ndarray:
  # A power of two; without it, float32 squares overflow above 1e19.
  return np.asarray(2.0 ** (-5 * jnp.finfo(dtype).maxexp // 8), dtype)


def sum_of_squares(
  x: jax.Array, axes: tuple[int, ...], axis_name: Any
) -> jax.Array:
  """Sums squares over array axes (kept as 1) and mapped axes."""
  total = jnp.sum(x**2, axis=axes, keepdims=True)
  return total if axis_name is None else jax.lax.psum(total, axis_name)


def sqrt(x: jax.Array) -> jax.Array:
  """Square root with gradient 0 at 0."""
  zero = x == 0  # false for NaN, which propagates
  return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, x)))


def widen(x: jax.Array) -> jax.Array:
  """Casts 16-bit floats to float32."""
  return jnp.asarray(
    x, jnp.float32 if x.dtype.itemsize < 4 else canonical_dtype(x)
  )


def canonical_dtype(x: jax.Array) -> Any:
  """Returns the dtype in jax: float32 for float64 without `jax_enable_x64`."""
  return jax.dtypes.canonicalize_dtype(x.dtype)
