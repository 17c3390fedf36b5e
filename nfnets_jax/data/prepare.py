"""Prepares a data set: downloads it and writes it as ArrayRecord files.

    python -m nfnets_jax.data.prepare digits [--data_dir=DIR]
    python -m nfnets_jax.data.prepare imagenet2012 --imagenet_dir=TARS
    python -m nfnets_jax.data.prepare imagenet2012 --from_tfrecord=COPY

Any image classification data set of the TFDS catalogue is supported,
https://www.tensorflow.org/datasets/catalog/overview. ArrayRecord allows random
access, which the loader needs to shuffle. ImageNet is built from its two
official archives, or converted from TFRecord, the default format of TFDS, into
another folder.

The data set is written to a folder `incomplete.*` that is renamed at the end,
so a prepared data set is complete. After an interruption, run the same command
again: a build restarts, a conversion resumes.
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

# Errors of TFDS for failed or unexpected downloads.
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
  """Downloads and writes a data set unless it is already prepared.

  Args:
    name: the name of a TFDS data set, `folder` or `fake`.
    data_dir: root of the data sets, as in `datasets.load`.
    imagenet_dir: the folder of the two archives, for `imagenet2012`.

  Returns:
    The builder of the data set; None for `folder` and `fake`.

  Raises:
    ValueError: if the data set does not exist, an archive is corrupt, the
      target exists and is something else, or `data_dir` has characters that
      TFDS reads as a pattern.
    FileNotFoundError: if an archive is missing.
    OSError: if the disk is too small for ImageNet, or a download fails or has
      unexpected contents.
    ModuleNotFoundError: if tensorflow is required and not installed.

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
  if folder.exists():  # TFDS would assume that it is prepared
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
    # TFDS needs a manual download; its message names the files.
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS is None:
      raise
    raise ValueError(str(error)) from error
  except _DOWNLOAD_ERRORS as error:
    raise OSError(f'cannot download data set {name!r}: {error}') from error
  return builder


def main(argv: Sequence[str] | None = None) -> None:
  """Prepares the data set named on the command line and prints its sizes."""
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
  builder: tfds.core.DatasetBuilder, imagenet_dir: str | os.PathLike[str] | None
) -> pathlib.Path:
  """Checks the archives and the disk space, and prints the sizes."""
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
  # TFDS shows its progress relative to these sizes, and replaces them.
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
  """Adds the remedy to errors about a missing tensorflow."""
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
  """Prints the folder and the sizes of a prepared data set."""
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
  # Silence TFDS about the unprepared data set, and tensorflow about GPUs.
  logging.set_verbosity(logging.ERROR)
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  # Clean up on SIGTERM as on Ctrl-C.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  main()
