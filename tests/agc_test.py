import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfnets_jax import agc
from tests import golden as reference


def _clip(clipping, grads, params, **kwargs):
  transform = agc.adaptive_grad_clip(clipping, **kwargs)
  return transform.update(grads, transform.init(params), params)[0]


def _tree(golden):
  arrays = np.load(golden / 'agc.npz')

  def part(prefix):
    return {
      name.removeprefix(prefix): jnp.asarray(arrays[name])
      for name in arrays.files
      if name.startswith(prefix)
    }

  return part


@pytest.mark.thorough
@pytest.mark.parametrize('clipping', [0.01, 0.16])
def test_golden(golden, clipping):
  part = _tree(golden)
  clipped = _clip(clipping, part('grad/'), part('param/'))
  expected = part(f'clipped@{clipping}/')
  assert clipped.keys() == expected.keys()
  for name, leaf in clipped.items():
    assert reference.relative_error(leaf, expected[name]) <= 1e-6, name


@pytest.mark.thorough
def test_equals_optax_bit_for_bit(golden):
  part = _tree(golden)
  params, grads = part('param/'), part('grad/')
  theirs = optax.adaptive_grad_clip(0.02)
  expected, _ = theirs.update(grads, theirs.init(params), params)
  clipped = _clip(0.02, grads, params)
  for name, leaf in clipped.items():
    np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


def _random_tree(seed):
  keys = jax.random.split(jax.random.key(seed), 4)
  shapes = {
    'conv': (3, 3, 8, 16),
    'linear': (32, 10),
    'bias': (10,),
    'gain': (),
  }
  return {
    name: jax.random.normal(key, shape)
    for key, (name, shape) in zip(keys, shapes.items(), strict=True)
  }


def test_bounds_each_unit_and_keeps_its_direction():
  params, grads = _random_tree(0), _random_tree(1)
  clipped = _clip(0.05, grads, params)
  for name, leaf in clipped.items():
    axes = {4: (0, 1, 2), 2: (0,)}.get(leaf.ndim)

    def norm(x, axes=axes):
      return np.sqrt(np.sum(np.asarray(x, np.float64) ** 2, axis=axes))

    limit = 0.05 * np.maximum(norm(params[name]), 1e-3)
    assert (norm(leaf) <= limit * (1 + 1e-5)).all()
    cosine = np.sum(np.asarray(leaf * grads[name], np.float64), axis=axes) / (
      norm(leaf) * norm(grads[name])
    )
    np.testing.assert_allclose(cosine, 1, atol=1e-6)


def test_small_gradients_stay_as_they_are():
  params = _random_tree(0)
  grads = jax.tree.map(lambda x: x * 1e-4, _random_tree(1))
  clipped = _clip(0.05, grads, params)
  for name, leaf in clipped.items():
    np.testing.assert_array_equal(leaf, grads[name])


def test_clipping_twice_is_clipping_once():
  params, grads = _random_tree(0), _random_tree(1)
  once = _clip(0.05, grads, params)
  twice = _clip(0.05, once, params)
  for name, leaf in twice.items():
    np.testing.assert_allclose(leaf, once[name], rtol=1e-6)


def test_zero_parameters_can_move():
  grads = {'skip_gain': jnp.asarray(5.0)}
  clipped = _clip(0.01, grads, {'skip_gain': jnp.asarray(0.0)})
  assert float(clipped['skip_gain']) == pytest.approx(0.01 * 1e-3)


def test_zero_gradients_stay_zero():
  params = _random_tree(0)
  clipped = _clip(0.01, jax.tree.map(jnp.zeros_like, params), params)
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(clipped))


def test_bfloat16_norms_are_float32():
  params, grads = _random_tree(0), _random_tree(1)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (grads, params))
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), half)
  clipped = _clip(0.05, *half)
  expected = _clip(0.05, *exact)
  for name, leaf in clipped.items():
    assert leaf.dtype == jnp.bfloat16
    np.testing.assert_array_equal(leaf, expected[name].astype(jnp.bfloat16))


def test_works_in_a_chain_under_jit_and_mask():
  params, grads = _random_tree(0), _random_tree(1)
  optimizer = optax.chain(
    optax.masked(
      agc.adaptive_grad_clip(0.01),
      {'conv': True, 'linear': False, 'bias': True, 'gain': True},
    ),
    optax.sgd(1.0),
  )
  updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
  np.testing.assert_array_equal(updates['linear'], -grads['linear'])
  assert not np.allclose(updates['conv'], -grads['conv'])


def test_errors():
  params = _random_tree(0)
  with pytest.raises(ValueError, match='needs the parameters'):
    _clip(0.01, params, None)
  with pytest.raises(ValueError, match=r'must be positive, got 0 and 0\.001'):
    agc.adaptive_grad_clip(0)
  with pytest.raises(ValueError, match=r'units of .* \(2, 2, 2, 2, 2\)'):
    _clip(0.01, jnp.ones((2,) * 5), jnp.ones((2,) * 5))
  with pytest.raises(TypeError, match='real floating-point leaves, got int32'):
    _clip(0.01, jnp.ones(3, jnp.int32), jnp.ones(3, jnp.int32))


def test_import_loads_jax_and_optax_only():
  code = """
import sys
import nfnets_jax.agc
heavy = {'haiku', 'tensorflow', 'tensorflow_datasets', 'grain', 'orbax',
         'ml_collections', 'matplotlib', 'PIL', 'flax'}
print(sorted(heavy & set(sys.modules)))
"""
  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert out.stdout.strip() == '[]'
