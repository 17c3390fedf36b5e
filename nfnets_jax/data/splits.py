"""Reads TFDS' notation for parts of a data set: `train[:90%]+test`."""

from collections.abc import Mapping

import tensorflow_datasets as tfds


def names(split: str) -> list[str]:
  """Returns the splits that are named, each once, whether they exist or not.

  Args:
    split: in TFDS' notation.

  Returns:
    Their names, in order.

  Example:
    >>> names('train[:10%]+test+train[90%:]')
    ['train', 'test']
  """
  parts = (part.split('[')[0].strip() for part in split.split('+'))
  return list(dict.fromkeys(parts))


def ranges(split: str, sizes: Mapping[str, int]) -> list[tuple[str, range]]:
  """Returns which examples of which splits are meant.

  Args:
    split: in TFDS' notation.
    sizes: the number of examples of each split there is.

  Returns:
    For each part its split and the numbers of its examples.

  Raises:
    ValueError: if the notation is wrong, there is no such split, or nothing is
      left.

  Example:
    >>> ranges('train[:10%]+test', {'train': 200, 'test': 3})
    [('train', range(0, 20)), ('test', range(0, 3))]
  """
  infos = {
    name: tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0)
    for name, size in sizes.items()
  }
  parts = [
    (part.splitname, range(sizes[part.splitname])[part.from_ : part.to])
    for part in tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
  ]
  if not any(numbers for _, numbers in parts):
    raise ValueError(f'split {split!r} has no examples; sizes: {dict(sizes)}')
  return parts
