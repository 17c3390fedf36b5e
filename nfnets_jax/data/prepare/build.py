"""Builds a data set with TFDS, as ArrayRecord files."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import download_manager, extractor

from nfnets_jax import paths
from nfnets_jax.data import builders
from nfnets_jax.data.prepare import imagenet, storage

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
  if name in builders.UNPREPARED:
    return None
  builder = builders.find(name, data_dir)
  if builder.is_prepared():
    if not builders.has_random_access(builder):
      raise ValueError(builders.no_random_access(builder))
    return builder
  folder = pathlib.Path(builder.data_dir)
  if folder.exists():  # TFDS would assume that it is prepared
    raise ValueError(
      f'{folder} exists already and is not a prepared data set; give another '
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
    with tensorflow_needed(name):
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
  folder = paths.local(imagenet_dir, 'imagenet_dir').absolute()
  counts = imagenet.check(folder, builder.info.features['label'].names)
  storage.check_space(
    pathlib.Path(builder.data_dir), imagenet.num_bytes(folder)
  )
  for split, archive in imagenet.ARCHIVES.items():
    print(
      f'{folder / archive.name}: {split}, {counts[split]:,} of '
      f'{archive.num_images:,} images'
    )
  if is_sample(counts):
    print('This is a sample of ImageNet.')
  # TFDS shows its progress relative to these sizes, and replaces them.
  infos = [
    tfds.core.SplitInfo(name=split, shard_lengths=[count], num_bytes=0)
    for split, count in counts.items()
  ]
  builder.info.set_splits(tfds.core.SplitDict(infos))
  return folder


def is_sample(counts: dict[str, int]) -> bool:
  """Returns whether a split of ImageNet has fewer images than published."""
  return any(
    counts.get(split, 0) < archive.num_images
    for split, archive in imagenet.ARCHIVES.items()
  )


@contextlib.contextmanager
def tensorflow_needed(name: str) -> Iterator[None]:
  """Adds the remedy to errors about a missing tensorflow."""
  try:
    yield
  except (ModuleNotFoundError, extractor.ExtractError) as error:
    if "No module named 'tensorflow'" not in str(error):
      raise
    raise ModuleNotFoundError(
      f'preparing data set {name!r} needs tensorflow, which reading it '
      'does not: pip install tensorflow-cpu'
    ) from error
