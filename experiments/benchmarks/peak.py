"""The speed of a large matrix product: what a device can do at best."""

import statistics
import time

import jax
import jax.numpy as jnp


def measure_tflops(
  dtype: str, size: int | None = None, repeats: int = 10
) -> float:
  """Times products of square matrices on one device.

  Args:
    dtype: of the matrices, such as `'bfloat16'`.
    size: their side; by default 8192, or 2048 on a CPU.
    repeats: of which the median counts, after a warm-up.

  Returns:
    10¹² floating-point operations a second, two for each multiply-accumulate.

  Example:
    >>> measure_tflops('float32', size=64, repeats=3) > 0
    True
  """
  if size is None:
    size = 2048 if jax.default_backend() == 'cpu' else 8192
  key = jax.random.key(0)
  a, b = jax.random.normal(key, (2, size, size), dtype)
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(a, b))
  seconds = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(product(a, b))
    seconds.append(time.perf_counter() - began)
  return 2 * size**3 / statistics.median(seconds) / 1e12
