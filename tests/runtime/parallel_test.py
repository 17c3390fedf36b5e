import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax.runtime import parallel

DEVICES = 8


def test_the_tests_run_on_eight_devices():
  assert jax.local_device_count() == DEVICES


def test_shard_gives_each_device_the_next_examples():
  batch = {'image': np.arange(48).reshape(16, 3), 'label': np.arange(16)}
  shards = parallel.shard(batch)
  assert shards['image'].shape == (DEVICES, 2, 3)
  for device in range(DEVICES):
    examples = slice(2 * device, 2 * device + 2)
    for name, x in batch.items():
      np.testing.assert_array_equal(shards[name][device], x[examples])


def test_shard_says_what_cannot_be_split():
  with pytest.raises(ValueError, match='12 examples are not .* by 8 devices'):
    parallel.shard({'label': np.zeros(12)})


@pytest.fixture
def tree():
  return {
    'w': jnp.arange(6, dtype=jnp.float32).reshape(2, 3),
    'step': jnp.asarray(3),
    'none': jnp.zeros((0, 4)),
  }


def test_replicas_are_whole_copies(tree):
  replicated = parallel.replicate(tree)
  for name, x in replicated.items():
    assert x.is_fully_replicated
    shards = x.addressable_shards
    assert {shard.device for shard in shards} == set(jax.devices())
    for shard in shards:
      np.testing.assert_array_equal(shard.data, tree[name], strict=True)


def test_local_copy_is_one_of_the_copies(tree):
  replicated = parallel.replicate(tree)
  for name, x in jax.tree.map(parallel.local_copy, replicated).items():
    assert len(x.sharding.device_set) == 1
    np.testing.assert_array_equal(x, tree[name], strict=True)
  on_host = np.arange(3)
  assert parallel.local_copy(on_host) is on_host


def test_training_consumes_the_state_but_not_what_it_was_copied_from(tree):
  before = jax.tree.map(np.array, tree)
  replicated = parallel.replicate(tree)

  def step(state, batch):
    return jax.tree.map(lambda x: x + 1, state), jax.lax.pmean(batch, 'devices')

  new, mean = parallel.parallel_train_step(step)(
    replicated, parallel.shard(np.arange(16, dtype=np.float32))
  )
  assert replicated['w'].is_deleted()
  for name, x in tree.items():
    np.testing.assert_array_equal(x, before[name])
    np.testing.assert_array_equal(new[name], before[name] + 1)
  np.testing.assert_array_equal(mean, [7, 8])


def test_inputs_are_the_same_on_every_device_and_no_constants():
  traced = []

  def step(state, batch, inputs):
    traced.append(inputs)
    return state + inputs['rate'], jax.lax.pmean(
      batch * inputs['rate'], 'devices'
    )

  batch = parallel.shard(np.arange(16, dtype=np.float32))
  program = parallel.parallel_train_step(step, inputs=1)
  inputs = parallel.replicate({'rate': np.float32(2)})
  state = parallel.replicate(np.float32(1))
  for expected in (3, 5):
    state, mean = program(state, batch, inputs)
    assert float(state) == expected
    np.testing.assert_array_equal(mean, [14, 16])
  assert all(isinstance(x['rate'], jax.core.Tracer) for x in traced)


def test_evaluation_keeps_the_state(tree):
  state = parallel.replicate(tree)

  def step(state, batch):
    return jax.lax.psum(state['w'].sum() * batch.sum(), parallel.AXIS)

  batch = parallel.shard(np.arange(16, dtype=np.float32))
  for _ in range(2):
    assert float(parallel.parallel_eval_step(step)(state, batch)) == 15 * 120


def _from_copies(copies):
  """An array that claims to be replicated and holds these copies."""
  like = parallel.replicate(jnp.zeros(copies[0].shape))
  return jax.make_array_from_single_device_arrays(
    like.shape,
    like.sharding,
    [
      jax.device_put(copy, device)
      for copy, device in zip(copies, jax.devices(), strict=True)
    ],
  )


@pytest.mark.parametrize('device', [0, 3, 7])
@pytest.mark.parametrize(
  ('error', 'expected'),
  [(0.0, 0.0), (-0.25, 0.25), (np.nan, np.nan), (np.inf, np.inf)],
)
def test_spread_is_the_largest_difference(tree, device, error, expected):
  copies = [np.ones((2, 2), np.float32) for _ in range(DEVICES)]
  copies[device][1, 0] += error
  state = {'same': parallel.replicate(tree), 'w': _from_copies(copies)}
  spread = parallel.replica_spread(state)
  np.testing.assert_equal(spread, expected)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_spread_of_what_is_nowhere_finite_is_nan(value):
  copies = [np.array([1, value], np.float32)] * DEVICES
  assert np.isnan(parallel.replica_spread({'w': _from_copies(copies)}))


def test_one_device_has_nothing_to_compare(monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  state = {'w': jnp.ones((2, 2), jnp.bfloat16), 'step': jnp.array(3)}
  assert parallel.replica_spread(state) == 0
  for value in (jnp.nan, jnp.inf):
    state['w'] = state['w'].at[1, 0].set(value)
    assert np.isnan(parallel.replica_spread(state))
