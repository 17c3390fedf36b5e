import numpy as np
import pytest

from nfnets_jax.training import metrics


def _error_by_bins(confidence, hit, bins):
  """Bin by bin, as the paper has it."""
  error = 0.0
  for b in range(bins):
    inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
    if inside.any():
      gap = abs(hit[inside].mean() - confidence[inside].mean())
      error += inside.mean() * gap
  return error


@pytest.mark.parametrize('bins', [1, 10, 15])
def test_calibration_error(bins):
  rng = np.random.default_rng(0)
  confidence = rng.uniform(0.1, 1, 500)
  confidence[:3] = 1.0, 0.2, 1e-30
  hit = rng.uniform(size=500) < confidence**2
  assert metrics.calibration_error(confidence, hit, bins) == pytest.approx(
    _error_by_bins(confidence, hit, bins)
  )


def test_perfect_calibration():
  hit = np.array([True, True, True, False])
  assert metrics.calibration_error(np.full(4, 0.75), hit) == 0
  assert metrics.calibration_error(np.ones(3), hit[:3]) == 0
  assert metrics.calibration_error(np.zeros(2), ~hit[:2]) == 0


def test_counts_of_classes():
  rng = np.random.default_rng(0)
  label = rng.integers(6, size=200)
  label[label == 4] = 5  # a class without images
  predicted = np.stack([rng.permutation(6)[:5] for _ in label])
  counts = metrics.hits_per_class(label, predicted, 6)
  table = metrics.confusion(label, predicted[:, 0], 6)
  for k in range(6):
    mine = predicted[label == k]
    assert counts[:, k].tolist() == [
      len(mine),
      (mine[:, 0] == k).sum(),
      (mine == k).sum(),
    ]
    assert table[k].tolist() == [(mine[:, 0] == j).sum() for j in range(6)]
