"""The stream of batches: complete, the same for any processes, resumable."""

import collections
import os
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import psutil
import pytest

from nfnets_jax.data import (
  datasets,
  decode,
  loader,
  shuffle,
  transforms,
  workers,
)


class Indices:
  """Examples that are their own index."""

  def __init__(self, size, broken=()):
    self._size = size
    self._broken = broken

  def __len__(self):
    return self._size

  def __getitem__(self, index):
    if index in self._broken:
      name = f'{index}.jpg'
      return {'image': b'no image', 'label': 0, 'file_name': name}
    return {'image': np.full((4, 4, 3), index % 256, np.uint8), 'label': index}


def indices(size, **kwargs):
  names = tuple(map(str, range(size)))
  return datasets.Dataset('indices', 'train', Indices(size, **kwargs), names)


def with_noise(examples, partners, uniform, index):
  """Keeps the labels and shows what is random, and the place in the stream."""
  return {
    'label': np.array([x['label'] for x in examples], np.int32),
    'partner': np.array([x['label'] for x in partners], np.int32),
    'noise': uniform[:, :2],
    'last': uniform[:, -1],
    'index': index,
  }


def label_only(example):
  return {'label': np.int32(example['label'])}


def train(dataset, batch_size, transform=with_noise, seed=0, **kwargs):
  return loader.train_batches(
    dataset, batch_size=batch_size, transform=transform, seed=seed, **kwargs
  )


def take(batches, count):
  result = [next(batches) for _ in range(count)]
  batches.close()
  return result


def assert_equal(left, right):
  assert len(left) == len(right)
  for mine, other in zip(left, right, strict=True):
    assert mine.keys() == other.keys()
    for key in mine:
      np.testing.assert_array_equal(mine[key], other[key], strict=True)


def test_every_epoch_visits_each_example_once_in_a_new_order():
  # 23 examples in batches of 4: epochs end within a batch.
  labels = np.concatenate([b['label'] for b in take(train(indices(23), 4), 23)])
  epochs = labels.reshape(4, 23)
  for epoch in epochs:
    assert sorted(epoch) == list(range(23))
  assert len({epoch.tobytes() for epoch in epochs}) == 4
  assert not any(np.array_equal(epoch, np.arange(23)) for epoch in epochs)


def test_every_epoch_has_each_example_once_as_a_partner():
  batches = take(train(indices(23), 4, partners=True), 23)
  labels, partners = (
    np.concatenate([b[name] for b in batches]).reshape(4, 23)
    for name in ('label', 'partner')
  )
  for epoch in partners:
    assert sorted(epoch) == list(range(23))
  assert len({epoch.tobytes() for epoch in (*labels, *partners)}) == 8
  # The orders are independent: one example in 23 meets itself.
  assert (labels == partners).mean() < 0.2
  alone = take(train(indices(23), 4), 23)
  for batch, other in zip(batches, alone, strict=True):
    np.testing.assert_array_equal(batch['label'], other['label'])
    np.testing.assert_array_equal(batch['noise'], other['noise'])
    np.testing.assert_array_equal(other['partner'], other['label'])


def test_random_numbers_are_uniform_and_each_images_own():
  uniform = loader._uniform(3, range(1000, 1400))
  assert uniform.shape == (400, transforms.NUM_DRAWS)
  counts, _ = np.histogram(uniform, 100, (0, 1))
  expected = uniform.size / 100
  # Chi-square with 99 degrees of freedom: above 161 once in 10,000 times.
  assert np.sum((counts - expected) ** 2 / expected) < 161
  assert np.unique(uniform).size == uniform.size
  for i in (0, 1, 399):
    one = loader._uniform(3, range(1000 + i, 1001 + i))
    np.testing.assert_array_equal(one, uniform[i : i + 1])
  other = loader._uniform(4, range(1000, 1400))
  assert not np.intersect1d(uniform, other).size


def test_images_are_numbered_through_all_epochs():
  batches = take(train(indices(5), 4), 4)
  index = np.concatenate([b['index'] for b in batches])
  np.testing.assert_array_equal(index, np.arange(16))


MIXED = {'mixup_alpha': 0.2, 'cutmix': True, 'rand_augment': '2x5'}


@pytest.mark.parametrize('num_workers', [0, 1, 3])
@pytest.mark.parametrize('process_count', [1, 2])
def test_data_in_memory_give_the_same_images(num_workers, process_count):
  """One by one and in whole chunks, in any share."""
  transform = transforms.train_transform(4, 'pad_1', **MIXED)
  kwargs = {'transform': transform, 'partners': True}
  dataset = indices(50)
  one_by_one = take(train(dataset, 24, num_workers=0, **kwargs), 5)
  parts = [
    take(
      train(
        datasets.keep_in_memory(dataset),
        24,
        num_workers=num_workers,
        process_index=index,
        process_count=process_count,
        **kwargs,
      ),
      5,
    )
    for index in range(process_count)
  ]
  together = [
    {key: np.concatenate([p[key] for p in blocks]) for key in blocks[0]}
    for blocks in zip(*parts, strict=True)
  ]
  assert_equal(together, one_by_one)
  assert {0 < x < 1 for b in together for x in b['ratio']} == {True, False}


def test_an_example_is_transformed_anew_every_epoch():
  batches = take(train(indices(5), 5), 40)
  noise = collections.defaultdict(set)
  for batch in batches:
    for label, value in zip(batch['label'], batch['noise'], strict=True):
      noise[int(label)].add(value.tobytes())
  assert all(len(values) == 40 for values in noise.values())
  assert len(set.union(*noise.values())) == 200


@pytest.mark.parametrize('process_count', [2, 4])
def test_processes_share_each_global_batch_in_order(process_count):
  alone = take(train(indices(23), 8), 9)
  parts = [
    take(
      train(indices(23), 8, process_index=index, process_count=process_count),
      9,
    )
    for index in range(process_count)
  ]
  together = [
    {key: np.concatenate([p[key] for p in blocks]) for key in blocks[0]}
    for blocks in zip(*parts, strict=True)
  ]
  assert_equal(together, alone)


WORKERS = [
  pytest.param({'num_workers': 0}, id='none'),
  pytest.param({'num_workers': 1}, id='thread'),
  pytest.param({'num_workers': 4}, id='threads'),
  pytest.param({'num_workers': 1, 'worker_type': 'processes'}, id='process'),
  pytest.param(
    {'num_workers': 3, 'worker_type': 'processes'},
    id='processes',
    marks=pytest.mark.slow,
  ),
]


@pytest.mark.thorough
@pytest.mark.parametrize('workers', WORKERS)
def test_resuming_equals_going_straight_through(workers):
  straight = take(train(indices(23), 4, num_workers=2), 15)
  first = train(indices(23), 4, **workers)
  head = [next(first) for _ in range(8)]  # in the middle of the second epoch
  state = first.get_state()
  next(first)  # moving on does not move the state
  first.close()
  assert state == {'next_index': 32}

  second = train(indices(23), 4, **workers)
  next(second)
  second.set_state(state)
  assert_equal(head + take(second, 7), straight)


def test_another_number_of_processes_resumes_the_same_stream():
  alone = take(train(indices(23), 8), 9)
  first = train(indices(23), 8, process_index=1, process_count=2)
  for _ in range(5):
    next(first)
  state = first.get_state()
  first.close()
  rest = train(indices(23), 8)
  rest.set_state(state)
  assert_equal(take(rest, 4), alone[5:])


def test_hundreds_of_millions_of_examples_need_no_table():
  class Many(Indices):
    def __getitem__(self, index):
      return super().__getitem__(index) | {'label': index % 1000}

  size = 300_000_001
  dataset = datasets.Dataset('many', 'train', Many(size), ('a',) * 1000)
  tracemalloc.start()
  try:
    batches = train(dataset, 4, seed=3, partners=True, num_workers=0)
    batches.set_state({'next_index': size - 1})
    (batch,) = take(batches, 1)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 2**20
  for order, name in enumerate(('label', 'partner')):
    old, new = (shuffle.permutation(size, 3, x, order) for x in (0, 1))
    expected = [old[size - 1], *(new[i] for i in range(3))]
    assert batch[name].tolist() == [x % 1000 for x in expected]


def test_a_place_within_a_batch_is_refused():
  batches = train(indices(23), 8)
  with pytest.raises(ValueError, match='no batch of 8 examples .* example 12'):
    batches.set_state({'next_index': 12})


def test_closed_batches_say_so():
  batches = train(indices(23), 8)
  batches.close()
  with pytest.raises(ValueError, match='closed'):
    next(batches)


def test_large_batches_are_made_in_chunks():
  # 96 = 2 · 48 examples of this process: chunks of 16, 12 or 8.
  for num_workers in (1, 4, 5):
    kwargs = {'process_index': 1, 'process_count': 2}
    batches = train(indices(500), 96, num_workers=num_workers, **kwargs)
    alone = train(indices(500), 96, num_workers=0, **kwargs)
    assert_equal(take(batches, 3), take(alone, 3))


@pytest.mark.thorough
def test_closing_ends_the_processes():
  before = set(psutil.Process().children(recursive=True))
  batches = train(indices(23), 4, num_workers=2, worker_type='processes')
  next(batches)
  workers = set(psutil.Process().children(recursive=True)) - before
  assert len(workers) >= 2
  batches.close()
  gone, _ = psutil.wait_procs(workers, timeout=20)
  # The last is multiprocessing's tracker of shared memory, which stays.
  assert len(workers - set(gone)) <= 1


def test_seeds_differ_and_repeat():
  def stream(seed):
    return take(train(indices(50), 10, seed=seed), 5)

  assert_equal(stream(1), stream(1))
  one, two = stream(1), stream(2)
  assert not np.array_equal(one[0]['label'], two[0]['label'])
  assert not np.intersect1d(one[0]['noise'], two[0]['noise']).size


@pytest.mark.parametrize('process_count', [1, 2, 3])
@pytest.mark.parametrize('size', [1, 12, 13, 23])
def test_evaluation_visits_each_example_once(size, process_count):
  parts = [
    list(
      loader.eval_batches(
        indices(size),
        batch_size=6,
        transform=label_only,
        process_index=index,
        process_count=process_count,
      )
    )
    for index in range(process_count)
  ]
  assert {len(part) for part in parts} == {-(-size // 6)}
  visited = []
  for blocks in zip(*parts, strict=True):
    for block in blocks:
      assert (
        block['label'].shape == block['mask'].shape == (6 // process_count,)
      )
      assert block['label'].dtype == np.int32
      assert block['mask'].dtype == np.float32
      visited.extend(block['label'][block['mask'] == 1])
  assert visited == list(range(size))
  assert sum(b['mask'].sum() for part in parts for b in part) == size


def test_batches_of_a_real_data_set(digits_dir):
  batches = loader.train_batches(
    datasets.load('digits', 'train', digits_dir),
    batch_size=16,
    transform=transforms.train_transform(12, 'pad_1'),
    seed=0,
    process_index=1,
    process_count=2,
  )
  batch = next(batches)
  batches.close()
  assert batch['image'].shape == (8, 12, 12, 3)
  assert batch['image'].dtype == np.uint8
  assert batch['image'].std() > 10
  assert batch['label'].dtype == np.int32

  test = datasets.load('digits', 'test', digits_dir)
  evaluation = loader.eval_batches(
    test, batch_size=100, transform=transforms.eval_transform(8, 'resize')
  )
  images = np.concatenate([batch['image'] for batch in evaluation])
  assert images.shape == (400, 8, 8, 3)
  for i in (0, 123, 359):
    expected = decode.decode(test.source[i]['image'])
    np.testing.assert_array_equal(images[i], expected)
  np.testing.assert_array_equal(images[360:], images[:40])


@pytest.mark.thorough
@pytest.mark.parametrize('worker_type', ['threads', 'processes'])
def test_unreadable_example_is_named(worker_type):
  kwargs = {'worker_type': worker_type, 'num_workers': 2}
  dataset = indices(20, broken=[17])
  message = (
    r'cannot read example 17 of indices split train \(17.jpg\): '
    'cannot decode an image'
  )
  transform = transforms.train_transform(4)
  with pytest.raises(ValueError, match=message):
    take(train(dataset, 5, transform=transform, **kwargs), 4)
  with pytest.raises(ValueError, match=message):
    list(
      loader.eval_batches(
        dataset,
        batch_size=5,
        transform=transforms.eval_transform(4, 'resize'),
        **kwargs,
      )
    )


def test_corrupt_examples_are_left_out_when_told_to(caplog):
  dataset = indices(20, broken=[16, 17])
  transform = transforms.train_transform(4, 'none')
  epochs = take(train(dataset, 5, transform=transform, skip_corrupt=True), 8)
  for epoch in (epochs[:4], epochs[4:]):
    labels = np.concatenate([batch['label'] for batch in epoch])
    skipped = np.concatenate([batch['skipped'] for batch in epoch])
    # 18 takes the place of both.
    assert sorted(labels) == [*range(16), 18, 18, 18, 19]
    assert skipped.tolist().count(1) == skipped.sum() == 2
    assert set(labels[skipped > 0]) == {18}
  named = [record.getMessage() for record in caplog.records]
  for index in (16, 17):
    text = f'skipped: cannot read example {index} of indices split train'
    assert sum(text in message for message in named) >= 2
  # What is left out does not depend on the workers.
  kwargs = {'transform': transform, 'skip_corrupt': True}
  assert_equal(take(train(dataset, 5, num_workers=0, **kwargs), 8), epochs)


@pytest.mark.parametrize('in_memory', [False, True])
def test_corrupt_partners_are_replaced_too(in_memory):
  dataset = indices(20, broken=[16, 17])
  if in_memory:
    dataset = datasets.keep_in_memory(dataset)
  transform = transforms.train_transform(4, 'none', cutmix=True)
  batches = take(
    train(dataset, 5, transform=transform, partners=True, skip_corrupt=True), 8
  )
  for epoch in (batches[:4], batches[4:]):
    for name in ('label', 'mix_label'):
      labels = np.concatenate([batch[name] for batch in epoch])
      assert sorted(labels) == [*range(16), 18, 18, 18, 19]
    assert sum(batch['skipped'].sum() for batch in epoch) == 4


def test_processes_without_shared_memory(monkeypatch, caplog):
  Usage = collections.namedtuple('Usage', 'total used free')
  monkeypatch.setattr(
    workers.shutil, 'disk_usage', lambda path: Usage(1 << 10, 0, 1 << 10)
  )
  transform = transforms.train_transform(32, 'none')
  kwargs = {'transform': transform, 'num_workers': 8}
  with pytest.raises(ValueError, match=r'/dev/shm has 0 MiB; .*--shm-size'):
    take(train(indices(20), 8, worker_type='processes', **kwargs), 1)
  assert_equal(
    take(train(indices(20), 8, **kwargs), 2),
    take(train(indices(20), 8, transform=transform), 2),
  )
  assert 'using threads instead' in caplog.text


def test_a_disk_that_is_gone_is_no_corrupt_example():
  class Gone(Indices):
    def __getitem__(self, index):
      raise OSError('stale file handle')

  dataset = datasets.Dataset('gone', 'train', Gone(20), ('a',))
  with pytest.raises(OSError, match='stale file handle'):
    take(train(dataset, 4, skip_corrupt=True), 1)


def test_evaluation_masks_corrupt_examples():
  batches = loader.eval_batches(
    indices(20, broken=[4, 19]),
    batch_size=6,
    transform=transforms.eval_transform(4, 'resize'),
    skip_corrupt=True,
  )
  labels = [label for b in batches for label in b['label'][b['mask'] == 1]]
  assert labels == [i for i in range(20) if i not in (4, 19)]


def test_ten_corrupt_examples_in_a_row_are_too_many():
  transform = transforms.train_transform(4)
  for size, broken, count in [(50, range(3, 50), 10), (4, range(4), 4)]:
    dataset = indices(size, broken=broken)
    batches = train(dataset, 4, transform=transform, skip_corrupt=True)
    with pytest.raises(
      ValueError, match=f'{count} consecutive examples are corrupt'
    ):
      take(batches, 20)


# A program whose loader works in processes, and that is killed.
_KILLED = """
import os, signal, psutil
from nfnets_jax.data import datasets, loader, transforms

if __name__ == '__main__':
  batches = loader.train_batches(
    datasets.load('fake', 'train[:100]'), batch_size=4, seed=0,
    transform=transforms.train_transform(8), num_workers=2,
    worker_type='processes',
  )
  next(batches)
  print(*(x.pid for x in psutil.Process().children(recursive=True)), flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.thorough
def test_workers_do_not_outlive_a_killed_program(tmp_path):
  path = tmp_path / 'killed.py'
  path.write_text(_KILLED)
  done = subprocess.run(
    [sys.executable, str(path)],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )
  assert done.returncode == -signal.SIGKILL
  pids = [int(pid) for pid in done.stdout.split()]
  assert len(pids) >= 2
  until = time.monotonic() + 20
  while any(map(psutil.pid_exists, pids)) and time.monotonic() < until:
    time.sleep(0.1)
  assert not any(map(psutil.pid_exists, pids))


@pytest.mark.thorough
def test_a_killed_worker_ends_the_stream():
  batches = train(indices(23), 4, num_workers=2, worker_type='processes')
  next(batches)
  killed = 0
  for child in psutil.Process().children(recursive=True):
    if 'resource_tracker' not in ' '.join(child.cmdline()):
      os.kill(child.pid, signal.SIGKILL)
      killed += 1
  assert killed
  with pytest.raises(Exception, match='worker|process'):
    for _ in range(50):
      next(batches)
  batches.close()


@pytest.mark.parametrize(
  ('size', 'kwargs', 'message'),
  [
    (
      5,
      {'batch_size': 10, 'process_count': 4},
      'batch_size 10 is not a positive multiple of 4 processes; the next one '
      'is 12',
    ),
    (5, {'batch_size': 0}, 'batch_size 0 .* the next one is 1'),
    (
      5,
      {'batch_size': 4, 'process_index': 2, 'process_count': 2},
      'process_index 2 is not one of 2 processes',
    ),
    (0, {'batch_size': 4}, 'indices split train has no examples'),
    (5, {'batch_size': 4, 'num_workers': -1}, 'num_workers .* got -1'),
    (
      5,
      {'batch_size': 4, 'worker_type': 'fibres'},
      "worker_type must be one of threads, processes, got 'fibres'",
    ),
  ],
)
def test_impossible_batches_are_refused(size, kwargs, message):
  with pytest.raises(ValueError, match=message):
    train(indices(size), **kwargs)
  with pytest.raises(ValueError, match=message):
    loader.eval_batches(indices(size), transform=label_only, **kwargs)


class Labels:
  """Black images with the labels that it is given."""

  def __init__(self, labels):
    self._labels = labels

  def __len__(self):
    return len(self._labels)

  def __getitem__(self, index):
    image = np.zeros((4, 4, 3), np.uint8)
    return {'image': image, 'label': self._labels[index]}


@pytest.mark.parametrize('skip_corrupt', [False, True])
@pytest.mark.parametrize(
  'bad', [-1, 3, np.int64(-2), 1.0, np.float32(0.5), np.nan, None, '1', [1]]
)
def test_labels_that_are_none_of_the_classes_are_refused(bad, skip_corrupt):
  dataset = datasets.Dataset(
    'animals', 'test[:5]', Labels([0, 1, 2, np.int64(1), bad]), tuple('abc')
  )
  message = r'animals split test\[:5\]: example 4 has the label .* 0 to 2'
  kwargs = {'batch_size': 5, 'skip_corrupt': skip_corrupt, 'num_workers': 0}
  transform = transforms.train_transform(4, 'none')
  with pytest.raises(datasets.LabelError, match=message):
    take(
      loader.train_batches(dataset, transform=transform, seed=0, **kwargs), 1
    )
  transform = transforms.eval_transform(4, 'resize')
  with pytest.raises(datasets.LabelError, match=message):
    list(loader.eval_batches(dataset, transform=transform, **kwargs))


@pytest.mark.thorough
@pytest.mark.parametrize('worker_type', ['threads', 'processes'])
def test_label_errors_come_out_of_workers(worker_type):
  dataset = datasets.Dataset('a', 'train', Labels([0, -1]), ('x',))
  with pytest.raises(ValueError, match='example 1 has the label -1, .* has -1'):
    take(train(dataset, 2, num_workers=2, worker_type=worker_type), 1)


# A script without flags, whose loader works in processes.
_SCRIPT = """
from nfnets_jax.data import datasets, loader, transforms

if __name__ == '__main__':
  options = dict(num_workers=2, worker_type='processes', batch_size=4)
  data = datasets.load('fake', 'train[:8]')
  batches = loader.train_batches(
    data, transform=transforms.train_transform(8), seed=0, **options)
  print(next(batches)['image'].shape)
  batches.close()
  print(len(list(loader.eval_batches(
    data, transform=transforms.eval_transform(8), **options))))
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
  'ahead',
  [
    '',
    'import sys; sys.argv += ["--mine=3", "-f", "kernel.json"]\n',
    'from absl import flags; flags.DEFINE_integer("mine", 1, "")\n',
  ],
)
def test_processes_in_a_script_that_parses_no_flags(ahead, tmp_path):
  path = tmp_path / 'script.py'
  path.write_text(ahead + _SCRIPT)
  done = subprocess.run(
    [sys.executable, str(path)], capture_output=True, text=True, check=False
  )
  assert done.stdout == '(4, 8, 8, 3)\n2\n', done.stderr
