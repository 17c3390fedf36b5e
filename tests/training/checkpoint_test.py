import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfnets_jax.training import checkpoint, parallel, train_step


def _state(step=0, width=4, seed=0):
  """A state with everything that a state can hold, in random numbers."""
  keys = jax.random.split(jax.random.key(seed), 3)
  params = {
    'net/~/conv': {'w': jax.random.normal(keys[0], (3, width)) * 1e-3},
    'net': {'gain': jnp.asarray(jnp.pi)},
  }
  optimizer = optax.chain(
    optax.masked(optax.identity(), {'net/~/conv': True, 'net': False}),
    optax.trace(0.9),
    optax.scale_by_learning_rate(lambda step: 1.0),
  )
  opt_state = jax.tree.map(
    lambda x: (
      x + jax.random.normal(keys[1], x.shape)
      if jnp.issubdtype(x.dtype, jnp.floating)
      else x + step
    ),
    optimizer.init(params),
  )
  return parallel.replicate(
    train_step.TrainState(
      step=jnp.asarray(step),
      key=jax.random.key_data(keys[2]),
      params=params,
      model_state={'net/~/norm': {'mean': jnp.full(width, 1 / 3)}},
      opt_state=opt_state,
      ema_params=jax.tree.map(lambda x: x / 3, params),
    )
  )


def _save(folder, steps, keep=3):
  """Saves states at `steps` as a run does, and ends it."""
  checkpoints = checkpoint.Checkpointer(folder, keep)
  for step in steps:
    checkpoints.save(step, _state(step), {'next_index': 10 * step})
  checkpoints.close()


def _restore(folder, template):
  checkpoints = checkpoint.Checkpointer(folder, keep=3)
  try:
    return checkpoints.restore(template)
  finally:
    checkpoints.close()


def _assert_identical(tree, expected):
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  for x, y in zip(
    jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_array_equal(x, y, strict=True)


def test_newest_state_comes_back_bit_for_bit_on_every_device(tmp_path):
  _save(tmp_path, [3, 7])
  state, loader_state = _restore(tmp_path, _state(seed=1))
  _assert_identical(state, _state(7))
  assert isinstance(state, train_step.TrainState)
  assert loader_state == {'next_index': 70}
  for x in jax.tree.leaves(state):
    assert x.sharding.device_set == set(jax.devices())
    assert x.is_fully_replicated
  assert parallel.replica_spread(state.params) == 0


def test_restored_state_can_be_trained_on(tmp_path):
  _save(tmp_path, [1])
  state, _ = _restore(tmp_path, _state())
  step = parallel.parallel_train_step(
    lambda state, batch: (state._replace(step=state.step + 1), batch.sum())
  )
  new, _ = step(state, parallel.shard(np.zeros(8, np.float32)))
  _assert_identical(new.params, _state(1).params)
  assert int(new.step) == 2


def test_saving_does_not_see_what_happens_to_the_state_afterwards(tmp_path):
  checkpoints = checkpoint.Checkpointer(tmp_path, keep=1)
  state = _state(1)
  checkpoints.save(1, state, {})
  jax.tree.map(lambda x: x.delete(), state)  # as donation does
  checkpoints.wait()
  restored, _ = checkpoints.restore(_state())
  checkpoints.close()
  _assert_identical(restored, _state(1))


def test_only_the_newest_stay(tmp_path):
  _save(tmp_path, [2, 4, 6, 8], keep=2)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['6', '8']


def test_a_step_that_is_there_is_not_written_again(tmp_path):
  checkpoints = checkpoint.Checkpointer(tmp_path, keep=3)
  checkpoints.save(1, _state(1), {'next_index': 1})
  checkpoints.save(1, _state(1, seed=5), {'next_index': 5})
  checkpoints.wait()
  state, loader_state = checkpoints.restore(_state())
  checkpoints.close()
  _assert_identical(state, _state(1))
  assert loader_state == {'next_index': 1}


def test_what_a_killed_run_was_writing_is_not_taken_for_a_checkpoint(tmp_path):
  _save(tmp_path, [1])
  (tmp_path / '2.orbax-checkpoint-tmp').mkdir()
  checkpoints = checkpoint.Checkpointer(tmp_path, keep=3)
  assert checkpoints.latest_step == 1
  checkpoints.close()


def test_nothing_to_restore(tmp_path):
  checkpoints = checkpoint.Checkpointer(tmp_path / 'new', keep=3)
  assert checkpoints.latest_step is None
  with pytest.raises(FileNotFoundError, match='no checkpoint in .*new'):
    checkpoints.restore(_state())
  checkpoints.close()


def _without(tree, module):
  return {name: x for name, x in tree.items() if name != module}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda params: _state(width=5).params, r'net/~/conv.*3, 4.*3, 5'),
    (lambda params: _without(params, 'net/~/conv'), 'net/~/conv'),
    (lambda params: params | {'net/~/linear': {'w': 1}}, 'net/~/linear'),
  ],
  ids=['shape', 'missing', 'extra'],
)
def test_checkpoint_of_another_net_is_refused(tmp_path, change, message):
  _save(tmp_path, [1])
  template = _state()
  params = parallel.replicate(
    jax.tree.map(jnp.asarray, change(template.params))
  )
  with pytest.raises(ValueError, match=message) as caught:
    _restore(tmp_path, template._replace(params=params))
  assert 'gain' not in str(caught.value)  # which is as it should be


@pytest.mark.parametrize('keep', [0, -1])
def test_no_checkpoint_to_keep(tmp_path, keep):
  message = f'keep_checkpoints must be at least 1, got {keep}'
  with pytest.raises(ValueError, match=message):
    checkpoint.Checkpointer(tmp_path, keep)
