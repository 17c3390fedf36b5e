"""What AGC can be told, beside numpy in float64."""

import re

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
@settings(max_examples=10, deadline=None)
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
    assert (state == optax.EmptyState()) is not bool(kwargs)
    lowered = jax.jit(transform.update).lower(params, state, params)
    return lowered.compile().as_text().count(' = ')

  assert equations() < equations(statistics=True)


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
    (
      (2, 2),
      {'units': lambda path, leaf: 'HWIO'},
      "w .* layout 'HWIO'",
    ),
    ((2, 2), {'units': lambda path, leaf: 'I*'}, 'does not have the layout'),
    ((2, 2), {'units': lambda path, leaf: 'io'}, 'does not have the layout'),
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
    # Layers made in `__call__`.
    ('net/head/w', True),
    ('net/linear/w', True),
    ('net/linear/b', False),
    ('net/block/linear/w', False),
    ('params/lm_head/kernel', True),
    ('transformer/lm_head/w', True),
    ('head/out_proj/weight', True),
    ('classifier/out_proj/kernel', True),
    ('head/fc/weight', True),
    ('heads/head/kernel', True),
    ('params/output_layer/kernel', True),
    ('params/out/kernel', True),
    ('params/Dense_1/kernel', False),  # no name tells the last of several
    ('NFNet/~/block/~/gate/~/linear/w', False),
    ('params/block_0/attn/head/kernel', False),
    ('params/block_0/attn/out/kernel', False),
    ('layers/0/attn/out_proj/weight', False),
    ('attn/out_proj/weight', False),
    ('params/header/kernel', False),
    ('params/head/norm/kernel', False),
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


def tree(*paths, shape=(2, 2)):
  """Parameters of these paths."""
  found = {}
  for path in paths:
    *modules, name = path.split('/')
    node = found
    for module in modules:
      node = node.setdefault(module, {})
    node[name] = jnp.ones(shape)
  return found


@pytest.mark.parametrize(
  ('shape', 'spec'),
  [
    ((8, 16), ('x', None)),  # (1, 16) of it
    ((16, 8), (None, 'x')),  # (16, 1)
    ((16, 24), ('x', None)),
    ((3, 3, 8, 4), (None, None, 'x', None)),
    ((8, 1, 1, 4), ('x', None, None, None)),
    ((2, 8, 16), (None, 'x', None)),
  ],
)
def test_shards_do_not_tell_their_units(shape, spec):
  g, w = draw(shape, 1), draw(shape, 2)
  letters = {2: 'IO', 3: 'SIO', 4: 'HWIO'}[len(shape)]
  mesh = Mesh(np.asarray(jax.devices()[:8]), ('x',))
  part = PartitionSpec(*spec)

  def sharded(**kwargs):
    transform = agc.adaptive_grad_clip(0.1, axis_name='x', **kwargs)

    def update(g, w):
      return transform.update({'net': g}, optax.EmptyState(), {'net': w})[0]

    specs = {'in_specs': (part, part), 'out_specs': {'net': part}}
    return jax.jit(jax.shard_map(update, mesh=mesh, **specs))(g, w)['net']

  message = r"a parameter net split over 'x' .* name its layout, such as 'HWIO'"
  for units in (None, lambda path, leaf: 'S*' if len(spec) > 2 else '*'):
    with pytest.raises(ValueError, match=message):
      sharded(units=units)
  with pytest.raises(ValueError, match="split over 'x'"):
    agc.unitwise_norm(jnp.asarray(g), axis_name='x')
  if spec[-1] is None:  # the summed axes are split
    axes = tuple(i for i, letter in enumerate(letters) if letter not in 'SO')
    expected = oracle(g, w, axes, 0.1)
    for units in (letters, axes):
      np.testing.assert_allclose(sharded(units=units), expected, rtol=1e-5)


def test_the_rule_is_for_what_is_not_split():
  shapes = {'split': (8, 16), 'whole': (4, 6), 'out': (16, 8), 'bias': (16,)}
  specs = {
    'split': PartitionSpec('x', None),
    'whole': PartitionSpec(),
    'out': PartitionSpec(None, 'x'),
    'bias': PartitionSpec('x'),
  }
  g = {k: draw(s, 1) for k, s in shapes.items()}
  w = {k: draw(s, 2) for k, s in shapes.items()}
  # The vector is one unit, whatever its shards.
  transform = agc.adaptive_grad_clip(
    0.1,
    axis_name=lambda path, leaf: 'x' if path in ('split', 'bias') else None,
    units=lambda path, leaf: 'IO' if path == 'split' else None,
  )
  found = jax.jit(
    jax.shard_map(
      lambda g, w: transform.update(g, optax.EmptyState(), w)[0],
      mesh=Mesh(np.asarray(jax.devices()[:8]), ('x',)),
      in_specs=(specs, specs),
      out_specs=specs,
    )
  )(g, w)
  for k in shapes:
    np.testing.assert_allclose(found[k], oracle(g[k], w[k], (0,), 0.1), 1e-5)


def test_statistics_of_shards_are_theirs():
  g, w = draw((16, 24), 1), draw((16, 24), 2)
  part = PartitionSpec(None, 'x')
  transform = agc.adaptive_grad_clip(1.0, statistics=True)

  def statistics(g, w):
    _, state = transform.update([g], transform.init([w]), [w])
    clipped, largest = state.statistics['all']
    whole = (jax.lax.pmean(clipped, 'x'), jax.lax.pmax(largest, 'x'))
    return whole, clipped.reshape(1)

  (clipped, largest), own = jax.jit(
    jax.shard_map(
      statistics,
      mesh=Mesh(np.asarray(jax.devices()[:8]), ('x',)),
      in_specs=(part, part),
      out_specs=((PartitionSpec(),) * 2, PartitionSpec('x')),
    )
  )(g, w)
  ratio = np.linalg.norm(g, axis=0) / np.linalg.norm(w, axis=0)
  assert clipped == pytest.approx(np.mean(ratio >= 1))
  assert largest == pytest.approx(ratio.max(), rel=1e-5)
  np.testing.assert_allclose(own, (ratio >= 1).reshape(8, 3).mean(1), rtol=1e-6)


@pytest.mark.parametrize(
  ('paths', 'exclude'),
  [
    (('params/Dense_0/kernel', 'params/Dense_1/kernel'), agc.is_head),
    (('linear/w', 'linear_1/w'), agc.is_head),
    (('layers/0/weight', 'layers/1/weight'), agc.is_head),
    (('net/head/w',), lambda path, leaf: 'haed' in path),
    (('net/head/w',), lambda path, leaf: leaf.ndim == 1),
  ],
)
def test_what_excludes_nothing_is_refused(paths, exclude):
  params = tree(*paths)
  shown = f'matches no parameter; the paths are {", ".join(paths)}: exclude by'
  with pytest.raises(
    ValueError, match=f'{shown} them, .* {paths[-1]!r}, or le'
  ):
    agc.adaptive_grad_clip(0.1, exclude=exclude).init(params)
  with pytest.raises(ValueError, match=shown):
    agc.summarize(params, params, exclude=exclude)
  with pytest.raises(ValueError, match=shown):
    optax.chain(
      agc.adaptive_grad_clip(0.1, exclude=exclude), optax.sgd(0.1)
    ).init(params)
  injected = optax.inject_hyperparams(agc.adaptive_grad_clip, 'exclude')
  with pytest.raises(ValueError, match=shown):
    injected(0.1, exclude=exclude).init(params)


@pytest.mark.parametrize(
  'paths',
  [
    # Which is the last?
    ('net/linear/w', 'net/linear_1/w'),
    ('NFNet/~/linear/w', 'NFNet/~/linear_1/w'),
    ('net/head/w', 'net/linear/w'),
    ('params/fc/kernel', 'params/out/kernel'),
    # A layer of an inner module, and the classifier under another name.
    ('gate/linear/w', 'linear/w'),
    ('multi_head_attention/linear/w', 'readout/w'),
  ],
)
def test_is_head_refuses_to_choose(paths):
  with pytest.raises(ValueError, match='is_head matches .* exclude by them'):
    agc.adaptive_grad_clip(0.1, exclude=agc.is_head).init(tree(*paths))
  chosen = agc.adaptive_grad_clip(0.1, exclude=lambda path, x: path == paths[0])
  assert chosen.init(tree(*paths)) == optax.EmptyState()


@pytest.mark.parametrize(
  'path',
  [
    'net/head/w',
    'net/linear/w',
    'params/lm_head/kernel',
    'head/out_proj/weight',
    'classifier/kernel',
  ],
)
def test_is_head_keeps_the_head(path):
  net = path.split('/')[0]
  params = tree(path, f'{net}/conv/w')
  grads = jax.tree.map(lambda x: 9 * x, params)
  found = dict(agc._leaves(clip(grads, params, 0.1, exclude=agc.is_head)))
  np.testing.assert_array_equal(found[path], np.full((2, 2), 9))
  np.testing.assert_allclose(found[f'{net}/conv/w'], 0.1, rtol=1e-6)


def test_where_parameters_are_hidden_nothing_is_missed():
  params = tree('body/kernel', 'head/kernel')
  mask = {'body': {'kernel': True}, 'head': {'kernel': False}}
  transform = agc.adaptive_grad_clip(0.1, exclude=agc.is_head)
  grouped = agc.adaptive_grad_clip(
    {'body': 0.1, 'head': 0.2}, group=lambda path, leaf: path.split('/')[0]
  )
  for each in (transform, grouped, agc.adaptive_grad_clip(0.1, units='OIHW')):
    masked = optax.masked(each, mask)
    masked.update(params, masked.init(params), params)
    parts = optax.partition({True: each, False: each}, mask)
    parts.update(params, parts.init(params), params)
    each.init({})
    each.init({'frozen': None})
  assert transform.update({}, transform.init({}), {})[0] == {}


def test_groups_without_parameters_are_refused():
  params = tree('stem/w', 'body/w')

  def group(path, leaf):
    return path.split('/')[0]

  for wrong in ('haed', 'Stem', 'body '):
    with pytest.raises(
      ValueError,
      match=f"group '{wrong}' of clipping; group returns 'body', 'stem'",
    ):
      agc.adaptive_grad_clip(
        {'stem': 0.1, 'body': 0.1, wrong: 0.2}, group=group
      ).init(params)
  with pytest.raises(ValueError, match="no clipping for the group 'stem'"):
    agc.adaptive_grad_clip({'body': 0.1}, group=group).init(params)
  transform = agc.adaptive_grad_clip(0.1, group=group, statistics=True)
  with pytest.raises(ValueError, match="`init` saw no parameter in .* 'stem'"):
    transform.update(params, transform.init(tree('body/w')), params)


@pytest.mark.parametrize('units', ['OIHW', ['OIHW', 'OIH'], ['WIO']])
def test_layouts_of_no_parameter_are_refused(units):
  params = {'w': jnp.ones((2, 2)), 'b': jnp.ones(2)}
  with pytest.raises(ValueError, match='no parameter; there are some of 1, 2'):
    agc.adaptive_grad_clip(0.1, units=units).init(params)
  # Vectors go by the rule in any case.
  agc.adaptive_grad_clip(0.1, units=units).init({'b': jnp.ones(2)})


IMPOSSIBLE = [
  np.asarray(-1.0),
  '0.01',
  True,
  np.bool_(True),
  jnp.asarray(True),
  jnp.asarray(-0.5),
  np.ones(1),
  jnp.ones((2,)),
  np.nan,
  jnp.asarray(jnp.nan),
  np.inf,
  -np.inf,
  0,
  np.float32(0),
  np.int64(-3),
  1j,
  b'1',
  None,
  [0.01],
  10**400,
]


@pytest.mark.parametrize('value', IMPOSSIBLE, ids=repr)
def test_impossible_numbers_are_refused_with_the_value(value):
  params = {'w': jnp.ones((2, 2))}
  shown = re.escape(repr(value))
  for args, kwargs in (
    ((value,), {}),
    ((0.01,), {'eps': value}),
    (({'a': 0.01, 'b': value},), {'group': lambda path, leaf: 'a'}),
  ):
    with pytest.raises(ValueError, match=f'must be positive, got .*{shown}'):
      agc.adaptive_grad_clip(*args, **kwargs)
  with pytest.raises(ValueError, match=f'must be positive, got {shown}'):
    clip(params, params, lambda count: value)
  with pytest.raises(ValueError, match=f'positive number, got {shown}'):
    agc.summarize(params, params, eps=value)
  with pytest.raises(ValueError, match=f'share {shown} is no part of the'):
    agc.suggest_clipping([agc.summarize(params, params)], value)


@pytest.mark.parametrize(
  'value',
  [
    1,
    np.int64(1),
    np.float64(1),
    np.float16(1),
    np.asarray(1.0),
    np.asarray(1),
    jnp.asarray(1.0),
    jnp.asarray(1, jnp.bfloat16),
  ],
  ids=repr,
)
def test_numbers_are_numbers(value):
  g, w = draw((4, 3), 1), draw((4, 3), 2)
  (expected,) = clip([g], [w], 1.0, eps=1.0)
  for clipping in (value, lambda count: value):
    (found,) = clip([g], [w], clipping, eps=value)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.thorough
def test_traced_numbers_are_allowed():
  g, w = draw((4, 3), 1), draw((4, 3), 2)

  def update(clipping, eps):
    return clip([g], [w], clipping, eps=eps)[0]

  np.testing.assert_array_equal(
    jax.jit(update)(0.1, 0.01),
    jax.jit(update, static_argnums=(0, 1))(0.1, 0.01),
  )
  many = jax.vmap(update, (0, None))(jnp.asarray([0.1, 0.2]), 0.01)
  np.testing.assert_allclose(many[1], oracle(g, w, (0,), 0.2), rtol=1e-5)
  for value in (jnp.ones(2), jnp.asarray(True)):
    with pytest.raises(ValueError, match='must be positive, got'):
      jax.jit(update)(value, 0.01)
    with pytest.raises(ValueError, match='must be positive, got'):
      jax.jit(update)(0.1, value)


@pytest.mark.parametrize('x64', [False, True])
def test_a_group_without_gradients_is_carried_by_scan(x64):
  params = {'a': jnp.ones((4, 2)), 'b': jnp.ones((4, 6)), 'c': jnp.ones(3)}
  grads = {'a': 0.5 * params['a'], 'b': None, 'c': None}
  for group in (None, lambda path, leaf: path, lambda path, leaf: path == 'a'):
    name = (lambda path, leaf, g=group: str(g(path, leaf))) if group else None
    transform = agc.adaptive_grad_clip(0.1, group=name, statistics=True)

    def step(state, _, transform=transform):
      updates, state = transform.update(grads, state, params)
      return state, updates['a']

    with jax.enable_x64(x64):
      start = transform.init(params)
      state, found = jax.lax.scan(step, start, None, 2)
    assert state.statistics.keys() == start.statistics.keys()
    np.testing.assert_allclose(found, np.full((2, 4, 2), 0.1), rtol=1e-6)
    for key, (clipped, largest) in state.statistics.items():
      without = key in ('b', 'c', 'False')
      assert clipped == (0 if without else 1)
      assert largest == pytest.approx(0 if without else 0.5)


@pytest.mark.parametrize('shape', [(4, 3), (5,), ()])
def test_float64_of_numpy_is_float32_as_in_jax(shape):
  g, w = (np.asarray(draw(shape, seed), np.float64) for seed in (1, 2))
  found = clip({'w': g}, {'w': w}, 0.01)['w']  # warnings are errors here
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(
    found, oracle(g, w, 0 if shape else (), 0.01), 1e-5
  )
  assert agc.unitwise_norm(w).dtype == jnp.float32


@pytest.mark.parametrize('leaf', [1.0, 3, 'w', True])
def test_leaves_that_are_no_arrays_are_named(leaf):
  array = jnp.ones(())
  message = 'got a Python .* at net/w; make it an array or exclude it'
  for g, w in ((leaf, leaf), (leaf, array), (array, leaf)):
    grads, params = {'net': {'w': g}}, {'net': {'w': w}}
    for units in (None, ['O', 'IO']):
      with pytest.raises(TypeError, match=message):
        clip(grads, params, 0.1, units=units)
      with pytest.raises(TypeError, match=message):
        agc.summarize(grads, params, units=units)
  with pytest.raises(TypeError, match='got a Python'):
    agc.unitwise_norm(leaf)
  params = {'net': {'w': leaf}, 'v': array}
  kept = clip(params, params, 0.1, exclude=lambda path, leaf: 'net' in path)
  assert kept['net']['w'] is leaf


def test_axes_of_numpy():
  g, w = draw((4, 5), 1), draw((4, 5), 2)
  for axes in ((np.int64(0),), (np.uint8(0),), (np.int32(-2),)):
    (found,) = clip([g], [w], 0.1, units=axes)
    np.testing.assert_allclose(found, oracle(g, w, (0,), 0.1), rtol=1e-6)
  for axes in ((0.0,), (True,), (np.int64(2),), (np.bool_(False),)):
    with pytest.raises(ValueError, match=r'0 of shape \(4, 5\) has no axes'):
      clip([g], [w], 0.1, units=axes)
  for units in (0, [0], 1.5):
    with pytest.raises(
      ValueError, match='is no layout, tuple|not have the layout 0'
    ):
      clip([g], [w], 0.1, units=units)


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
