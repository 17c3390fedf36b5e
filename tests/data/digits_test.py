"""The data set `digits` holds scikit-learn's images, no more and no less."""

import numpy as np
import pytest
from sklearn import datasets as sklearn_datasets

from nfnets_jax.data import datasets, decode


@pytest.fixture(scope='module')
def original():
  digits = sklearn_datasets.load_digits()
  return digits.images.astype(int), digits.target


def read(split, data_dir):
  """Returns the levels 0 to 16, [N, 8, 8], and the labels [N]."""
  source = datasets.load('digits', split, data_dir).source
  examples = [source[i] for i in range(len(source))]
  images = np.stack([decode.decode(e['image']) for e in examples])
  assert (images == images[..., :1]).all()
  levels = np.rint(images[..., 0] * (16 / 255)).astype(int)
  np.testing.assert_array_equal(np.rint(levels * (255 / 16)), images[..., 0])
  return levels, np.array([e['label'] for e in examples])


def in_order(images, labels):
  rows = np.column_stack([images.reshape(len(images), -1), labels])
  return rows[np.lexsort(rows.T)]


def test_splits_hold_every_fifth_image_and_the_rest(digits_dir, original):
  images, labels = original
  is_test = np.arange(len(labels)) % 5 == 0
  for split, chosen, size in ('test', is_test, 360), ('train', ~is_test, 1437):
    got_images, got_labels = read(split, digits_dir)
    assert len(got_labels) == size
    np.testing.assert_array_equal(
      in_order(got_images, got_labels),
      in_order(images[chosen], labels[chosen]),
    )


def test_order_is_the_same_on_every_machine(digits_dir, original):
  # Seeded runs depend on it. If it changes on purpose, raise Digits.VERSION
  # and write down the new labels.
  images, labels = original
  got_images, got_labels = read('train[:12]', digits_dir)
  assert got_labels.tolist() == [4, 2, 7, 6, 0, 0, 0, 8, 0, 6, 4, 2]
  indices = [
    np.flatnonzero((images == image).all((1, 2))).tolist()
    for image in got_images
  ]
  assert all(len(found) == 1 for found in indices)
  assert [labels[i] for [i] in indices] == got_labels.tolist()
  assert indices != sorted(indices)
