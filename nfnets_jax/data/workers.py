"""Builds a stream of batches in parallel, from any position.

Workers (threads or processes) build a batch in parallel, in chunks of a few
examples, up to two batches ahead. Most of the work releases the GIL, but not
all: threads suit a few cores and need no start-up time or copies; many cores
need processes.
"""

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import grain
import numpy as np
from absl import flags, logging

from nfnets_jax.data import shards

Batch = dict[str, np.ndarray]
WorkerType = Literal['threads', 'processes']

WORKER_TYPES = ('threads', 'processes')

_SHARED_MEMORY = '/dev/shm'
# With more threads, contention for the GIL dominates.
_MAX_THREADS = 6


class Batches(Iterator[Batch]):
  """An iterator over batches that can be saved and restored.

  The position is independent of the number and type of workers.
  """

  def __init__(
    self, start: Callable[[int], grain.DatasetIterator[Batch]], batch_size: int
  ):
    """Starts at batch 0; `start` returns an iterator from a batch index on."""
    self._start = start
    self._batch_size = batch_size
    self._next_batch = 0
    self._iterator: grain.DatasetIterator[Batch] | None = None
    self._closed = False

  def __next__(self) -> Batch:
    if self._closed:
      raise ValueError('these batches are closed')
    if self._iterator is None:
      self._iterator = self._start(self._next_batch)
    try:
      batch = next(self._iterator)
    except StopIteration:
      self._stop()  # stop the workers at the end of an evaluation
      raise
    self._next_batch += 1
    return batch

  def get_state(self) -> dict[str, int]:
    """Returns the position in the stream, in examples over all processes."""
    return {'next_index': self._next_batch * self._batch_size}

  def set_state(self, state: dict[str, int]) -> None:
    """Restores a position of `get_state`, perhaps of other processes.

    Raises:
      ValueError: if no batch starts there, as with another batch size.
    """
    batch, rest = divmod(state['next_index'], self._batch_size)
    if rest:
      raise ValueError(
        f'no batch of {self._batch_size} examples starts at example '
        f'{state["next_index"]}; resume with the previous batch size'
      )
    self._stop()
    self._next_batch = batch

  def close(self) -> None:
    """Stops the workers."""
    self._stop()
    self._closed = True

  def _stop(self) -> None:
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None


def batches(
  make_chunk: Callable[[range], Batch],
  stream_size: int,
  batch_size: int,
  block_size: int,
  max_chunk: int,
  process_index: int,
  num_workers: int | None,
  worker_type: WorkerType | None,
) -> Batches:
  """Splits a stream into global batches and yields this process's blocks."""
  if num_workers is None:
    num_workers = len(os.sched_getaffinity(0))
  # A chunk divides a block, and each worker gets at least one.
  chunk_size = max(
    size
    for size in range(1, max_chunk + 1)
    if size == 1
    or (block_size % size == 0 and size * num_workers <= block_size)
  )
  chunks_per_block = block_size // chunk_size
  num_chunks = stream_size // batch_size * chunks_per_block

  def read_chunk(chunk: int) -> Batch:
    batch, offset = divmod(chunk * chunk_size, block_size)
    first = batch * batch_size + process_index * block_size + offset
    return make_chunk(range(first, first + chunk_size))

  def takes_processes(first: int, ahead: int) -> bool:
    if worker_type is None and num_workers <= _MAX_THREADS:
      return False
    if worker_type == 'threads' or first >= stream_size:
      return False
    # Processes return batches in shared memory; containers have little.
    example = make_chunk(range(first, first + 1))
    need = ahead * chunk_size * sum(x.nbytes for x in example.values())
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if need <= free:
      return True
    lack = (
      f'{num_workers} processes need {need >> 20} MiB of shared memory for '
      f'batches, and {_SHARED_MEMORY} has {free >> 20} MiB'
    )
    if worker_type == 'processes':
      raise ValueError(
        f'{lack}; give the container more (docker run --shm-size), or set '
        "worker_type to 'threads'"
      )
    logging.warning('%s; using threads instead', lack)
    return False

  def start(batch: int) -> grain.DatasetIterator[Batch]:
    chunks = grain.MapDataset.range(batch * chunks_per_block, num_chunks).map(
      read_chunk
    )
    ahead = max(2 * chunks_per_block, num_workers)
    if num_workers and takes_processes(batch * batch_size, ahead):
      # Grain reads absl flags when it starts processes, which fails in a script
      # or notebook that has not parsed any.
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
      # One thread per process, without read-ahead.
      made = chunks.to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
      ).mp_prefetch(
        grain.MultiprocessingOptions(
          num_workers=num_workers,
          per_worker_buffer_size=-(-ahead // num_workers),
        ),
        worker_init_fn=_begin_worker,
      )
    else:
      made = chunks.to_iter_dataset(
        grain.ReadOptions(
          num_threads=num_workers,
          prefetch_buffer_size=ahead if num_workers else 0,
        )
      )
    return iter(made.batch(chunks_per_block, batch_fn=concatenate))

  return Batches(start, batch_size)


def _begin_worker(index: int, count: int) -> None:
  """Sets limits, and makes a worker process exit with its parent only."""
  del index
  shards.begin_worker(count)
  # Terminals and schedulers signal the whole group; the parent decides.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  end_with_parent()


def end_with_parent() -> None:
  """Makes this process, a child of `multiprocessing`, exit with its parent."""
  parent = multiprocessing.parent_process()
  assert parent is not None

  def wait() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()


def concatenate(chunks: Sequence[Batch]) -> Batch:
  """Concatenates the arrays of batches along the first axis."""
  return {k: np.concatenate([c[k] for c in chunks]) for k in chunks[0]}
