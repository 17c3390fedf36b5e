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
import os
import pathlib
import shlex
import signal
import sys
from collections.abc import Sequence

import tensorflow_datasets as tfds
from absl import logging

from nfnets_jax.data import builders
from nfnets_jax.data.prepare import build, imagenet, storage, tfrecord


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
  if args.name in builders.UNPREPARED:
    print(f'{args.name}: needs no preparation')
    return
  try:
    if args.from_tfrecord is None:
      is_new = not builders.find(args.name, args.data_dir).is_prepared()
      builder = build.prepare(args.name, args.data_dir, args.imagenet_dir)
    else:
      is_new = True
      with build.tensorflow_needed(args.name):
        builder = tfrecord.convert(args.name, args.from_tfrecord, args.data_dir)
  except KeyboardInterrupt:
    if args.from_tfrecord is None:
      then = 'nothing is kept; the same command starts over'
    else:
      then = 'finished files are kept; the same command converts the rest'
    print(f'\ninterrupted: {then}', file=sys.stderr)
    sys.exit(130)
  except (ValueError, ModuleNotFoundError, OSError) as error:
    sys.exit(f'error: {error}')
  assert builder is not None
  _report(args.name, builder, is_new)
  default = builders.find(args.name, args.data_dir)
  if default.version != builder.version:
    print(f'To load it, name the version: {builder.name}:{builder.version}')


def _report(name: str, builder: tfds.core.DatasetBuilder, is_new: bool) -> None:
  """Prints the folder and the sizes of a prepared data set."""
  folder = pathlib.Path(builder.data_dir)
  print(f'{name}: {"" if is_new else "already "}prepared in {folder}')
  counts = {x: info.num_examples for x, info in builder.info.splits.items()}
  for split, count in counts.items():
    print(f'  {split}: {count:,} examples')
  if builder.name == 'imagenet2012' and build.is_sample(counts):
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
