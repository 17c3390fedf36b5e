"""Prepares a data set: downloads it and writes it as ArrayRecord files.

    python -m nfnets_jax.data.prepare digits [--data_dir=DIR]

Any data set for image classification in the TFDS catalogue will do,
https://www.tensorflow.org/datasets/catalog/overview. ArrayRecord is the format
with random access, which the loader shuffles by. Preparing happens in a folder
`incomplete.*` that is renamed at the end: an interrupted run can be repeated,
and what a killed one left there can be deleted.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import tensorflow_datasets as tfds

from nfnets_jax.data import datasets


def prepare(
  name: str, data_dir: str | os.PathLike[str] | None = None
) -> tfds.core.DatasetBuilder:
  """Downloads and writes a data set, unless that has been done before.

  Args:
    name: the name of a TFDS data set.
    data_dir: where data sets are kept, `~/tensorflow_datasets` by default.

  Returns:
    The builder of the data set, prepared.

  Raises:
    ValueError: if there is no such data set.
    ModuleNotFoundError: if preparing it takes tensorflow and there is none.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
    ...   splits = prepare('digits', data_dir=folder).info.splits
    Downloading and preparing dataset ...
    >>> splits['train'].num_examples, splits['test'].num_examples
    (1437, 360)
  """
  builder = datasets.find(name, data_dir)
  if builder.is_prepared():
    return builder
  try:
    builder.download_and_prepare(file_format='array_record')
  except ModuleNotFoundError as error:
    if "No module named 'tensorflow'" not in str(error):
      raise
    raise ModuleNotFoundError(
      f'preparing data set {name!r} takes tensorflow, which reading it later '
      'does not: pip install tensorflow-cpu'
    ) from error
  return builder


def main(argv: Sequence[str] | None = None) -> None:
  """Prepares the data set named on the command line and prints its sizes.

  Args:
    argv: the command line without the program; that of the process by default.
  """
  parser = argparse.ArgumentParser(
    prog='python -m nfnets_jax.data.prepare',
    description='Prepares a data set as ArrayRecord files.',
  )
  parser.add_argument('name', help='a TFDS data set, such as digits')
  parser.add_argument(
    '--data_dir', help='where to keep it (default: ~/tensorflow_datasets)'
  )
  args = parser.parse_args(argv)
  try:
    done = datasets.find(args.name, args.data_dir).is_prepared()
    builder = prepare(args.name, args.data_dir)
  except (ValueError, ModuleNotFoundError) as error:
    sys.exit(f'error: {error}')
  print(
    f'{args.name}: {"already " if done else ""}prepared in {builder.data_dir}'
  )
  for split, info in builder.info.splits.items():
    print(f'  {split}: {info.num_examples:,} examples')


if __name__ == '__main__':
  main()
