"""Shuffles, transforms and batches a data set for one of several processes.

Training is an endless stream of images, a function of the seed alone. Each
epoch has a new order and new crops. With mixing, partners come from a second
permutation of the same epoch, so every example is once a first and once a
second image. The randomness of an image depends on the seed and its index in
the stream. The stream is split into global batches, and each batch into one
contiguous block per process. So the numbers of processes and workers affect
neither the contents of a batch nor its images, and a run resumes exactly from
one number, the index in the stream.

A corrupt example raises an error that names it. With `skip_corrupt` it is
skipped with a warning. Training uses the next readable example instead, also
for partners; evaluation sets its mask to 0. `skipped` in a training batch
counts the replacements.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nfnets_jax.data import datasets, reader, shuffle, transforms, workers

Batch = transforms.Batch
Batches = workers.Batches
Examples = transforms.Examples

# Large enough to amortise the overhead, small enough to balance the workers.
_MAX_CHUNK = 16
_MAX_CHUNK_IN_MEMORY = 64


def train_batches(
  dataset: datasets.Dataset,
  *,
  batch_size: int,
  transform: transforms.TrainTransform,
  seed: int,
  partners: bool = False,
  process_index: int = 0,
  process_count: int = 1,
  num_workers: int | None = None,
  worker_type: workers.WorkerType | None = None,
  skip_corrupt: bool = False,
) -> Batches:
  """Returns the endless stream of this process's training batches.

  Every epoch is a new permutation of the examples. The last batch of an epoch
  is filled from the next one, so no example is dropped.

  Args:
    dataset: the examples.
    batch_size: global batch size, over all processes.
    transform: maps n decoded examples, their n partners, `[n,
      transforms.NUM_DRAWS]` numbers, uniform in [0, 1), and `[n]` stream
      indices to a dict of arrays `[n, ...]`; see `transforms.train_transform`.
      An image must not depend on n, which is above 1 for data in memory.
    seed: of the order and the transforms, in [0, 2^32).
    partners: whether each example gets a partner; else it is its own.
    process_index: index of this process.
    process_count: number of processes.
    num_workers: number of parallel workers, by default the number of available
      cores; 0 builds batches synchronously.
    worker_type: `'threads'` or `'processes'`. By default threads for up to six
      workers, or if shared memory is too small for processes. Processes are
      spawned, so a script must guard its entry point with
      `if __name__ == '__main__'`.
    skip_corrupt: whether to skip corrupt examples; see above.

  Returns:
    An iterator over outputs of the transform, `[b, ...]` with b = batch_size /
    process_count. With `skip_corrupt` also `'skipped': int32 [b]`, how many of
    the one or two examples of an image replace a corrupt one. `get_state()`
    returns a small dict from which `set_state()` resumes.

  Raises:
    ValueError: if batch_size is not divisible by the processes, the data set is
      empty, or the worker arguments are invalid. The iterator raises it at a
      corrupt example (with `skip_corrupt`, at ten in a row) and at a label out
      of range.

  Example:
    >>> batches = train_batches(
    ...   datasets.load('fake', split='train[:10]'),
    ...   batch_size=4,
    ...   transform=transforms.train_transform(image_size=32),
    ...   seed=0,
    ... )
    >>> batch = next(batches)
    >>> batch['image'].shape, batch['label'].dtype
    ((4, 32, 32, 3), dtype('int32'))
    >>> batches.get_state()
    {'next_index': 4}
    >>> batches.close()
  """
  block_size = _block_size(dataset, batch_size, process_index, process_count)
  check_workers(num_workers, worker_type)
  size = len(dataset)

  # Examples in memory with their skip counts, checked only once.
  kept: dict[int, tuple[dict[str, Any], int]] = {}

  def read(index: int) -> tuple[dict[str, Any], int]:
    if index in kept:
      return kept[index]
    decode = transforms.decode_example
    result = reader.read_next(dataset, index, decode, skip_corrupt)
    if dataset.in_memory:
      kept[index] = result
    return result

  def read_all(indices: range, order: int) -> tuple[Examples, Sequence[int]]:
    shuffled = (
      int(shuffle.permutation(size, seed, i // size, order)[i % size])
      for i in indices
    )
    examples, skipped = zip(*map(read, shuffled), strict=True)
    return examples, skipped

  def make(indices: range) -> Batch:
    first, skipped = read_all(indices, order=0)
    second, replaced = first, skipped
    if partners:
      second, replaced = read_all(indices, order=1)
    batch = transform(
      first, second, _uniform(seed, indices), np.asarray(indices)
    )
    if skip_corrupt:
      photographs = [skipped, replaced] if partners else [skipped]
      counts = np.minimum(photographs, 1).sum(axis=0)
      batch['skipped'] = counts.astype(np.int32)
    return batch

  def make_chunk(indices: range) -> Batch:
    # Large images one at a time, to stay within the caches.
    if dataset.in_memory:
      return make(indices)
    return workers.concatenate([make(range(i, i + 1)) for i in indices])

  return workers.batches(
    make_chunk,
    sys.maxsize,
    batch_size,
    block_size,
    _MAX_CHUNK_IN_MEMORY if dataset.in_memory else _MAX_CHUNK,
    process_index,
    num_workers,
    worker_type,
  )


def _uniform(seed: int, indices: range) -> np.ndarray:
  """Returns `[n, NUM_DRAWS]` numbers in [0, 1) for consecutive images."""
  # Counter-based: each image owns a segment of one stream.
  philox = np.random.Philox(
    key=seed, counter=indices.start * transforms.NUM_DRAWS // 4
  )
  return np.random.Generator(philox).random(
    (len(indices), transforms.NUM_DRAWS)
  )


def eval_batches(
  dataset: datasets.Dataset,
  *,
  batch_size: int,
  transform: Callable[[Any], dict[str, Any]],
  process_index: int = 0,
  process_count: int = 1,
  num_workers: int | None = None,
  worker_type: workers.WorkerType | None = None,
  skip_corrupt: bool = False,
) -> Batches:
  """Returns this process's batches of one pass over the data set, in order.

  All batches are full, and all processes get the same number: the last global
  batch is padded with examples from the start, with mask 0. The arguments are
  those of `train_batches`, but `transform` maps one example to a dict of arrays
  of fixed shape; see `transforms.eval_transform`.

  Returns:
    An iterator over `{'image': uint8 [b, px, px, 3], 'label': int32 [b],
    'mask': float32 [b]}` with b = batch_size / process_count. The mask sums to
    the number of readable examples over all batches and processes. With label
    sets also `'label_set': int32 [b, n]`, and mask 0 for an empty set; see
    `labels.with_label_sets`.

  Raises:
    ValueError: as in `train_batches`.

  Example:
    >>> batches = eval_batches(
    ...   datasets.load('fake', split='validation[:3]'),
    ...   batch_size=2,
    ...   transform=transforms.eval_transform(image_size=32),
    ... )
    >>> [batch['mask'].tolist() for batch in batches]
    [[1.0, 1.0], [1.0, 0.0]]
  """
  block_size = _block_size(dataset, batch_size, process_index, process_count)
  check_workers(num_workers, worker_type)
  num_examples = len(dataset)
  num_batches = -(-num_examples // batch_size)

  def read(index: int) -> dict[str, Any]:
    example, skipped = reader.read_next(
      dataset, index % num_examples, transform, skip_corrupt
    )
    counts = index < num_examples and not skipped
    if 'label_set' in example:
      counts = counts and bool(np.any(example['label_set'] >= 0))
    return {**example, 'mask': np.float32(counts)}

  def make_chunk(indices: range) -> Batch:
    examples = [read(i) for i in indices]
    return {k: np.stack([x[k] for x in examples]) for k in examples[0]}

  return workers.batches(
    make_chunk,
    num_batches * batch_size,
    batch_size,
    block_size,
    _MAX_CHUNK,
    process_index,
    num_workers,
    worker_type,
  )


def _block_size(
  dataset: datasets.Dataset,
  batch_size: int,
  process_index: int,
  process_count: int,
) -> int:
  """Returns the batch size per process, after checks."""
  if not len(dataset):
    raise ValueError(f'{dataset.name} split {dataset.split} has no examples')
  if not 0 <= process_index < process_count:
    raise ValueError(
      f'process_index {process_index} is not one of {process_count} processes'
    )
  if batch_size <= 0 or batch_size % process_count:
    raise ValueError(
      f'batch_size {batch_size} is not a positive multiple of '
      f'{process_count} processes; the next one is '
      f'{max(1, -(-batch_size // process_count)) * process_count}'
    )
  return batch_size // process_count


def check_workers(num_workers: int | None, worker_type: str | None) -> None:
  """Raises a ValueError for invalid worker arguments."""
  if num_workers is not None and num_workers < 0:
    raise ValueError(f'num_workers must be 0 or more, got {num_workers}')
  if worker_type not in (None, *workers.WORKER_TYPES):
    raise ValueError(
      f'worker_type must be one of {", ".join(workers.WORKER_TYPES)}, got '
      f'{worker_type!r}'
    )
