"""Prepares a data set: downloads it and writes it as ArrayRecord files.

    python -m nfnets_jax.data.prepare digits [--data_dir=DIR]
    python -m nfnets_jax.data.prepare imagenet2012 --imagenet_dir=TARS
    python -m nfnets_jax.data.prepare imagenet2012 --from_tfrecord=COPY

Any data set for image classification in the TFDS catalogue will do,
https://www.tensorflow.org/datasets/catalog/overview. ArrayRecord is the format
with random access, which the loader shuffles by. ImageNet is built from the two
archives that its makers offer. A copy in TFRecord files, the format that TFDS
prefers, is converted into another folder, without the archives.

Preparing happens in a folder `incomplete.*` that is renamed at the end, so what
is prepared is whole. An interrupted run can be repeated: building begins anew,
converting goes on with the file it was at.
"""

import argparse
import contextlib
import os
import pathlib
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence

import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core.download import download_manager, extractor

from nfnets_jax import paths
from nfnets_jax.data import datasets, imagenet, storage, tfrecord

# What TFDS raises where a download fails, or is not what it should be.
_DOWNLOAD_ERRORS = (
  tfds.download.DownloadError,
  download_manager.NonMatchingChecksumError,
  extractor.ExtractError,
)


def prepare(
  name: str,
  data_dir: str | os.PathLike[str] | None = None,
  imagenet_dir: str | os.PathLike[str] | None = None,
) -> tfds.core.DatasetBuilder | None:
  """Downloads and writes a data set, unless that has been done before.

  Args:
    name: the name of a TFDS data set, or one that needs no preparation.
    data_dir: where data sets are kept, as for `datasets.load`.
    imagenet_dir: where the two archives of ImageNet are; for `imagenet2012`.

  Returns:
    The builder of the data set, prepared. None for `folder` and `fake`, which
    need no preparation.

  Raises:
    ValueError: if there is no such data set, an archive is damaged,
      something else is in the place to write to, or `data_dir` has characters
      that TFDS reads as a pattern.
    FileNotFoundError: if an archive is missing.
    OSError: if the disk has no room for ImageNet, or a download fails, or is
      not what the data set expects.
    ModuleNotFoundError: if preparing it takes tensorflow and there is none.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
    ...   splits = prepare('digits', data_dir=folder).info.splits
    Downloading and preparing dataset ...
    >>> splits['train'].num_examples, splits['test'].num_examples
    (1437, 360)
  """
  if name in datasets.UNPREPARED:
    return None
  builder = datasets.find(name, data_dir)
  if builder.is_prepared():
    if not datasets.has_random_access(builder):
      raise ValueError(datasets.no_random_access(builder))
    return builder
  folder = pathlib.Path(builder.data_dir)
  if folder.exists():  # TFDS would take it for prepared
    raise ValueError(
      f'{folder} is there already, and is no prepared data set; give another '
      '--data_dir, or move it away'
    )
  for line in storage.leftovers(folder):
    print(line)
  config = tfds.download.DownloadConfig()
  if builder.name == 'imagenet2012':
    config.manual_dir = _check_imagenet(builder, imagenet_dir)
  elif imagenet_dir:
    raise ValueError(f'--imagenet_dir is for imagenet2012, not for {name!r}')
  try:
    with _tensorflow_for(name):
      builder.download_and_prepare(
        file_format='array_record', download_config=config
      )
  except AssertionError as error:
    # TFDS wants files that cannot be downloaded, and says which and where.
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS is None:
      raise
    raise ValueError(str(error)) from error
  except _DOWNLOAD_ERRORS as error:
    raise OSError(f'cannot download data set {name!r}: {error}') from error
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
  parser.add_argument(
    'name', help='a TFDS data set, such as digits or imagenet2012'
  )
  parser.add_argument(
    '--data_dir',
    help='where to keep it (default: $TFDS_DATA_DIR, or ~/tensorflow_datasets)',
  )
  source = parser.add_mutually_exclusive_group()
  source.add_argument(
    '--imagenet_dir',
    help='where ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar are',
  )
  source.add_argument(
    '--from_tfrecord',
    help='where TFDS has prepared it as TFRecord files; they are only read',
  )
  args = parser.parse_args(argv)
  if args.name in datasets.UNPREPARED:
    print(f'{args.name}: nothing to prepare, it is read as it is')
    return
  try:
    if args.from_tfrecord is None:
      is_new = not datasets.find(args.name, args.data_dir).is_prepared()
      builder = prepare(args.name, args.data_dir, args.imagenet_dir)
    else:
      is_new = True
      with _tensorflow_for(args.name):
        builder = tfrecord.convert(args.name, args.from_tfrecord, args.data_dir)
  except KeyboardInterrupt:
    if args.from_tfrecord is None:
      then = 'nothing is kept; the same command starts again'
    else:
      then = 'finished files are kept; the same command goes on with the rest'
    print(f'\ninterrupted: {then}', file=sys.stderr)
    sys.exit(130)
  except (ValueError, ModuleNotFoundError, OSError) as error:
    sys.exit(f'error: {error}')
  assert builder is not None
  _report(args.name, builder, is_new)
  default = datasets.find(args.name, args.data_dir)
  if default.version != builder.version:
    print(f'To load it, name the version: {builder.name}:{builder.version}')


def _check_imagenet(
  builder: tfds.core.DatasetBuilder,
  imagenet_dir: str | os.PathLike[str] | None,
) -> pathlib.Path:
  """Checks the archives and the disk and says what is about to happen."""
  if not imagenet_dir:
    raise ValueError(
      f'{builder.name} is not prepared in {builder.data_dir}; give '
      '--imagenet_dir, the folder of its two archives, or --from_tfrecord, a '
      'copy that TFDS has prepared (`make imagenet` takes them as IMAGENET_DIR '
      f'and FROM_TFRECORD)\n{imagenet.remedy(*imagenet.ARCHIVES)}'
    )
  folder = paths.expand(imagenet_dir, 'imagenet_dir').absolute()
  counts = imagenet.check(folder, builder.info.features['label'].names)
  storage.check_space(
    pathlib.Path(builder.data_dir), imagenet.num_bytes(folder)
  )
  for split, archive in imagenet.ARCHIVES.items():
    print(
      f'{folder / archive.name}: {split}, {counts[split]:,} of '
      f'{archive.num_images:,} images'
    )
  if _is_sample(counts):
    print('This is a sample of ImageNet.')
  # TFDS shows its progress in parts of what the info says, and replaces that.
  infos = [
    tfds.core.SplitInfo(name=split, shard_lengths=[count], num_bytes=0)
    for split, count in counts.items()
  ]
  builder.info.set_splits(tfds.core.SplitDict(infos))
  return folder


def _is_sample(counts: dict[str, int]) -> bool:
  return any(
    counts.get(split, 0) < archive.num_images
    for split, archive in imagenet.ARCHIVES.items()
  )


@contextlib.contextmanager
def _tensorflow_for(name: str) -> Iterator[None]:
  """Gives the error that tensorflow is missing a remedy."""
  try:
    yield
  except (ModuleNotFoundError, extractor.ExtractError) as error:
    if "No module named 'tensorflow'" not in str(error):
      raise
    raise ModuleNotFoundError(
      f'preparing data set {name!r} takes tensorflow, which reading it later '
      'does not: pip install tensorflow-cpu'
    ) from error


def _report(name: str, builder: tfds.core.DatasetBuilder, is_new: bool) -> None:
  """Prints where a prepared data set is, and its sizes."""
  folder = pathlib.Path(builder.data_dir)
  print(f'{name}: {"" if is_new else "already "}prepared in {folder}')
  counts = {x: info.num_examples for x, info in builder.info.splits.items()}
  for split, count in counts.items():
    print(f'  {split}: {count:,} examples')
  if builder.name == 'imagenet2012' and _is_sample(counts):
    sizes = ', '.join(
      f'{split} {archive.num_images:,}'
      for split, archive in imagenet.ARCHIVES.items()
    )
    print(
      f'This is a sample of ImageNet, which has {sizes}. To prepare another, '
      f'give another --data_dir or delete this one: rm -r '
      + shlex.quote(str(folder))
    )
  for line in storage.leftovers(folder):
    print(line)


if __name__ == '__main__':
  # TFDS warns that what is to be prepared is not prepared, and tensorflow of
  # graphics cards.
  logging.set_verbosity(logging.ERROR)
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  # A run that is terminated tidies up as one that is interrupted.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  main()
