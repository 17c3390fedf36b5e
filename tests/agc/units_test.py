"""Layouts and axes, beside numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from nfnets_jax import agc
from tests.agc.common import SHAPES, clip, draw, oracle


@pytest.mark.parametrize('units', SHAPES)
def test_layouts(units):
  shape, axes = SHAPES[units]
  g, w = draw(shape, 1), draw(shape, 2)
  expected = oracle(g, w, axes, 0.5)
  for told in (units, axes, lambda path, leaf: units, {'w': units}):
    if isinstance(told, str) and '*' in told:
      continue  # of any number of axes
    found = clip({'w': g}, {'w': w}, 0.5, units=told, compiled=True)['w']
    np.testing.assert_allclose(found, expected, rtol=2e-6)
  assert np.any(expected != g)


def test_layouts_by_the_number_of_axes():
  shapes = {'conv': (5, 4, 3, 3), 'dense': (5, 4), 'bias': (5,)}
  g = {k: draw(s, 1) for k, s in shapes.items()}
  w = {k: draw(s, 2) for k, s in shapes.items()}
  found = clip(g, w, 0.1, units=['OIHW', 'OI'], compiled=True)
  for k, axes in (('conv', (1, 2, 3)), ('dense', (1,)), ('bias', (0,))):
    np.testing.assert_allclose(found[k], oracle(g[k], w[k], axes, 0.1), 2e-6)
  with pytest.raises(ValueError, match='two layouts of one rank'):
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


@pytest.mark.parametrize(
  ('shape', 'kwargs', 'message'),
  [
    (
      (2, 2, 2, 2, 2),
      {},
      r"of shape \(2, 2, 2, 2, 2\); name its layout.*'S\*'",
    ),
    ((2, 2, 2), {'strict': True}, 'are ambiguous; name its layout'),
    ((1, 5), {'strict': True}, 'are ambiguous'),
    (
      (2, 2),
      {'units': lambda path, leaf: 'HWIO'},
      "w .* layout 'HWIO'",
    ),
    ((2, 2), {'units': lambda path, leaf: 'I*'}, 'does not have layout'),
    ((2, 2), {'units': lambda path, leaf: 'io'}, 'does not have layout'),
    ((2, 2), {'units': (2,)}, r'has no axes \(2,\)'),
    (
      (2, 2),
      {'units': {'v': 'IO'}},
      'or a tree like the parameters: it lacks w',
    ),
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
  (found,) = clip([g], [w], 0.1, units='IO', strict=True, compiled=True)
  np.testing.assert_allclose(found, oracle(g, w, (0,), 0.1), rtol=1e-6)
  (pooled,) = clip([g], [w], 0.1, compiled=True)
  np.testing.assert_allclose(pooled, oracle(g, w, (0, 1), 0.1), rtol=1e-6)


@pytest.mark.parametrize('units', ['OIHW', ['OIHW', 'OIH'], ['WIO']])
def test_layouts_of_no_parameter_are_refused(units):
  params = {'w': jnp.ones((2, 2)), 'b': jnp.ones(2)}
  with pytest.raises(ValueError, match='no parameter; the ranks are 1, 2'):
    agc.adaptive_grad_clip(0.1, units=units).init(params)
  # Vectors go by the rule in any case.
  agc.adaptive_grad_clip(0.1, units=units).init({'b': jnp.ones(2)})


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
      ValueError, match='is not a layout, axes|not have layout 0'
    ):
      clip([g], [w], 0.1, units=units)


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

  message = (
    r"a parameter net sharded over 'x' .* name its layout, such as 'HWIO'"
  )
  for units in (None, lambda path, leaf: 'S*' if len(spec) > 2 else '*'):
    with pytest.raises(ValueError, match=message):
      sharded(units=units)
  with pytest.raises(ValueError, match="sharded over 'x'"):
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
