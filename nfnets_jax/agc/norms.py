"""Norms in float32 or wider that do not overflow."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def scaled_norm(
  x: jax.Array, axes: tuple[int, ...], axis_name: Any
) -> tuple[jax.Array, jax.Array]:
  """Returns s and ‖s·x‖ per unit; s is 1 unless the squares overflow."""
  # A power of two; without it, float32 squares overflow above 1e19.
  small = np.asarray(2.0 ** (-5 * jnp.finfo(x.dtype).maxexp // 8), x.dtype)
  total = sum_of_squares(x, axes, axis_name)
  overflows = jnp.isinf(total)

  def scaled(x: jax.Array, overflows: jax.Array) -> jax.Array:
    del overflows
    # Otherwise XLA may rewrite a scalar (s·x)² as s²·x², which is 0·∞.
    barred = jax.lax.optimization_barrier(small)
    return sum_of_squares(x * barred, axes, axis_name)

  def scaled_if_needed(x: jax.Array, overflows: jax.Array) -> jax.Array:
    return jax.lax.cond(
      jnp.any(overflows), scaled, lambda x, _: total, x, overflows
    )

  # Accelerators fuse both sums into one pass; the CPU does not.
  cpu = scaled_if_needed if axis_name is None else scaled
  small_total = jax.lax.platform_dependent(
    x, overflows, cpu=cpu, default=scaled
  )
  scale = jnp.where(overflows, small, small.dtype.type(1))
  return scale, sqrt(jnp.where(overflows, small_total, total))


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
