"""Argument and leaf checks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def positive(value: Any, message: str) -> Any:
  """Returns a positive finite scalar as a float; tracers pass unchecked."""
  if isinstance(value, jax.core.Tracer):
    if value.shape or not _is_real(value.dtype):
      raise ValueError(message)
    return value
  if not isinstance(value, int | float | np.generic | np.ndarray | jax.Array):
    raise ValueError(message)
  array = np.asarray(value)
  if array.shape or not _is_real(array.dtype):
    raise ValueError(message)
  if not 0 < np.float32(min(float(array), np.inf)) < np.inf:
    raise ValueError(message)
  return float(array)


def check_leaf(path: str, grad: Any, param: Any) -> None:
  """Raises unless both are real floats of the same shape."""
  check_dtype(path, param)
  check_dtype(path, grad)
  if grad.shape != param.shape:
    raise ValueError(
      f'the gradient of {path} has shape {grad.shape}, the parameter '
      f'{param.shape}; pass the parameters that it was computed for'
    )


def check_dtype(path: str, x: Any) -> None:
  """Raises unless `x` is a real floating-point array."""
  dtype = getattr(x, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    kind = f'a Python {type(x).__name__}' if dtype is None else dtype
    remedy = 'make it an array or exclude it' if dtype is None else 'exclude it'
    raise TypeError(
      f'AGC needs real floating-point leaves, got {kind}'
      + (f' at {path}; {remedy}' if path else '')
    )


def _is_real(dtype: Any) -> bool:
  return any(jnp.issubdtype(dtype, x) for x in (jnp.floating, jnp.integer))
