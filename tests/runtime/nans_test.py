import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax.runtime import nans, parallel


def _micro_batches(state, batch, rate):
  """A step with a branch in a function in a scan."""

  @jax.jit
  def loss(images):
    with jax.named_scope('stem'):
      values = jax.lax.cond(rate > 0, jnp.log, jnp.sin, images)
    return values.sum()

  def add(total, images):
    return total + loss(images), None

  total, _ = jax.lax.scan(add, state, batch.reshape(2, -1))
  return jax.lax.pmean(total, parallel.AXIS), total


def _log(state, batch, rate):
  with jax.named_scope('stem'):
    value = jnp.log(batch)
  value = jax.lax.pmean(jnp.mean(value), parallel.AXIS)
  return state - rate * value, value


@pytest.mark.thorough
def test_the_operation_is_named():
  batch = np.ones((2, 4), np.float32)
  batch[1, 3] = -1.0  # in the second micro-batch
  zero, one = np.float32(0), np.float32(1)
  found = nans.find_nan(_micro_batches, zero, batch, one)
  assert re.fullmatch(r'`log`, .*stem.*, .*/nans_test.py:\d+', found)
  batch[1, 3] = 1.0
  assert nans.find_nan(_micro_batches, zero, batch, one) is None


def test_a_compiled_step_is_explained():
  batch = np.ones((jax.local_device_count(), 4), np.float32)
  rate = jnp.ones(())
  state = parallel.replicate(jnp.ones(()))
  with jax.debug_nans(True):
    compiled = parallel.lower_train_step(_log, state, batch, rate).compile()
    explained = nans.program(compiled, _log, rate)
    for _ in range(3):  # jax checks the first call only
      state, value = explained(state, batch)
      assert value == 0
    batch[0, 0] = -1.0
    with pytest.raises(FloatingPointError, match='NaN made by `log`, .*stem'):
      explained(state, batch)
    with pytest.raises(TypeError):  # of the step itself
      explained(state, {'image': batch})
