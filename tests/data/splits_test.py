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


@pytest.mark.parametrize('name', ['my test', 'val.2', 'split0', 'a:b', 'é'])
def test_names_that_tfds_does_not_take(name):
  sizes = {'train': 10, name: 4}
  assert splits.ranges(f'{name}[25%:]+train[:2]', sizes) == [
    (name, range(1, 4)),
    ('train', range(2)),
  ]
  with pytest.raises(
    ValueError, match=f'no split .other.; splits: train, {name}'
  ):
    splits.ranges(f'{name}+other', sizes)


@pytest.mark.parametrize('bad', ['[x:]', '[1', '[:200%]', '[:3mb]', '[9:]'])
def test_errors_name_the_split(bad):
  sizes = {'train': 10, 'my test': 4}
  with pytest.raises(ValueError, match='my test') as caught:
    splits.ranges(f'my test{bad}', sizes)
  assert 'split1' not in str(caught.value)
