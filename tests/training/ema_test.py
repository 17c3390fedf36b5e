import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax.training import ema


@pytest.mark.parametrize('step', [0, 1, 7, 500, 112_602, 899_990, 10_000_000])
@pytest.mark.parametrize('decay', [0.0, 0.9, 0.99999])
def test_decay_warms_up_to_its_bound(step, decay):
  expected = min(decay, (1 + step) / (10 + step))
  result = ema.decay_at(jnp.asarray(step), decay)
  assert result.dtype == jnp.float32
  np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_average_of_a_run_equals_float64():
  rng = np.random.default_rng(0)
  history = [
    {'w': rng.normal(size=(3, 4)), 'b': rng.normal()} for _ in range(9)
  ]
  average = expected = history[0]
  average = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), average)
  for step, new in enumerate(history[1:]):
    decay = min(0.7, (1 + step) / (10 + step))
    expected = {k: decay * expected[k] + (1 - decay) * new[k] for k in new}
    new = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), new)
    average = jax.jit(ema.update)(average, new, jnp.asarray(step), 0.7)
  for name, x in average.items():
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, expected[name], rtol=1e-5)


def test_average_of_a_constant_is_the_constant():
  constant = {'w': jnp.full(5, 0.1)}
  for step in range(20):
    average = ema.update(constant, constant, jnp.asarray(step), 0.99999)
    np.testing.assert_allclose(average['w'], constant['w'], rtol=1e-6)
