"""Orders are permutations, fixed by the seed, without a table for many."""

import itertools

import numpy as np
import pytest

from nfnets_jax.data import shuffle

LARGE = 300_000_000


def first(count, *args):
  order = shuffle.permutation(*args)
  return np.array([order[i] for i in range(count)])


@pytest.mark.parametrize('size', [*range(1, 30), 255, 256, 257, 1009, 2**12])
def test_every_index_once(size):
  order = shuffle.HashPermutation(size, b'key')
  assert sorted(order[i] for i in range(size)) == list(range(size))
  for index in (-1, size):
    with pytest.raises(IndexError, match=f'{index} is not in'):
      order[index]


def test_orders_are_frozen():
  """Runs resume only if they stay; a change needs a line in the changelog."""
  assert first(6, 10, 3, 2, 1).tolist() == [7, 3, 6, 9, 2, 0]
  assert first(4, LARGE, 3, 2, 1).tolist() == [
    45578519,
    190585359,
    76252292,
    22121473,
  ]


def test_small_orders_are_those_of_numpy():
  philox = np.random.Philox(key=[5, 1 + 2 * 7 + 1])
  expected = np.random.Generator(philox).permutation(np.arange(23, dtype='i4'))
  np.testing.assert_array_equal(first(23, 23, 5, 7, 1), expected)


def test_only_large_orders_have_no_table():
  assert isinstance(shuffle.permutation(1_281_167, 0, 0, 0), np.ndarray)
  large = shuffle.permutation(2**21 + 1, 0, 0, 0)
  assert isinstance(large, shuffle.HashPermutation)


# The third is near a power of two, where few rounds of a block cipher show.
@pytest.mark.parametrize('size', [2**21 + 3, LARGE, 2**28 - 5])
def test_large_orders_are_random(size):
  """Chi-square of 199 degrees of freedom: above 293 once in 50,000 times."""
  seeds = (0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)
  orders = [first(4000, size, *seed) for seed in seeds]
  found = [*orders]
  found += [(x - y) % size for x, y in itertools.combinations(orders, 2)]
  for lag in (1, 2, 16):
    found += [(x[lag:] - x[:-lag]) % size for x in orders[:2]]
  for values in found:
    for bins in values * 200 // size, values % 200:
      counts = np.bincount(bins, minlength=200)
      expected = values.size / 200
      assert np.sum((counts - expected) ** 2 / expected) < 293
