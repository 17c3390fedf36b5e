"""Pooling, in the fastest form for each platform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nfnets_jax.models import checks, convolution
from nfnets_jax.models.xla_convolution import Padding


def avg_pool(x: jax.Array, size: int) -> jax.Array:
  """Averages `size`×`size` windows at stride `size`, 'SAME' padding.

  Windows at the border average only the pixels inside the image.

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
  around = lax.padtype_to_pads(x.shape[1:3], (size, size), (size, size), 'SAME')
  inside = np.pad(np.ones(x.shape[1:3]), around)
  rows, columns = (n // size for n in inside.shape)
  shape = (x.shape[0], rows, size, columns, size, x.shape[3])
  # Multiples of the window, the usual case, need neither padding nor counts.
  if inside.all():
    return jnp.mean(x.reshape(shape), axis=(2, 4))
  x = jnp.pad(x, ((0, 0), *around, (0, 0)))
  total = jnp.sum(x.reshape(shape), axis=(2, 4))
  counts = inside.reshape(rows, size, columns, size).sum((1, 3))
  return total / jnp.asarray(counts, x.dtype).reshape(1, rows, columns, 1)


def max_pool(
  x: jax.Array, size: int, stride: int, padding: str = 'same'
) -> jax.Array:
  """Takes the maximum of `size`×`size` windows, padded with −∞.

  The gradient of equal maxima goes to one of them or is divided among them,
  depending on the platform.

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
  checks.padding(padding)
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
  x: jax.Array, size: int, stride: int, around: Padding
) -> jax.Array:
  window, strides = (1, size, size, 1), (1, stride, stride, 1)
  pads = ((0, 0), *around, (0, 0))
  return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, pads)


def _max_of_shifted(
  x: jax.Array, size: int, stride: int, around: Padding
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
