import haiku as hk
import jax
import numpy as np

from nfnets_jax.models import blocks


def _normal(seed, shape):
  return jax.random.normal(jax.random.key(seed), shape)


def test_squeeze_excite_gate():
  net = hk.transform(lambda x: blocks.SqueezeExcite(6, 3)(x))
  pooled = _normal(0, (2, 6))
  params = net.init(jax.random.key(0), pooled)
  first, second = (
    params[f'squeeze_excite/~/{name}'] for name in ('linear', 'linear_1')
  )
  first, second, pooled = jax.tree.map(np.asarray, (first, second, pooled))
  hidden = np.maximum(pooled @ first['w'] + first['b'], 0)
  expected = 1 / (1 + np.exp(-(hidden @ second['w'] + second['b'])))
  gate = net.apply(params, None, pooled)
  assert gate.shape == (2, 1, 1, 6)
  np.testing.assert_allclose(gate[:, 0, 0], expected, atol=1e-6)
