"""MixUp and CutMix against their formulas, and their distributions."""

import numpy as np
import pytest

from nfnets_jax.data import mixing


def _pair(n, height=6, width=10, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (2, n, height, width, 3), dtype=np.uint8)


def _uniform(n, seed=0):
  return np.random.default_rng(seed).random((n, mixing.NUM_DRAWS))


def test_mixup_is_the_formula():
  a, b = _pair(64)
  images, ratio = mixing.mixup(a, b, _uniform(64)[:, 0])
  r = ratio.astype(np.float64)[:, None, None, None]
  expected = np.floor(r * a + (1 - r) * b + 0.5)
  np.testing.assert_array_equal(images, expected)
  assert images.dtype == np.uint8 and ratio.dtype == np.float32
  np.testing.assert_array_equal(ratio * 256, np.rint(ratio * 256))
  same, _ = mixing.mixup(a, a, _uniform(64)[:, 0])
  np.testing.assert_array_equal(same, a)


@pytest.mark.parametrize('alpha', [0.2, 1.0])
def test_mixup_ratio_has_the_moments_of_beta(alpha):
  n = 4096
  a = np.zeros((n, 1, 1, 3), np.uint8)
  _, ratio = mixing.mixup(a, a, _uniform(n)[:, 0], alpha)
  variance = 1 / (4 * (2 * alpha + 1))
  assert ratio.min() >= 0
  assert ratio.max() <= 1
  assert ratio.mean() == pytest.approx(0.5, abs=4 * (variance / n) ** 0.5)
  assert ratio.var() == pytest.approx(variance, rel=0.05)


def test_mixup_ratio_is_the_inverse_of_the_distribution():
  # That of Beta(1, 1) is the identity.
  a, uniform = np.zeros((5, 1, 1, 3), np.uint8), np.arange(5) / 5
  _, ratio = mixing.mixup(a, a, uniform, 1.0)
  np.testing.assert_allclose(ratio, uniform, atol=0.5 / 256)


def test_mixup_rejects_an_alpha_that_is_not_positive():
  with pytest.raises(ValueError, match=r'must be positive, not 0\.0'):
    mixing.mixup(*_pair(8), _uniform(8)[:, 0], alpha=0.0)


@pytest.mark.parametrize('size', [(16, 16), (7, 12), (1, 1)])
def test_cutmix_weighs_labels_by_the_pixels_it_pasted(size):
  n = 64
  a, b = np.ones((n, *size, 3), np.uint8), np.zeros((n, *size, 3), np.uint8)
  images, weight = mixing.cutmix(a, b, _uniform(n))
  pasted = images[..., 0].mean((1, 2))
  np.testing.assert_allclose(weight, pasted, atol=1e-6)
  assert weight.dtype == np.float32 and images.dtype == np.uint8


def test_cutmix_pastes_one_box_with_the_pixels_in_their_places():
  a, b = _pair(32, height=12, width=20)
  before = b.copy()
  images, weight = mixing.cutmix(a, b, _uniform(32))
  np.testing.assert_array_equal(b, before)
  # Both have the same value here and there.
  from_a, from_b = (images == a).all(-1), (images == b).all(-1)
  assert np.all(from_a | from_b)
  mask = from_a & ~from_b
  rows, columns = mask.any(2), mask.any(1)
  np.testing.assert_array_equal(mask, rows[:, :, None] & columns[:, None])
  for line in (*rows, *columns):  # one run: it begins once at most
    assert np.sum(np.diff(line.astype(int), prepend=0) == 1) <= 1
  np.testing.assert_allclose(weight, mask.mean((1, 2)), rtol=1e-5)


def test_cutmix_box_is_uniform_in_area_and_place():
  """Its mean and spread are those of a simulation of the definition."""
  n, size = 4096, 32
  a = np.ones((n, size, size, 1), np.uint8)
  images, weight = mixing.cutmix(a, np.zeros_like(a), _uniform(n))
  rng = np.random.default_rng(0)
  side = np.sqrt(rng.uniform(size=100_000))
  half = (side * size).astype(int) // 2

  def length():
    center = rng.integers(0, size, len(side))
    return np.minimum(center + half, size) - np.maximum(center - half, 0)

  area = length() * length() / size**2
  tolerance = 4 * area.std() / n**0.5
  assert weight.mean() == pytest.approx(area.mean(), abs=tolerance)
  assert weight.std() == pytest.approx(area.std(), rel=0.05)
  # A box has as many pixels before its center as from it on, so that the boxes
  # of all centers lie evenly about the pixel before the middle.
  cover = images[:, :-1, :-1, 0].astype(np.float64).mean(0)
  np.testing.assert_allclose(cover, cover[::-1], atol=0.05)
  np.testing.assert_allclose(cover, cover.T, atol=0.05)


@pytest.mark.parametrize('first_index', [0, 1, 1001])
def test_mixes_take_turns(first_index):
  a, b = _pair(8)
  uniform, index = _uniform(8), first_index + np.arange(8)
  images, ratio = mixing.mix(a, b, uniform, index, 0.2, True)
  blended, ratios = mixing.mixup(a, b, uniform[:, 0], 0.2)
  pasted, areas = mixing.cutmix(a, b, uniform)
  even = index % 2 == 0
  np.testing.assert_array_equal(images[even], blended[even])
  np.testing.assert_array_equal(images[~even], pasted[~even])
  np.testing.assert_array_equal(ratio, np.where(even, ratios, areas))


@pytest.mark.parametrize(('alpha', 'cutmix'), [(0.2, False), (None, True)])
def test_one_mix_makes_every_image(alpha, cutmix):
  a, b = _pair(5)
  result = mixing.mix(a, b, _uniform(5), np.arange(5), alpha, cutmix)
  if cutmix:
    expected = mixing.cutmix(a, b, _uniform(5))
  else:
    expected = mixing.mixup(a, b, _uniform(5)[:, 0], alpha)
  for ours, theirs in zip(result, expected, strict=True):
    np.testing.assert_array_equal(ours, theirs)
