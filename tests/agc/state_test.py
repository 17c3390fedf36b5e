import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from nfnets_jax import agc
from tests.agc.common import draw, tree


def test_groups_schedules_and_statistics():
  params = {'a': jnp.ones((4, 2)), 'b': jnp.ones((4, 6)), 'c': jnp.ones(3)}
  grads = {'a': 0.5 * params['a'], 'b': 2 * params['b'], 'c': jnp.ones(3)}
  transform = agc.adaptive_grad_clip(
    lambda count: 1.0 - 0.6 * count.astype(jnp.float32),
    group=lambda path, leaf: 'small' if path == 'a' else 'large',
    exclude=lambda path, leaf: path == 'c',
    statistics=True,
  )
  state = transform.init(params)
  assert set(state.statistics) == {'small', 'large'}
  update = jax.jit(transform.update)
  first, state = update(grads, state, params)
  structure = jax.tree.structure(state)
  np.testing.assert_array_equal(first['a'], grads['a'])
  np.testing.assert_allclose(first['b'], params['b'], rtol=1e-6)
  np.testing.assert_array_equal(first['c'], grads['c'])
  assert state.count == 1
  assert state.statistics['small'].clipped == 0
  assert state.statistics['small'].largest == pytest.approx(0.5)
  assert state.statistics['small'].units == 2
  assert state.statistics['large'].clipped == 1
  assert state.statistics['large'].largest == pytest.approx(2)
  assert state.statistics['large'].units == 6
  second, state = update(grads, state, params)
  assert jax.tree.structure(state) == structure
  np.testing.assert_allclose(second['a'], 0.4 * params['a'])  # λ is now 0.4
  assert state.statistics['small'].clipped == 1


def test_a_schedule_needs_its_state():
  params = {'w': jnp.ones((4, 2))}
  transform = agc.adaptive_grad_clip(lambda count: 0.1)
  assert transform.init(params).statistics == {}
  with pytest.raises(ValueError, match='the state that `init` returns'):
    transform.update(params, optax.EmptyState(), params)


@pytest.mark.parametrize(
  ('value', 'clipped'), [(np.nan, 0.25), (np.inf, 0.5), (-np.inf, 0.5)]
)
def test_statistics_are_finite(value, clipped):
  """So is the state, for checks of replicas and checkpoints."""
  params = {'w': jnp.ones((3, 4))}
  grads = {'w': jnp.tile(jnp.array([0.5, 0.01, 0.02, value]), (3, 1))}
  transform = agc.adaptive_grad_clip(0.1, statistics=True)
  _, state = jax.jit(transform.update)(grads, transform.init(params), params)
  found = state.statistics['all']
  assert found.clipped == clipped  # no NaN exceeds λ
  assert found.largest == pytest.approx(0.5)
  assert found.units == 4


def test_off_statistics_are_free():
  params = {'w': jnp.ones((4, 2))}

  def equations(**kwargs):
    transform = agc.adaptive_grad_clip(0.1, **kwargs)
    state = transform.init(params)
    assert (state == optax.EmptyState()) is not bool(kwargs)
    lowered = jax.jit(transform.update).lower(params, state, params)
    return lowered.compile().as_text().count(' = ')

  assert equations() < equations(statistics=True)


def test_groups_without_parameters_are_refused():
  params = tree('stem/w', 'body/w')

  def group(path, leaf):
    return path.split('/')[0]

  transform = agc.adaptive_grad_clip(0.1, group=group, statistics=True)
  with pytest.raises(ValueError, match="`init` saw no parameter in .* 'stem'"):
    transform.update(params, transform.init(tree('body/w')), params)


def test_statistics_of_shards_are_theirs():
  g, w = draw((16, 24), 1), draw((16, 24), 2)
  part = PartitionSpec(None, 'x')
  transform = agc.adaptive_grad_clip(1.0, statistics=True)

  def statistics(g, w):
    _, state = transform.update([g], transform.init([w]), [w])
    clipped, largest, units = state.statistics['all']
    assert units.shape == ()
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
    for key, (clipped, largest, units) in state.statistics.items():
      without = key in ('b', 'c', 'False')
      assert clipped == (0 if without else 1)
      assert (units == 0) == without
      assert largest == pytest.approx(0 if without else 0.5)
