import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax import agc
from tests.agc.common import clip, draw, oracle


@pytest.mark.parametrize('size', [1e-30, 1e-22, 1e19, 1e25, 1e30, 1e37])
@pytest.mark.parametrize('which', ['grad', 'param', 'both'])
def test_norms_do_not_overflow(size, which):
  g = draw((7, 3), 1, size if which != 'param' else 1.0)
  w = draw((7, 3), 2, size if which != 'grad' else 1.0)
  (found,) = clip([g], [w], 0.01)
  expected = oracle(g, w, (0,), 0.01)
  assert np.all(np.isfinite(found))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-38)
  np.testing.assert_allclose(
    agc.summarize([g], [w]).rows[0].largest,
    (
      np.linalg.norm(np.float64(g), axis=0)
      / np.maximum(np.linalg.norm(np.float64(w), axis=0), 1e-3)
    ).max(),
    rtol=1e-5,
  )


@pytest.mark.parametrize('size', [1e150, 1e160, 1e300])
def test_norms_of_float64_do_not_overflow(size):
  g, w = (np.float64(draw((7, 3), seed)) for seed in (1, 2))
  with jax.enable_x64(True):
    (found,) = clip([size * g], [size * w], 0.01)
    assert found.dtype == jnp.float64
    found = np.asarray(found)
  np.testing.assert_allclose(found / size, oracle(g, w, (0,), 0.01), rtol=1e-12)


def test_float16_norms():
  g, w = (x.astype(np.float16) for x in (draw((3, 3, 512, 4)), draw((1,))))
  w = np.full_like(g, 200.0)  # squares and sums overflow float16
  (found,) = clip([300 * g], [w], 0.01)
  assert found.dtype == np.float16
  expected = oracle(300 * g, w, (0, 1, 2), 0.01)
  np.testing.assert_allclose(np.float64(found), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize('shape', [(4, 3), (5,), ()])
def test_float64_of_numpy_is_float32_as_in_jax(shape):
  g, w = (np.asarray(draw(shape, seed), np.float64) for seed in (1, 2))
  found = clip({'w': g}, {'w': w}, 0.01)['w']  # warnings are errors here
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(
    found, oracle(g, w, 0 if shape else (), 0.01), 1e-5
  )
  assert agc.unitwise_norm(w).dtype == jnp.float32


@pytest.mark.parametrize('shape', [(), (1,), (1, 3), (3, 1), (1, 1, 1, 2)])
def test_norms_of_few_elements_do_not_overflow_when_compiled(shape):
  """Of a SkipInit gain, for one."""
  g, w = draw(shape, 1, 1e25), draw(shape, 2)
  units = 'HWIO'[-len(shape) :] if len(shape) > 1 else None
  transform = agc.adaptive_grad_clip(0.01, units=lambda path, leaf: units)
  update = jax.jit(lambda g, w: transform.update([g], transform.init([w]), [w]))
  (found,), _ = update(jnp.asarray(g), jnp.asarray(w))
  axes = tuple(range(len(shape) - 1)) if len(shape) > 1 else None
  np.testing.assert_allclose(found, oracle(g, w, axes, 0.01), rtol=1e-5)
