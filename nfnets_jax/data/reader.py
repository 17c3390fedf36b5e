"""Reads single examples; names or skips the corrupt ones."""

from collections.abc import Callable
from typing import Any

from absl import logging

from nfnets_jax.data import datasets

# Give up after this many consecutive corrupt examples.
_MAX_SKIPPED = 10


class CorruptExampleError(ValueError):
  """An example cannot be decoded; the message names it."""


def read_example(
  dataset: datasets.Dataset,
  index: int,
  transform: Callable[[Any], dict[str, Any]],
) -> dict[str, Any]:
  """Reads and transforms one example.

  Raises:
    CorruptExampleError: if it cannot be decoded; the message has the data set,
      the split, the index and, if known, the file.
    datasets.LabelError: if its label is out of range.
    OSError: if it cannot be read at all, such as when a disk fails.
  """
  description = f'example {index} of {dataset.name} split {dataset.split}'
  try:
    example = dataset.source[index]
    if (name := datasets.file_name(example)) is not None:
      description += f' ({name})'
    datasets.check_label(dataset, index, example)
    return transform(example)
  # Errors of the data set or the machine, not of one example.
  except (datasets.LabelError, MemoryError, OSError):
    raise
  except Exception as error:
    raise CorruptExampleError(
      f'cannot read {description}: {error}; set skip_corrupt to skip such '
      'examples'
    ) from error


def read_next(
  dataset: datasets.Dataset,
  index: int,
  transform: Callable[[Any], dict[str, Any]],
  skip_corrupt: bool,
) -> tuple[dict[str, Any], int]:
  """Reads the first readable example from `index` on; counts the skipped.

  Raises a CorruptExampleError at the first corrupt one unless `skip_corrupt`,
  and else a ValueError after ten in a row.
  """
  skipped = 0
  while True:
    try:
      candidate = (index + skipped) % len(dataset)
      return read_example(dataset, candidate, transform), skipped
    except CorruptExampleError as error:
      if not skip_corrupt:
        raise
      skipped += 1
      if skipped == min(_MAX_SKIPPED, len(dataset)):
        raise ValueError(
          f'{skipped} consecutive examples are corrupt, too many to skip: '
          f'{error}'
        ) from error
      logging.warning('skipped: %s', str(error).rpartition(';')[0])
