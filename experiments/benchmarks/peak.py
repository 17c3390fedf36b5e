"""Times a large matrix product, the practical peak of a device."""

import statistics

import jax
import jax.numpy as jnp

from experiments.benchmarks import timing


def measure_tflops(
  dtype: str, size: int | None = None, repeats: int = 10
) -> float:
  """Times products of square matrices on one device.

  Args:
    dtype: dtype of the matrices, such as `'bfloat16'`.
    size: their side; by default 8192, or 2048 on a CPU.
    repeats: number of timed products, after one to warm up.

  Returns:
    10¹² floating-point operations per second, two for each multiply-accumulate.

  Example:
    >>> measure_tflops('float32', size=64, repeats=3) > 0
    True
  """
  if size is None:
    size = 2048 if jax.default_backend() == 'cpu' else 8192
  a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
  product = jax.jit(jnp.matmul)

  def run() -> float:
    return timing.seconds(lambda: jax.block_until_ready(product(a, b)))

  seconds = timing.in_turn({'product': run}, repeats)['product']
  return 2 * size**3 / statistics.median(seconds) / 1e12
