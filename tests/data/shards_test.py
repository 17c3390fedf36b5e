"""ArrayRecord files are read as TFDS reads them, a few open at a time."""

import concurrent.futures
import json
import os
import pathlib
import pickle
import resource
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source
from tensorflow_datasets.core import file_adapters

from nfnets_jax.data import datasets, loader, reader, shards, splits

LENGTHS = [7, 0, 12, 1, 12, 9]


def reshard(digits_dir, data_dir, lengths):
  """Distributes the first training examples of `digits` over several files."""
  folder = data_dir / 'digits' / '1.0.0'
  shutil.copytree(digits_dir / 'digits' / '1.0.0', folder)
  (path,) = folder.glob('digits-train.*')
  source = array_record_data_source.ArrayRecordDataSource([str(path)])
  records = [source[i] for i in range(sum(lengths))]
  path.unlink()
  done = 0
  for i, length in enumerate(lengths):
    if length:  # TFDS does not write empty files
      file_adapters.ArrayRecordFileAdapter.write_examples(
        folder / f'digits-train.array_record-{i:05d}-of-{len(lengths):05d}',
        enumerate(records[done : done + length]),
      )
    done += length
  describe(folder, lengths)
  return folder


def describe(folder, lengths):
  path = folder / 'dataset_info.json'
  info = json.loads(path.read_text())
  (train,) = (x for x in info['splits'] if x['name'] == 'train')
  train['shardLengths'] = list(map(str, lengths))
  path.write_text(json.dumps(info))


@pytest.fixture
def folder(digits_dir, tmp_path):
  return reshard(digits_dir, tmp_path, LENGTHS)


def open_files(folder):
  links = pathlib.Path('/proc/self/fd').iterdir()
  return sum(os.path.realpath(x).startswith(f'{folder}/') for x in links)


def read_all(source):
  return [source[i] for i in range(len(source))]


@pytest.mark.parametrize(
  'split', ['train', 'train[5:8]', 'train[-3:]+test[:2]+train[19:20]']
)
def test_examples_are_those_of_tfds(split, folder):
  builder = tfds.builder('digits', data_dir=folder.parents[1])
  decoders = {'image': tfds.decode.SkipDecoding()}
  expected = read_all(builder.as_data_source(split=split, decoders=decoders))
  sizes = {x.name: x.num_examples for x in builder.info.splits.values()}
  parts = splits.ranges(split, sizes)
  source = shards.Examples(builder.info, parts, decoders)
  assert len(source) == len(expected)
  assert source.files == [
    x.filename for x in builder.info.splits[split].file_instructions
  ]
  np.testing.assert_equal(read_all(source), expected)
  copy = pickle.loads(pickle.dumps(source))
  np.testing.assert_equal(read_all(copy), expected)
  for index in (-1, len(source)):
    with pytest.raises(IndexError, match=f'{index} is not in'):
      source[index]


def test_open_files_are_bounded_by_memory(folder, monkeypatch):
  source = datasets.load('digits', 'train', folder.parents[1]).source
  expected = read_all(source)
  assert open_files(folder) == 5
  del source
  monkeypatch.setattr(shards, '_max_bytes', 40_000)  # two files
  source = datasets.load('digits', 'train', folder.parents[1]).source
  order = np.random.default_rng(0).permutation(len(source)).tolist() * 5
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    found = list(pool.map(source.__getitem__, order))
  np.testing.assert_equal(found, [expected[i] for i in order])
  assert open_files(folder) == 2


def test_more_files_than_a_process_may_open(folder):
  data_dir, count = folder.parents[1], 300
  first = folder / 'digits-train.array_record-00000-of-00006'
  expected = datasets.load('digits', 'train[:7]', data_dir).source
  expected = [x['label'] for x in read_all(expected)]
  for i in range(count):
    name = f'digits-train.array_record-{i:05d}-of-{count:05d}'
    (folder / name).hardlink_to(first)
  describe(folder, [7] * count)
  before = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
  try:
    source = datasets.load('digits', 'train', data_dir).source
    labels = [x['label'] for x in read_all(source)]
    assert open_files(folder) == 100
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
  assert labels == expected * count


def test_a_file_that_is_gone_is_no_corrupt_example(folder):
  dataset = datasets.load('digits', 'train', folder.parents[1])
  (folder / 'digits-train.array_record-00002-of-00006').unlink()
  with pytest.raises(FileNotFoundError, match='00002-of-00006'):
    reader.read_next(dataset, 7, dict, skip_corrupt=True)


def test_a_file_that_is_corrupt_is_named(folder):
  dataset = datasets.load('digits', 'train', folder.parents[1])
  path = folder / 'digits-train.array_record-00002-of-00006'
  path.write_bytes(path.read_bytes()[:-1000])
  with pytest.raises(reader.CorruptExampleError, match='example 7 of digits'):
    reader.read_example(dataset, 7, dict)


@pytest.mark.thorough
def test_workers_have_their_part_of_the_memory(folder):
  dataset = datasets.load('digits', 'train', folder.parents[1])
  batches = loader.train_batches(
    dataset,
    batch_size=2,
    transform=limits,
    seed=0,
    num_workers=2,
    worker_type='processes',
  )
  limit, files = next(batches)['limits'][0]
  batches.close()
  assert limit == shards._HOST_BYTES // 2
  assert files == resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def limits(examples, *others):
  del others
  files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
  return {'limits': np.array([[shards._max_bytes, files]] * len(examples))}
