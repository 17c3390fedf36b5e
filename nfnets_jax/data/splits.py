"""Reads TFDS' notation for parts of a data set: `train[:90%]+test`.

A name may have any characters but `+` and `[`, and no blanks at its ends, where
TFDS's own have letters, digits, `_` and `-` only.
"""

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
  # Names that TFDS reads, in place of those that it may not.
  known = {f'split{i}': name for i, name in enumerate(sizes)}
  aliases = {name: alias for alias, name in known.items()}
  infos = {
    alias: tfds.core.SplitInfo(
      name=alias, shard_lengths=[sizes[name]], num_bytes=0
    )
    for alias, name in known.items()
  }
  spec = []
  for part in split.split('+'):
    name, bracket, numbers = part.partition('[')
    if name.strip() not in (*sizes, 'all'):
      raise ValueError(
        f'there is no split {name.strip()!r}; splits: {", ".join(sizes)}'
      )
    name = aliases.get(name.strip(), 'all')
    spec.append(name + bracket + numbers.strip())
  try:
    instruction = tfds.core.ReadInstruction.from_spec('+'.join(spec))
    absolute = instruction.to_absolute(infos)
  except (AssertionError, NotImplementedError, ValueError) as error:
    reason = str(error)
    for alias, name in reversed(known.items()):
      reason = reason.replace(alias, name)
    raise ValueError(f'split {split!r}: {reason}') from error
  parts = []
  for part in absolute:
    name = known[part.splitname]
    parts.append((name, range(sizes[name])[part.from_ : part.to]))
  if not any(numbers for _, numbers in parts):
    raise ValueError(f'split {split!r} has no examples; sizes: {dict(sizes)}')
  return parts
