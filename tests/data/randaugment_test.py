"""RandAugment: its policy strings, its draws, and what they do to a batch."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from nfnets_jax.augment import operations, randaugment

_rand_augment = functools.partial(
  jax.jit, static_argnames=('num_layers', 'magnitude', 'size')
)(randaugment.rand_augment)


def _keys(n, seed=0):
  return jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.key(seed), jnp.arange(n)
  )


def _images(n, height=24, width=32):
  rng = np.random.default_rng(0)
  shape = (n, height, width, 3)
  return jnp.asarray(rng.integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize(
  ('policy', 'expected'),
  [
    ('4x5', (4, 5, None)),
    ('4x10', (4, 10, None)),
    ('2x0', (2, 0, None)),
    ('12x20', (12, 20, None)),
    ('2x5@224', (2, 5, 224)),
  ],
)
def test_parse_policy(policy, expected):
  assert randaugment.parse_policy(policy) == expected


@pytest.mark.parametrize(
  ('policy', 'message'),
  [
    ('', "policy '' is not of the form"),
    ('410', "policy '410' is not"),
    ('4x', "policy '4x' is not"),
    ('x10', "policy 'x10' is not"),
    ('4x10x2', "policy '4x10x2' is not"),
    ('4x-5', "policy '4x-5' is not"),
    ('4x1.5', "policy '4x1.5' is not"),
    (' 4x10', "policy ' 4x10' is not"),
    ('0x10', 'at least 1 layer, not 0'),
    ('4x21', r'magnitude 21 is not in 0\.\.20'),
    ('4x5@', "policy '4x5@' is not"),
    ('4x5@0', 'images of 0 pixels'),
  ],
)
def test_parse_policy_rejects(policy, message):
  with pytest.raises(ValueError, match=message):
    randaugment.parse_policy(policy)


@pytest.mark.parametrize(
  ('num_layers', 'magnitude', 'message'),
  [(0, 5, 'at least 1 layer'), (4, 21, 'magnitude 21'), (4, -1, 'magnitude')],
)
def test_rand_augment_rejects(num_layers, magnitude, message):
  with pytest.raises(ValueError, match=message):
    randaugment.rand_augment(_keys(2), _images(2), num_layers, magnitude)


def test_operations_are_equally_likely():
  n = 16_000
  chosen = jax.jit(randaugment.choose_operations)(_keys(n))
  counts = np.bincount(chosen, minlength=16)
  assert len(counts) == 16
  # Chi-square with 15 degrees of freedom: above 44 once in 10,000 times.
  assert np.sum((counts - n / 16) ** 2 / (n / 16)) < 44


def test_layers_apply_one_after_the_other():
  """Two layers are two distortions, each with a key of its own."""
  keys, images = _keys(8), _images(8)
  result = _rand_augment(keys, images, num_layers=2, magnitude=10)
  strength = jnp.array(
    [operations.argument(name, 10) for name in operations.OPERATIONS],
    jnp.float32,
  )
  layer_keys = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
  distort = jax.jit(operations.distort)
  for layer in range(2):
    pair = jax.vmap(jax.random.split)(layer_keys[:, layer])
    chosen = randaugment.choose_operations(pair[:, 0])
    images = distort(pair[:, 1], images, chosen, strength[chosen])
  np.testing.assert_array_equal(result, images)


@pytest.mark.thorough
def test_lengths_in_pixels_follow_the_size_they_are_for():
  """One layer of a policy for another size is that policy's own operations."""
  keys, images = _keys(64), _images(64)
  result = _rand_augment(keys, images, num_layers=1, magnitude=5, size=224)
  layer_keys = jax.vmap(lambda key: jax.random.split(key, 1))(keys)[:, 0]
  pair = jax.vmap(jax.random.split)(layer_keys)
  chosen = randaugment.choose_operations(pair[:, 0])
  strength = np.array(
    [operations.argument(name, 5) for name in operations.OPERATIONS]
  )
  names = operations.OPERATIONS
  # The shorter side has 24 of the 224 pixels: 50 become 5.36, and 20 are 2.14.
  strength[names.index('TranslateX')] = strength[names.index('TranslateY')] = 5
  strength[names.index('Cutout')] = 2
  told = jnp.asarray(strength, jnp.float32)[chosen]
  expected = jax.jit(operations.distort)(pair[:, 1], images, chosen, told)
  np.testing.assert_array_equal(result, expected)
  whole = _rand_augment(keys, images, num_layers=1, magnitude=5)
  assert np.any(np.asarray(whole) != result)


def test_does_not_depend_on_how_a_batch_is_split():
  keys, images = _keys(8), _images(8)
  run = functools.partial(_rand_augment, num_layers=2, magnitude=10)
  whole = run(keys, images)
  halves = [run(keys[:4], images[:4]), run(keys[4:], images[4:])]
  np.testing.assert_array_equal(whole, np.concatenate(halves))


def test_takes_a_batch_of_one():
  keys, images = _keys(8), _images(8)
  run = functools.partial(_rand_augment, num_layers=2, magnitude=10)
  np.testing.assert_array_equal(
    run(keys[:1], images[:1]), run(keys, images)[:1]
  )


def test_floats_are_clipped_and_truncated_first():
  keys, images = _keys(8), _images(8)
  run = functools.partial(_rand_augment, num_layers=2, magnitude=10)
  beyond = jnp.where(images == 255, 300.0, images.astype(jnp.float32) + 0.9)
  beyond = jnp.where(images == 0, -40.0, beyond)
  result = run(keys, beyond)
  assert result.dtype == jnp.float32
  np.testing.assert_array_equal(result, run(keys, images))
