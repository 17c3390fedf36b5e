"""Shuffles, transforms and batches a data set, for one process of several.

Training is an endless stream of examples, a function of the seed alone: epoch
after epoch, each in another order and with other crops. The stream is cut into
global batches, each batch into one block per process, in order. So the number
of processes changes neither which examples are in a batch nor how they are
cropped, and as the place in the stream is one number, a run resumes exactly.

Threads make the examples of a batch side by side, up to two batches ahead of
the one in use. Decoding and resizing happen outside Python's lock, so that they
share the cores well.
"""

import os
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from nfnets_jax.data import datasets

Batch = dict[str, np.ndarray]


def train_batches(
  dataset: datasets.Dataset,
  *,
  batch_size: int,
  transform: Callable[[Any, np.random.Generator], dict[str, Any]],
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int | None = None,
) -> grain.DatasetIterator[Batch]:
  """Returns the endless stream of this process's training batches.

  Every epoch is a new permutation of the examples. Where an epoch does not
  fill its last batch, the next epoch does: no example is left out.

  Args:
    dataset: the examples.
    batch_size: the size of the global batch, over all processes.
    transform: maps an example and a generator to a dict of arrays of fixed
      shape; see `transforms.train_transform`.
    seed: determines the order and the transforms, in [0, 2^32).
    process_index: which process this is.
    process_count: how many processes there are.
    num_threads: how many examples to make at a time. By default as many as
      this process may use cores.

  Returns:
    An iterator of `{'image': uint8 [b, px, px, 3], 'label': int32 [b]}` with
    b = batch_size / process_count. `get_state()` is a small dict, from which
    `set_state()` goes on where the other left off.

  Raises:
    ValueError: if the processes cannot share the batch, or there is no
      example. The iterator raises it if it cannot read an example.

  Example:
    >>> from nfnets_jax.data import transforms
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
  """
  block_size = _block_size(dataset, batch_size, process_index, process_count)

  def read(index: int, rng: np.random.Generator) -> dict[str, Any]:
    return _read(dataset, index, lambda example: transform(example, rng))

  # The elements are indices until `read`, so that its errors can name one.
  stream = (
    grain.MapDataset.range(len(dataset))
    .seed(seed)
    .shuffle()
    .repeat()
    .random_map(read)
  )
  return _batches(stream, batch_size, block_size, process_index, num_threads)


def eval_batches(
  dataset: datasets.Dataset,
  *,
  batch_size: int,
  transform: Callable[[Any], dict[str, Any]],
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int | None = None,
) -> grain.DatasetIterator[Batch]:
  """Returns this process's share of one pass over the data set, in order.

  All batches are full, and all processes get equally many: the last global
  batch is filled up with examples from the start, of which the mask is 0.

  Args:
    dataset: the examples.
    batch_size: the size of the global batch, over all processes.
    transform: maps an example to a dict of arrays of fixed shape; see
      `transforms.eval_transform`.
    process_index: which process this is.
    process_count: how many processes there are.
    num_threads: as in `train_batches`.

  Returns:
    An iterator of `{'image': uint8 [b, px, px, 3], 'label': int32 [b],
    'mask': float32 [b]}` with b = batch_size / process_count. Over all
    batches and processes the mask sums to the number of examples.

  Raises:
    ValueError: as in `train_batches`.

  Example:
    >>> from nfnets_jax.data import transforms
    >>> batches = eval_batches(
    ...   datasets.load('fake', split='validation[:3]'),
    ...   batch_size=2,
    ...   transform=transforms.eval_transform(image_size=32),
    ... )
    >>> [batch['mask'].tolist() for batch in batches]
    [[1.0, 1.0], [1.0, 0.0]]
  """
  block_size = _block_size(dataset, batch_size, process_index, process_count)
  num_examples = len(dataset)
  num_batches = -(-num_examples // batch_size)

  def read(index: int) -> dict[str, Any]:
    example = _read(dataset, index % num_examples, transform)
    return {**example, 'mask': np.float32(index < num_examples)}

  stream = grain.MapDataset.range(num_batches * batch_size).map(read)
  return _batches(stream, batch_size, block_size, process_index, num_threads)


def _block_size(
  dataset: datasets.Dataset,
  batch_size: int,
  process_index: int,
  process_count: int,
) -> int:
  """Returns how much of each batch a process reads, or says why it cannot."""
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


def _read(
  dataset: datasets.Dataset,
  index: int,
  transform: Callable[[Any], dict[str, Any]],
) -> dict[str, Any]:
  try:
    return transform(dataset.source[index])
  except Exception as error:
    raise ValueError(
      f'cannot read example {index} of {dataset.name} split {dataset.split}: '
      f'{error}'
    ) from error


def _batches(
  stream: grain.MapDataset[dict[str, Any]],
  batch_size: int,
  block_size: int,
  process_index: int,
  num_threads: int | None,
) -> grain.DatasetIterator[Batch]:
  """Cuts a stream into global batches and yields this process's blocks."""

  def place(index: int) -> int:
    batch, offset = divmod(index, block_size)
    return batch * batch_size + process_index * block_size + offset

  processes = batch_size // block_size
  mine = grain.MapDataset.range(len(stream) // processes).map(
    lambda index: stream[place(index)]
  )
  if num_threads is None:
    num_threads = len(os.sched_getaffinity(0))
  options = grain.ReadOptions(
    num_threads=num_threads,
    prefetch_buffer_size=max(2 * block_size, num_threads),
  )
  return iter(mine.to_iter_dataset(options).batch(block_size))
