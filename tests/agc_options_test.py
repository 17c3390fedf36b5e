"""What AGC can be told, beside numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from nfnets_jax import agc

SHAPES = {
  'HWIO': ((3, 3, 4, 5), (0, 1, 2)),
  'OIHW': ((5, 4, 3, 3), (1, 2, 3)),
  'IO': ((4, 5), (0,)),
  'OI': ((5, 4), (1,)),
  'WIO': ((3, 4, 5), (0, 1)),
  'SIO': ((2, 4, 5), (1,)),
  'SHWIO': ((2, 3, 3, 4, 5), (1, 2, 3)),
  'DHWIO': ((2, 3, 3, 4, 5), (0, 1, 2, 3)),
  'IOO': ((4, 2, 5), (0,)),
  'OOI': ((2, 5, 4), (2,)),
  'I': ((4,), (0,)),
  'O': ((4,), ()),
  'S*': ((2, 3, 3, 4, 5), (1, 2, 3)),
  'SS*': ((2, 3, 4, 5), (2,)),
  '*': ((3, 3, 4, 5), (0, 1, 2)),
}


def draw(shape, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  return (scale * rng.standard_normal(shape)).astype(np.float32)


def oracle(g, w, axes, clipping, eps=1e-3):
  g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)

  def norm(x):
    return np.sqrt(np.sum(x**2, axis=axes, keepdims=True))

  limit = clipping * np.maximum(norm(w), eps)
  return np.where(norm(g) < limit, g, g * limit / np.maximum(norm(g), 1e-6))


def clip(grads, params, *args, **kwargs):
  transform = agc.adaptive_grad_clip(*args, **kwargs)
  updates, _ = transform.update(grads, transform.init(params), params)
  return updates


@pytest.mark.parametrize('units', SHAPES)
def test_layouts(units):
  shape, axes = SHAPES[units]
  g, w = draw(shape, 1), draw(shape, 2)
  expected = oracle(g, w, axes, 0.5)
  for told in (units, axes, lambda path, leaf: units, {'w': units}):
    if isinstance(told, str) and '*' in told:
      continue  # of any number of axes
    found = clip({'w': g}, {'w': w}, 0.5, units=told)['w']
    np.testing.assert_allclose(found, expected, rtol=2e-6)
  assert np.any(expected != g)


def test_layouts_by_the_number_of_axes():
  shapes = {'conv': (5, 4, 3, 3), 'dense': (5, 4), 'bias': (5,)}
  g = {k: draw(s, 1) for k, s in shapes.items()}
  w = {k: draw(s, 2) for k, s in shapes.items()}
  found = clip(g, w, 0.1, units=['OIHW', 'OI'])
  for k, axes in (('conv', (1, 2, 3)), ('dense', (1,)), ('bias', (0,))):
    np.testing.assert_allclose(found[k], oracle(g[k], w[k], axes, 0.1), 2e-6)
  with pytest.raises(ValueError, match='two layouts of as many axes'):
    clip(g, w, 0.1, units=['OI', 'IO'])


@pytest.mark.thorough
@settings(max_examples=30, deadline=None)
@given(
  seed=st.integers(0, 2**31),
  units=st.sampled_from(['HWIO', 'OIHW', 'IO', 'OI', 'WIO', 'SIO', 'IOO']),
  clipping=st.floats(1e-3, 10),
  size=st.floats(1e-3, 1e3),
)
def test_properties(seed, units, clipping, size):
  shape, axes = SHAPES[units]
  g, w = draw(shape, seed, size), draw(shape, seed + 1)
  (once,) = clip([g], [w], clipping, units=units)
  norms, limits = (agc.unitwise_norm(jnp.asarray(x), units) for x in (once, w))
  # Bound.
  assert np.all(norms <= clipping * np.maximum(limits, 1e-3) * (1 + 1e-5))
  # Clipping twice is clipping once.
  (twice,) = clip([once], [w], clipping, units=units)
  np.testing.assert_allclose(twice, once, rtol=1e-5)
  # Gradient and weights twice as large: so is the result.
  (scaled,) = clip([2 * g], [2 * w], clipping, eps=2e-3, units=units)
  np.testing.assert_allclose(scaled, 2 * once, rtol=1e-5)
  # Another layout, transposed, is the same.
  order = np.random.default_rng(seed).permutation(len(shape))
  turned = ''.join(units[i] for i in order)
  (other,) = clip(
    [g.transpose(order)], [w.transpose(order)], clipping, units=turned
  )
  np.testing.assert_allclose(other, once.transpose(order), rtol=1e-5)
  # Stacked is unstacked.
  (stacked,) = clip(
    [np.stack([g, 3 * g])], [np.stack([w, w])], clipping, units=f'S{units}'
  )
  np.testing.assert_array_equal(stacked[0], once)
  np.testing.assert_allclose(
    stacked[1], clip([3 * g], [w], clipping, units=units)[0], rtol=1e-5
  )
  # bfloat16 is within its rounding of float64.
  half = [jnp.asarray(x, jnp.bfloat16) for x in (g, w)]
  (rounded,) = clip(half[:1], half[1:], clipping, units=units)
  assert rounded.dtype == jnp.bfloat16
  exact = oracle(*(np.asarray(x, np.float64) for x in half), axes, clipping)
  np.testing.assert_allclose(
    np.asarray(rounded, np.float64), exact, rtol=2**-8, atol=1e-30
  )


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


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('where', ['grad', 'param'])
def test_units_that_are_not_finite(value, where):
  g, w = draw((4, 3), 1), draw((4, 3), 2)
  good = clip([g], [w], 0.1)[0]
  (g if where == 'grad' else w)[1, 0] = value
  for choice, expected in (('propagate', np.nan), ('zero', 0), ('keep', None)):
    (found,) = clip([g], [w], 0.1, nonfinite=choice)
    np.testing.assert_array_equal(found[:, 1:], good[:, 1:])
    bad = g[:, 0] if expected is None else np.full(4, expected)
    np.testing.assert_array_equal(found[:, 0], bad)


def test_gradient_of_an_update():
  transform = agc.adaptive_grad_clip(0.1)

  def moved(g, w):
    updates, _ = transform.update([g], optax.EmptyState(), [w])
    return jnp.sum(updates[0] ** 2)

  zeros, ones = jnp.zeros((2, 2)), jnp.ones((2, 2))
  # The last gradient's squares overflow.
  for g, w in ((zeros, zeros), (ones, ones), (1e25 * ones, ones)):
    for grad in jax.grad(moved, (0, 1))(g, w):
      assert np.all(np.isfinite(grad))


def test_groups_schedules_and_statistics():
  params = {'a': jnp.ones((4, 2)), 'b': jnp.ones((4, 6)), 'c': jnp.ones(3)}
  grads = {'a': 0.5 * params['a'], 'b': 2 * params['b'], 'c': jnp.ones(3)}
  transform = agc.adaptive_grad_clip(
    {'slow': lambda count: 1.0 - 0.5 * count.astype(jnp.float32), 'fast': 0.1},
    group=lambda path, leaf: 'slow' if path == 'a' else 'fast',
    exclude=lambda path, leaf: path == 'c',
    statistics=True,
  )
  state = transform.init(params)
  assert set(state.statistics) == {'slow', 'fast'}
  update = jax.jit(transform.update)
  first, state = update(grads, state, params)
  structure = jax.tree.structure(state)
  np.testing.assert_array_equal(first['a'], grads['a'])
  np.testing.assert_allclose(first['b'], 0.1 * params['b'], rtol=1e-6)
  np.testing.assert_array_equal(first['c'], grads['c'])
  assert state.count == 1
  assert state.statistics['slow'].clipped == 0
  assert state.statistics['slow'].largest == pytest.approx(0.5)
  assert state.statistics['fast'].clipped == 1
  assert state.statistics['fast'].largest == pytest.approx(2)
  second, state = update(grads, state, params)
  assert jax.tree.structure(state) == structure
  np.testing.assert_allclose(second['a'], 0.5 * params['a'])  # λ is now 0.5
  third, state = update(grads, state, params)
  np.testing.assert_allclose(third['a'], 0 * params['a'], atol=1e-7)
  with pytest.raises(ValueError, match="no clipping for the group 'all'"):
    clip(grads, params, {'x': 0.1}, group=lambda path, leaf: 'all')
  with pytest.raises(ValueError, match='needs the groups'):
    agc.adaptive_grad_clip({'x': 0.1})


def test_off_statistics_are_free():
  params = {'w': jnp.ones((4, 2))}

  def equations(**kwargs):
    transform = agc.adaptive_grad_clip(0.1, **kwargs)
    state = transform.init(params)
    assert state == optax.EmptyState()
    lowered = jax.jit(transform.update).lower(params, state, params)
    return lowered.compile().as_text().count(' = ')

  assert equations() <= equations(exclude=lambda path, leaf: False)


@pytest.mark.parametrize(
  ('shape', 'kwargs', 'message'),
  [
    (
      (2, 2, 2, 2, 2),
      {},
      r"of shape \(2, 2, 2, 2, 2\); name its layout.*'S\*'",
    ),
    ((2, 2, 2), {'strict': True}, 'is ambiguous; name its layout'),
    ((1, 5), {'strict': True}, 'is ambiguous'),
    ((2, 2), {'units': lambda path, leaf: 'HWIO'}, "w .* not lie as 'HWIO'"),
    ((2, 2), {'units': lambda path, leaf: 'I*'}, 'does not lie as'),
    ((2, 2), {'units': lambda path, leaf: 'io'}, 'does not lie as'),
    ((2, 2), {'units': (2,)}, r'has no axes \(2,\)'),
    ((2, 2), {'units': {'v': 'IO'}}, 'no tree like the parameters: it lacks w'),
    ((2, 2), {'nonfinite': 'drop'}, "nonfinite is 'drop'"),
    ((2, 2), {'eps': 0.0}, 'must be positive'),
  ],
)
def test_what_is_not_clear_is_refused(shape, kwargs, message):
  leaf = {'w': jnp.ones(shape)}
  with pytest.raises(ValueError, match=message):
    clip(leaf, leaf, 0.1, **kwargs)


def test_named_layouts_are_not_ambiguous():
  """With a layout, a single input is no reason to pool the outputs."""
  g, w = draw((1, 5), 1), draw((1, 5), 2)
  (found,) = clip([g], [w], 0.1, units='IO', strict=True)
  np.testing.assert_allclose(found, oracle(g, w, (0,), 0.1), rtol=1e-6)
  (pooled,) = clip([g], [w], 0.1)
  np.testing.assert_allclose(pooled, oracle(g, w, (0, 1), 0.1), rtol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.int32, jnp.complex64, jnp.bool_])
def test_other_dtypes_are_refused_by_path(dtype):
  leaf = {'net': {'w': jnp.ones((2, 2), dtype)}}
  with pytest.raises(
    TypeError, match=f'got {dtype.dtype} at net/w; exclude it'
  ):
    clip(leaf, leaf, 0.1)
  exclude = {'exclude': lambda path, leaf: True}
  assert clip(leaf, leaf, 0.1, **exclude)['net']['w'] is leaf['net']['w']


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
  np.testing.assert_allclose(jax.vmap(one)(g, w), expected, rtol=1e-5)
  # One of them overflows.
  large = g.at[3].multiply(1e25) if hasattr(g, 'at') else g.copy()
  large[3] *= 1e25
  expected[3] = oracle(large[3], w[3], (0,), 0.1)
  np.testing.assert_allclose(jax.vmap(one)(large, w), expected, rtol=1e-5)
  np.testing.assert_allclose(jax.pmap(one)(large, w), expected, rtol=1e-5)


@pytest.mark.parametrize('size', [1.0, 1e25])
@pytest.mark.parametrize('spec', [('x', None), (None, 'x')])
def test_sharded_is_unsharded(spec, size):
  """A matrix split over its inputs, or its outputs, on eight devices."""
  g, w = draw((16, 24), 1, size), draw((16, 24), 2)
  mesh = Mesh(np.asarray(jax.devices()[:8]), ('x',))
  part = PartitionSpec(*spec)
  name = 'x' if spec[0] else None
  transform = agc.adaptive_grad_clip(0.1, axis_name=lambda path, leaf: name)

  def update(g, w):
    updates, _ = transform.update([g], optax.EmptyState(), [w])
    return updates[0]

  sharded = jax.jit(
    jax.shard_map(update, mesh=mesh, in_specs=(part, part), out_specs=part)
  )
  expected = oracle(g, w, (0,), 0.1)
  np.testing.assert_allclose(sharded(g, w), expected, rtol=1e-5)
  norm = jax.shard_map(
    lambda g: agc.unitwise_norm(g, axis_name=name),
    mesh=mesh,
    in_specs=part,
    out_specs=PartitionSpec(None, spec[1]),
  )
  if size == 1.0:
    np.testing.assert_allclose(
      norm(g), np.linalg.norm(g, axis=0, keepdims=True), rtol=1e-5
    )


def test_summary_is_of_all_units():
  params = {'conv': draw((3, 3, 4, 5), 1), 'head': draw((5, 2), 2)}
  grads = {'conv': draw((3, 3, 4, 5), 3, 0.1), 'head': draw((5, 2), 4)}
  found = agc.summarize(grads, params)
  assert [row.path for row in found.rows] == ['head', 'conv']
  assert [row.units for row in found.rows] == [2, 5]
  assert found.ratios.shape == (7,)
  ratios = np.linalg.norm(grads['head'], axis=0)
  ratios = ratios / np.linalg.norm(params['head'], axis=0)
  assert found.rows[0].largest == pytest.approx(ratios.max(), rel=1e-5)
  assert found.rows[0].median == pytest.approx(np.median(ratios), rel=1e-5)
  assert len(str(found).splitlines()) == 3
  less = agc.summarize(grads, params, exclude=lambda path, x: path == 'head')
  assert [row.path for row in less.rows] == ['conv']
  # λ that clips two of the seven.
  suggested = agc.suggest_clipping([found], share=1.5 / 7)
  assert np.sum(found.ratios > suggested) == 2
  # Larger gradients ask for a larger λ.
  larger = agc.summarize(jax.tree.map(lambda x: 10 * x, grads), params)
  assert agc.suggest_clipping([found, larger]) > suggested
  for summaries, share in (([], 0.1), ([found], 0.0), ([found], 1.0)):
    with pytest.raises(ValueError, match='no finite ratios|no part of the'):
      agc.suggest_clipping(summaries, share)


@pytest.mark.parametrize(
  ('path', 'expected'),
  [
    ('NFNet/~/linear/w', True),
    ('NFNet/~/linear/b', False),
    ('linear/w', False),  # the first of several in Haiku
    ('head/w', True),
    ('mlp/~/linear_0/w', False),
    ('NFNet/~/nf_block/~/squeeze_excite/~/linear/w', False),
    ('params/head/kernel', True),
    ('params/head/bias', False),
    ('params/block/head/kernel', False),
    ('fc/weight', True),
    ('head/kernel/value', True),
    ('conv/kernel', False),
  ],
)
def test_head_is_known(path, expected):
  assert agc.is_head(path, None) is expected


def test_parameters_of_others_are_refused():
  params = {'w': jnp.ones((3, 4))}
  clip = agc.adaptive_grad_clip(0.1)
  with pytest.raises(ValueError, match=r'w has the shape \(4, 3\)'):
    clip.update({'w': jnp.ones((4, 3))}, optax.EmptyState(), params)
  with pytest.raises(ValueError, match=r'of b, but no such parameter'):
    agc.summarize({'b': jnp.ones(3)}, params)
  with pytest.raises(ValueError, match='must be positive'):
    agc.adaptive_grad_clip(np.float32(-1))
