import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from nfnets_jax.models import pooling


def _normal(seed, shape):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize('shape', [(4, 6), (5, 7), (3, 4), (1, 1)])
def test_avg_pool_averages_what_is_there(shape):
  x = _normal(0, (2, *shape, 3))
  window = (1, 2, 2, 1)

  def window_sum(x):
    return lax.reduce_window(x, 0.0, lax.add, window, window, 'SAME')

  expected = window_sum(x) / window_sum(jnp.ones_like(x))
  np.testing.assert_allclose(pooling.avg_pool(x, 2), expected, atol=1e-6)


@pytest.mark.parametrize('shape', [(8, 8), (5, 7), (1, 2)])
def test_max_pool_and_its_gradient(shape):
  x = _normal(0, (2, *shape, 3))
  height, width = (-(-side // 2) for side in shape)
  # 'SAME': an even side is padded at its end, an odd one on both.
  before = [0 if side % 2 == 0 else 1 for side in shape]
  expected = np.empty((2, height, width, 3))
  for i in range(height):
    for j in range(width):
      top, left = 2 * i - before[0], 2 * j - before[1]
      rows = slice(max(top, 0), top + 3)
      columns = slice(max(left, 0), left + 3)
      expected[:, i, j] = np.asarray(x[:, rows, columns]).max((1, 2))
  out, grad = jax.jit(_pool_and_gradient)(x)
  np.testing.assert_array_equal(out, expected)
  assert float(grad.sum()) == expected.size  # every output has one origin
  half = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
  assert jax.eval_shape(_pool_and_gradient, half)[0].dtype == jnp.bfloat16


def _pool_and_gradient(x):
  out, pull_back = jax.vjp(lambda x: pooling.max_pool(x, 3, stride=2), x)
  return out, *pull_back(jnp.ones_like(out))


# What TPUs and GPUs run, beside what the CPU runs: nothing else executes it.
@pytest.mark.parametrize('shape', [(2, 8, 8, 3), (1, 5, 7, 2)])
def test_pooling_for_accelerators_is_that_of_the_cpu(shape):
  x = _normal(0, shape)
  around = lax.padtype_to_pads(shape[1:3], (3, 3), (2, 2), 'SAME')
  pairs = [
    (
      lambda x: pooling._mean_of_windows(x, 2),
      lambda x: pooling._mean_of_reshaped(x, 2),
    ),
    (
      lambda x: pooling._max_of_windows(x, 3, 2, around),
      lambda x: pooling._max_of_shifted(x, 3, 2, around),
    ),
  ]
  for pair in pairs:

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradient(pool, x):
      out, pull_back = jax.vjp(pool, x)
      weights = jnp.arange(out.size, dtype=x.dtype).reshape(out.shape)
      return out, *pull_back(weights / out.size)

    found, expected = (with_gradient(pool, x) for pool in pair)
    for got, want in zip(found, expected, strict=True):
      np.testing.assert_allclose(got, want, atol=1e-6)
