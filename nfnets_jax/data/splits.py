"""Parses TFDS split notation: `train[:90%]+test`.

Unlike in TFDS, where names have only letters, digits, `_` and `-`, a name may
have any characters but `+` and `[`, and no blanks at its ends.
"""

from collections.abc import Mapping

import tensorflow_datasets as tfds


def names(split: str) -> list[str]:
  """Returns the split names in order, without duplicates.

  Example:
    >>> names('train[:10%]+test+train[90%:]')
    ['train', 'test']
  """
  parts = (part.split('[')[0].strip() for part in split.split('+'))
  return list(dict.fromkeys(parts))


def ranges(split: str, sizes: Mapping[str, int]) -> list[tuple[str, range]]:
  """Returns the index ranges that a split expression selects.

  Args:
    split: in TFDS notation.
    sizes: number of examples of each existing split.

  Returns:
    For each part, the split and the range of its examples.

  Raises:
    ValueError: if the notation is invalid, a split does not exist, or nothing
      is selected.

  Example:
    >>> ranges('train[:10%]+test', {'train': 200, 'test': 3})
    [('train', range(0, 20)), ('test', range(0, 3))]
  """
  # Aliases for names that TFDS would not accept.
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
