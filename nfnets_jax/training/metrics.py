"""Metrics of predictions, computed on the host in numpy."""

import numpy as np

BINS = 15


def calibration_error(
  confidence: np.ndarray, hit: np.ndarray, bins: int = BINS
) -> float:
  r"""Returns the expected calibration error of the first prediction.

  .. math::
    ECE = \sum_b \frac{n_b}{N} |accuracy_b - confidence_b|

  over bins of equal width, open on the left: (0, 1/bins], (1/bins, 2/bins] etc.

  Args:
    confidence: probability of each first prediction, `[N]`, in [0, 1].
    hit: whether it is correct, `[N]`.
    bins: number of bins.

  Reference:
    Guo et al. 2017, https://arxiv.org/abs/1706.04599, equation 3.

  Example:
    >>> calibration_error(np.array([0.9, 0.9]), np.array([True, False]))
    0.4
  """
  confidence = np.asarray(confidence, np.float64)
  bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
  gaps = np.bincount(bin_of, np.asarray(hit) - confidence, minlength=bins)
  return float(np.abs(gaps).sum() / len(confidence))


def confusion(
  label: np.ndarray, predicted: np.ndarray, num_classes: int
) -> np.ndarray:
  """Counts the images of each label and first prediction, int `[K, K]`.

  Example:
    >>> confusion(np.array([0, 1, 1]), np.array([0, 0, 1]), 2).tolist()
    [[1, 0], [1, 1]]
  """
  cells = np.asarray(label, np.int64) * num_classes + predicted
  counts = np.bincount(cells, minlength=num_classes**2)
  return counts.reshape(num_classes, num_classes)


def hits_per_class(
  label: np.ndarray, predicted: np.ndarray, num_classes: int
) -> np.ndarray:
  """Counts images, top-1 and top-5 hits of each class, int `[3, K]`.

  Args:
    label: of each image, `[N]`.
    predicted: labels, best first, `[N, 5]` or fewer.
    num_classes: K.

  Example:
    >>> hits_per_class(np.array([0, 1]), np.array([[0, 1], [0, 1]]), 2).tolist()
    [[1, 1], [1, 0], [1, 1]]
  """
  right = predicted == np.asarray(label)[:, None]
  kept = (label, label[right[:, 0]], label[right.any(axis=1)])
  return np.stack([np.bincount(x, minlength=num_classes) for x in kept])
