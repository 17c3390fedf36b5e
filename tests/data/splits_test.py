"""The notation of splits means here what it means to TFDS."""

import pytest
import tensorflow_datasets as tfds

from nfnets_jax.data import splits


@pytest.mark.parametrize(
  'split',
  ['train', 'train[100:]', 'train[:33%]', 'train[-5:]+test', 'test[1:2]+train'],
)
def test_ranges_are_those_of_tfds(split, digits_dir):
  info = tfds.builder('digits', data_dir=digits_dir).info
  sizes = {name: info.splits[name].num_examples for name in info.splits}
  parts = splits.ranges(split, sizes)
  assert [name for name, _ in parts] == splits.names(split)
  total = sum(len(numbers) for _, numbers in parts)
  assert total == info.splits[split].num_examples


@pytest.mark.parametrize('split', ['', 'train[', 'test', 'train[3:3]'])
def test_bad_splits_are_refused(split):
  with pytest.raises(ValueError, match=r'(?i)split'):
    splits.ranges(split, {'train': 10})
