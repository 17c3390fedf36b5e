"""AutoAugment: the policy's frequencies, and what they do to a batch."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from nfnets_jax.augment import autoaugment, operations

_auto_augment = jax.jit(autoaugment.auto_augment)


def _keys(n):
  return jax.random.split(jax.random.key(0), n)


def test_policy_has_25_pairs_of_known_operations():
  assert len(autoaugment.POLICY_V0) == 25
  for sub_policy in autoaugment.POLICY_V0:
    assert len(sub_policy) == 2
    for name, probability, magnitude in sub_policy:
      assert name in operations.OPERATIONS
      assert 0 <= probability <= 1
      assert 0 <= magnitude <= 10


def test_each_operation_happens_as_often_as_the_policy_says():
  n = 20_000
  chosen, _ = jax.jit(autoaugment.choose_sub_policies)(_keys(n))
  for place in range(2):
    expected = dict.fromkeys(range(-1, 16), 0.0)
    for sub_policy in autoaugment.POLICY_V0:
      name, probability, _ = sub_policy[place]
      expected[operations.OPERATIONS.index(name)] += probability / 25
      expected[-1] += (1 - probability) / 25
    for operation, frequency in expected.items():
      found = np.mean(np.asarray(chosen[:, place]) == operation)
      tolerance = 4.5 * (frequency * (1 - frequency) / n) ** 0.5
      assert found == pytest.approx(frequency, abs=tolerance + 1e-9)


def test_strengths_belong_to_their_operations():
  chosen, strengths = autoaugment.choose_sub_policies(_keys(500))
  found = {
    (operations.OPERATIONS[o], round(s, 3))
    for o, s in zip(
      chosen.ravel().tolist(), strengths.ravel().tolist(), strict=True
    )
    if o >= 0
  }
  assert found <= {
    (name, round(operations.argument(name, magnitude, translate=250), 3))
    for sub_policy in autoaugment.POLICY_V0
    for name, _, magnitude in sub_policy
  }
  assert ('TranslateY', 225.0) in found
  assert ('Posterize', 2.0) in found


@pytest.mark.thorough
def test_does_not_depend_on_how_a_batch_is_split():
  images = np.random.default_rng(0).integers(0, 256, (8, 24, 32, 3), np.uint8)
  images = jnp.asarray(images, jnp.float32)
  keys = _keys(8)
  whole = _auto_augment(keys, images)
  assert whole.dtype == jnp.float32
  assert np.any(np.asarray(whole) != np.asarray(images))
  halves = [_auto_augment(keys[i : i + 4], images[i : i + 4]) for i in (0, 4)]
  np.testing.assert_array_equal(whole, np.concatenate(halves))
