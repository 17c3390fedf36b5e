"""The transformation, beside the released values, optax and numpy."""

import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from nfnets_jax import agc
from tests import golden as reference
from tests.agc.common import clip, draw, oracle, tree


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
  clipped = clip(part('grad/'), part('param/'), clipping)
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
  clipped = clip(grads, params, 0.02)
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
  clipped = clip(grads, params, 0.05)
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
  clipped = clip(grads, params, 0.05)
  for name, leaf in clipped.items():
    np.testing.assert_array_equal(leaf, grads[name])


def test_clipping_twice_is_clipping_once():
  params, grads = _random_tree(0), _random_tree(1)
  once = clip(grads, params, 0.05)
  twice = clip(once, params, 0.05)
  for name, leaf in twice.items():
    np.testing.assert_allclose(leaf, once[name], rtol=1e-6)


def test_zero_parameters_can_move():
  grads = {'skip_gain': jnp.asarray(5.0)}
  clipped = clip(grads, {'skip_gain': jnp.asarray(0.0)}, 0.01)
  assert float(clipped['skip_gain']) == pytest.approx(0.01 * 1e-3)


def test_zero_gradients_stay_zero():
  params = _random_tree(0)
  clipped = clip(jax.tree.map(jnp.zeros_like, params), params, 0.01)
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(clipped))


def test_bfloat16_norms_are_float32():
  params, grads = _random_tree(0), _random_tree(1)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (grads, params))
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), half)
  clipped = clip(*half, 0.05)
  expected = clip(*exact, 0.05)
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
    clip(params, None, 0.01)
  with pytest.raises(ValueError, match=r'must be positive, got 0 and 0\.001'):
    agc.adaptive_grad_clip(0)
  with pytest.raises(ValueError, match=r'units of .* \(2, 2, 2, 2, 2\)'):
    clip(jnp.ones((2,) * 5), jnp.ones((2,) * 5), 0.01)
  with pytest.raises(TypeError, match='real floating-point leaves, got int32'):
    clip(jnp.ones(3, jnp.int32), jnp.ones(3, jnp.int32), 0.01)


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


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('where', ['grad', 'param'])
def test_units_that_are_not_finite_become_nan(value, where):
  g, w = draw((4, 3), 1), draw((4, 3), 2)
  good = clip([g], [w], 0.1)[0]
  (g if where == 'grad' else w)[1, 0] = value
  (found,) = clip([g], [w], 0.1)
  np.testing.assert_array_equal(found[:, 1:], good[:, 1:])
  np.testing.assert_array_equal(found[:, 0], np.full(4, np.nan))


def test_gradient_of_an_update():
  transform = agc.adaptive_grad_clip(0.1)

  def moved(g, w):
    updates, _ = transform.update([g], optax.EmptyState(), [w])
    return jnp.sum(updates[0] ** 2)

  gradients = jax.jit(jax.grad(moved, (0, 1)))
  zeros, ones = jnp.zeros((2, 2)), jnp.ones((2, 2))
  # The last gradient's squares overflow.
  for g, w in ((zeros, zeros), (ones, ones), (1e25 * ones, ones)):
    for grad in gradients(g, w):
      assert np.isfinite(grad).all()


def test_missing_leaves_stay_missing():
  params = {'a': jnp.ones((2, 2)), 'b': None, 'c': jnp.ones(2)}
  grads = {'a': jnp.ones((2, 2)), 'b': None, 'c': None}
  found = clip(grads, params, 0.1)
  assert found['b'] is None
  assert found['c'] is None
  np.testing.assert_allclose(found['a'], 0.1, rtol=1e-6)


def _optimizers():
  mask = {'conv': True, 'head': False}
  plain = agc.adaptive_grad_clip(0.02, statistics=True)
  return {
    'chain': optax.chain(plain, optax.sgd(0.1)),
    'masked': optax.chain(optax.masked(plain, mask), optax.sgd(0.1)),
    'partition': optax.partition(
      {'agc': plain, 'none': optax.identity()}, {'conv': 'agc', 'head': 'none'}
    ),
    'inject': optax.inject_hyperparams(agc.adaptive_grad_clip)(clipping=0.02),
    'inject_schedule': optax.inject_hyperparams(agc.adaptive_grad_clip)(
      clipping=lambda count: 0.02
    ),
    'multi_steps': optax.MultiSteps(
      optax.chain(plain, optax.sgd(0.1)), 1
    ).gradient_transformation(),
    'if_finite': optax.apply_if_finite(plain, 3),
  }


@pytest.mark.parametrize('name', _optimizers())
def test_works_with_optax(name):
  optimizer = _optimizers()[name]
  params = {'conv': draw((3, 3, 4, 5), 1), 'head': draw((5, 2), 2)}
  grads = {'conv': draw((3, 3, 4, 5), 3), 'head': draw((5, 2), 4)}
  params, grads = jax.tree.map(jnp.asarray, (params, grads))
  state = optimizer.init(params)

  def step(state, _):
    updates, state = optimizer.update(grads, state, params)
    return state, updates

  # MultiSteps itself adds integers to floats.
  promotion = 'standard' if name == 'multi_steps' else 'strict'
  with jax.numpy_dtype_promotion(promotion):
    _, found = jax.jit(lambda state: jax.lax.scan(step, state, None, 2))(state)
  rate = -0.1 if name in ('chain', 'masked', 'multi_steps') else 1.0
  for leaf, axes in (('conv', (0, 1, 2)), ('head', (0,))):
    expected = oracle(grads[leaf], params[leaf], axes, 0.02)
    if leaf == 'head' and name in ('masked', 'partition'):
      expected = grads[leaf]
    for update in found[leaf]:
      np.testing.assert_allclose(update, rate * expected, rtol=1e-5)


def test_under_vmap_and_pmap():
  g, w = draw((8, 4, 5), 1), draw((8, 4, 5), 2)
  expected = [oracle(a, b, (0,), 0.1) for a, b in zip(g, w, strict=True)]
  one = lambda g, w: clip([g], [w], 0.1)[0]  # noqa: E731
  mapped = jax.jit(jax.vmap(one))
  np.testing.assert_allclose(mapped(g, w), expected, rtol=1e-5)
  # One of them overflows.
  large = g.copy()
  large[3] *= 1e25
  expected[3] = oracle(large[3], w[3], (0,), 0.1)
  np.testing.assert_allclose(mapped(large, w), expected, rtol=1e-5)
  np.testing.assert_allclose(jax.pmap(one)(large, w), expected, rtol=1e-5)


@pytest.mark.parametrize('size', [1.0, 1e25])
@pytest.mark.parametrize('spec', [('x', None), (None, 'x')])
def test_sharded_is_unsharded(spec, size):
  """A matrix split over its inputs, or its outputs, on eight devices."""
  g, w = draw((16, 24), 1, size), draw((16, 24), 2)
  mesh = Mesh(np.asarray(jax.devices()[:8]), ('x',))
  part = PartitionSpec(*spec)
  name = 'x' if spec[0] else None
  transform = agc.adaptive_grad_clip(
    0.1, units='IO', axis_name=lambda path, leaf: name
  )

  def update(g, w):
    updates, _ = transform.update([g], optax.EmptyState(), [w])
    return updates[0]

  sharded = jax.jit(
    jax.shard_map(update, mesh=mesh, in_specs=(part, part), out_specs=part)
  )
  expected = oracle(g, w, (0,), 0.1)
  np.testing.assert_allclose(sharded(g, w), expected, rtol=1e-5)
  norm = jax.shard_map(
    lambda g: agc.unitwise_norm(g, 'IO', axis_name=name),
    mesh=mesh,
    in_specs=part,
    out_specs=PartitionSpec(None, spec[1]),
  )
  if size == 1.0:
    np.testing.assert_allclose(
      norm(g), np.linalg.norm(g, axis=0, keepdims=True), rtol=1e-5
    )


def test_explicitly_sharded_is_unsharded():
  shapes = {'w': (16, 24), 'v': (4, 8), 'b': (24,), 'c': (24,)}
  specs = {'w': (None, 'x'), 'v': (), 'b': ('x',), 'c': ()}
  g = {k: draw(shape, 1) for k, shape in shapes.items()}
  w = {k: draw(shape, 2) for k, shape in shapes.items()}
  transform = agc.adaptive_grad_clip(0.1, statistics=True)
  expected, state = transform.update(g, transform.init(w), w)
  mesh = jax.make_mesh((8,), ('x',), (AxisType.Explicit,))
  with jax.set_mesh(mesh):
    place = lambda k, x: jax.device_put(x, PartitionSpec(*specs[k]))  # noqa: E731
    g, w = ({k: place(k, x) for k, x in each.items()} for each in (g, w))
    found, sharded = jax.jit(transform.update)(g, transform.init(w), w)
  for k in shapes:
    assert found[k].sharding.is_equivalent_to(g[k].sharding, g[k].ndim)
  chex.assert_trees_all_close((found, sharded), (expected, state), rtol=1e-5)


def test_units_are_clipped_as_one_vector():
  """The number of kernels does not grow with that of vectors."""

  def count(vectors):
    tree = {f'b{i}': jnp.ones(8) for i in range(vectors)}
    lowered = jax.jit(lambda g: clip(g, tree, 0.1)).lower(tree)
    return lowered.as_text().count('stablehlo.sqrt')

  assert count(2) == count(9) <= 4


def test_a_group_without_units_has_no_statistics():
  params = {'w': jnp.zeros((4, 5, 0))}
  transform = agc.adaptive_grad_clip(0.1, statistics=True)
  _, state = transform.update(params, transform.init(params), params)
  assert state.statistics['all'] == (0, 0, 0)


def test_parameters_of_others_are_refused():
  params = {'w': jnp.ones((3, 4))}
  clip = agc.adaptive_grad_clip(0.1)
  with pytest.raises(ValueError, match=r'w has shape \(4, 3\)'):
    clip.update({'w': jnp.ones((4, 3))}, optax.EmptyState(), params)
  with pytest.raises(ValueError, match='params lacks b, which grads has'):
    agc.summarize({'b': jnp.ones(3)}, params)
  with pytest.raises(ValueError, match='must be positive'):
    agc.adaptive_grad_clip(np.float32(-1))


def test_inject_hyperparams_needs_static_functions():
  params = tree('body/kernel', 'head/kernel')
  grads = jax.tree.map(lambda x: 9 * x, params)
  functions = {
    'exclude': agc.is_head,
    'units': lambda path, leaf: 'OI',
    'group': lambda path, leaf: 'all',
    'axis_name': lambda path, leaf: None,
  }
  inject = optax.inject_hyperparams(agc.adaptive_grad_clip, list(functions))
  transform = inject(lambda count: 0.1, **functions)
  updates, _ = jax.jit(transform.update)(grads, transform.init(params), params)
  np.testing.assert_array_equal(updates['head']['kernel'], np.full((2, 2), 9))
  np.testing.assert_allclose(updates['body']['kernel'], 0.1, rtol=1e-6)
  with pytest.raises(ValueError, match='must be positive, got Array'):
    inject(-0.1).init(params)
