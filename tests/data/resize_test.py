"""Resized pixels against an oracle and the released kernel."""

import tracemalloc

import numpy as np
import pytest

from nfnets_jax.data import resize


def random_image(height, width, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(256, size=(height, width, 3), dtype=np.uint8)


def keys_matrix(old, new):
  """Keys' interpolation of a whole axis, float64 [new, old], a = -1/2."""
  centers = (np.arange(new) + 0.5) * old / new - 0.5
  steps = np.floor(centers) + np.rint((centers % 1) * 1024) / 1024
  x = np.abs(steps[:, None] - np.arange(old))
  a = -0.5
  near = (a + 2) * x**3 - (a + 3) * x**2 + 1
  far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
  weights = np.where(x < 1, near, np.where(x < 2, far, 0))
  return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
  ('old', 'new'),
  [((1, 1), (3, 2)), ((2, 9), (9, 4)), ((23, 40), (40, 23)), ((8, 8), (33, 8))],
)
def test_resize_is_keys_interpolation(old, new):
  image = random_image(*old)
  expected = np.einsum(
    'hi,ijc,wj->hwc',
    keys_matrix(old[0], new[0]),
    image.astype(np.float64),
    keys_matrix(old[1], new[1]),
  )
  resized = resize.interpolate(image[None], *new)[0]
  assert resized.dtype == np.float32
  np.testing.assert_allclose(resized, expected, atol=1e-3)
  levels = resize.resize(image, *new)
  assert levels.dtype == np.uint8
  assert np.abs(levels - np.clip(expected, 0, 255)).max() < 0.501


def test_resize_to_its_own_size_changes_nothing():
  image = random_image(6, 9)
  np.testing.assert_array_equal(resize.resize(image, 6, 9), image)
  np.testing.assert_array_equal(resize.interpolate(image[None], 6, 9)[0], image)


def test_resize_equals_the_released_kernel(reference):
  golden = np.load(reference / 'bicubic.npz')
  names = [name for name in golden if name.startswith('out/')]
  assert names
  for name in names:
    image = golden['in/' + name.removeprefix('out/').split('->')[0]]
    resized = resize.interpolate(image[None], *golden[name].shape[:2])[0]
    np.testing.assert_allclose(resized, golden[name], atol=1e-3, rtol=0)


@pytest.mark.parametrize('shape', [(3000, 3000), (100, 90_000), (90_000, 7)])
def test_memory_of_a_resize_does_not_grow_with_the_image(shape):
  image = np.broadcast_to(np.uint8([1, 2, 3]), (*shape, 3))
  tracemalloc.start()
  resized = resize.resize(image, 32, 40)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  np.testing.assert_array_equal(resized, np.tile((1, 2, 3), (32, 40, 1)))
  assert peak < 3e6  # all of it in float32 would be 7.6 to 108 MB


@pytest.mark.parametrize('old', [(1000, 90), (7, 2000), (700, 900)])
def test_a_strong_reduction_is_keys_interpolation(old):
  image = random_image(*old)
  expected = np.einsum(
    'hi,ijc,wj->hwc',
    keys_matrix(old[0], 20),
    image.astype(np.float64),
    keys_matrix(old[1], 30),
    optimize=True,
  )
  resized = resize.interpolate(image[None], 20, 30)[0]
  np.testing.assert_allclose(resized, expected, atol=1e-3)
