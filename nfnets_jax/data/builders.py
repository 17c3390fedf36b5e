"""Finds the TFDS builders of data sets, with a remedy for what is wrong."""

import difflib
import json
import os
import pathlib
import re
import shlex
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf import json_format
from tensorflow_datasets.core import file_adapters, naming

import nfnets_jax.data.digits  # noqa: F401, registers itself with TFDS
from nfnets_jax import paths

# Data sets that need no preparation.
UNPREPARED = ('fake', 'folder')

_DATA_DIR_VARIABLE = 'TFDS_DATA_DIR'


def find(
  name: str, data_dir: str | os.PathLike[str] | None = None
) -> tfds.core.DatasetBuilder:
  """Returns the TFDS builder of a data set, prepared or not.

  Raises:
    ValueError: if neither TFDS nor `data_dir` has the data set or version, its
      description is corrupt, or it requires a package that is missing.

  Example:
    >>> find('digits').name
    'digits'
  """
  root = resolve(data_dir)
  try:
    return tfds.builder(name, data_dir=root)
  except tfds.core.DatasetNotFoundError as error:
    known = [*tfds.list_builders(with_community_datasets=False), *UNPREPARED]
    similar = difflib.get_close_matches(name, known)
    hint = f'; did you mean {" or ".join(similar)}?' if similar else ''
    raise ValueError(
      f'unknown data set {name!r}: neither TFDS nor {root} has it{hint}'
    ) from error
  except AssertionError as error:  # no such version
    raise ValueError(str(error)) from error
  except ModuleNotFoundError as error:
    raise ValueError(
      f'data set {name!r} needs a package that is not installed ({error}); '
      'install it, or choose another data set of the TFDS catalogue'
    ) from error
  except (json_format.ParseError, json.JSONDecodeError) as error:
    path = _corrupt_description(name, root)
    remedy = _prepare_again(path.parent, name, data_dir)
    raise ValueError(f'{path} is corrupt: {error}\n{remedy}') from error


def read(
  name: str, split: str, data_dir: str | os.PathLike[str] | None = None
) -> tuple[Any, tuple[str, ...]]:
  """Opens a split of a prepared data set for image classification.

  Args:
    name: name of a TFDS data set.
    split: in TFDS notation.
    data_dir: root of the data sets.

  Returns:
    The examples, with random access, images encoded; and the class names.

  Raises:
    ValueError, FileNotFoundError: as in `datasets.load`.
  """
  builder = find(name, data_dir)
  # TFDS warns if the folder does not exist.
  if not (builder.data_path.exists() and builder.is_prepared()):
    raise FileNotFoundError(
      f'data set {name!r} is not prepared in {builder.data_dir}'
      f'{_other_versions(builder)}; prepare it with: '
      + _how_to_prepare(name, data_dir)
    )
  features = builder.info.features
  is_dict = isinstance(features, tfds.features.FeaturesDict)
  fields = dict(features.items()) if is_dict else {}
  if not (
    isinstance(fields.get('image'), tfds.features.Image)
    and isinstance(fields.get('label'), tfds.features.ClassLabel)
  ):
    raise ValueError(
      f'data set {name!r} is not for image classification: it needs an Image '
      f"'image' and a ClassLabel 'label', and has {features}"
    )
  if fields['image'].np_dtype not in (np.uint8, np.uint16):
    # TFDS packs the bits of a float32 image into a PNG of four channels.
    raise ValueError(
      f'data set {name!r} has images of {np.dtype(fields["image"].np_dtype)}, '
      'of unknown range; uint8 and uint16 are read'
    )
  if not has_random_access(builder):
    raise ValueError(no_random_access(builder))
  # Images are decoded in `transforms`.
  decoders = {
    key: tfds.decode.SkipDecoding()
    for key, feature in fields.items()
    if isinstance(feature, tfds.features.Image)
  }
  try:
    source = builder.as_data_source(split=split, decoders=decoders)
    part = builder.info.splits[split]
    if part.num_examples <= 0:
      raise ValueError('it has no examples')
  except ValueError as error:
    sizes = ', '.join(
      f'{x.name} {x.num_examples:,}' for x in builder.info.splits.values()
    )
    raise ValueError(
      f'cannot read split {split!r} of data set {name!r}: '
      f'{str(error).rstrip(".")} (examples: {sizes})'
    ) from error
  remedy = _prepare_again(pathlib.Path(builder.data_dir), name, data_dir)
  _check_files(builder, [x.filename for x in part.file_instructions], remedy)
  return source, tuple(fields['label'].names)


def resolve(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
  """Returns the root folder of data sets; it need not exist.

  Args:
    data_dir: None means $TFDS_DATA_DIR, or `~/tensorflow_datasets` if that is
      unset or empty.

  Raises:
    ValueError: if the home directory is needed and unknown, or the path has
      characters that TFDS reads as a pattern.

  Example:
    >>> resolve('/data/sets')
    PosixPath('/data/sets')
  """
  if data_dir is not None and paths.in_bucket(data_dir):
    raise ValueError(
      f'data_dir={data_dir}: ArrayRecord reads local files only; mount the '
      'bucket, or copy the data set with: python -m nfnets_jax.data.fetch '
      f'{data_dir} NAME --data_dir=DIR'
    )
  if data_dir is not None:
    return paths.local_literal(data_dir, 'data_dir')
  default = paths.from_environment(_DATA_DIR_VARIABLE, '~/tensorflow_datasets')
  return paths.local_literal(default, f'${_DATA_DIR_VARIABLE}')


def has_random_access(builder: tfds.core.DatasetBuilder) -> bool:
  """Returns whether the format allows shuffling; TFRecord does not."""
  formats = builder.info.available_file_formats()
  return bool(formats & tfds.core.FileFormat.with_random_access())


def no_random_access(builder: tfds.core.DatasetBuilder) -> str:
  """Returns the error message for a data set without random access."""
  file_format = builder.info.file_format or tfds.core.FileFormat.TFRECORD
  command = prepare_command(
    _without_version(builder),
    from_tfrecord=builder.data_dir,
    data_dir='ANOTHER_FOLDER',
  )
  return (
    f'{builder.data_dir} holds data set {builder.name!r} in the format '
    f'{file_format.value}, which has no random access; convert it (this needs '
    f'tensorflow) with: {command}'
  )


def prepare_command(name: str, **options: str | os.PathLike[str] | None) -> str:
  """Returns the shell command that prepares a data set; None omits an option.

  Example:
    >>> prepare_command('cifar10', data_dir='/my data')
    "python -m nfnets_jax.data.prepare cifar10 '--data_dir=/my data'"
  """
  words = ['python', '-m', 'nfnets_jax.data.prepare', name]
  for option, value in options.items():
    if value is not None:
      words.append(f'--{option}={os.fspath(value)}')
  return shlex.join(words)


def _how_to_prepare(name: str, data_dir: str | os.PathLike[str] | None) -> str:
  """Returns the command; for ImageNet, with the archives as an argument."""
  if not re.match(r'imagenet2012\b', name):
    return prepare_command(name, data_dir=data_dir)
  words = ['make', 'imagenet', 'IMAGENET_DIR=FOLDER']
  if data_dir is not None:
    words.append(f'DATA_DIR={os.fspath(data_dir)}')
  command = prepare_command(name, imagenet_dir='FOLDER', data_dir=data_dir)
  return (
    f'{shlex.join(words)}\n(or, where tensorflow is installed: {command}), '
    'where FOLDER has ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar'
  )


def _other_versions(builder: tfds.core.DatasetBuilder) -> str:
  """Lists the other versions that are prepared, for an error message."""
  infos = pathlib.Path(builder.data_dir).parent.glob('*/dataset_info.json')
  names = [
    repr(f'{_without_version(builder)}:{path.parent.name}')
    for path in sorted(infos)
    if tfds.core.Version.is_valid(path.parent.name)
  ]
  return f', only {" and ".join(names)}' if names else ''


def _without_version(builder: tfds.core.DatasetBuilder) -> str:
  return builder.info.full_name.removesuffix(f'/{builder.version}')


def _check_files(
  builder: tfds.core.DatasetBuilder, files: list[str], remedy: str
) -> None:
  """Checks that all files exist, and opens the first and the last."""
  shards = [pathlib.Path(file) for file in dict.fromkeys(files)]
  bad = [x.name for x in shards if not (x.is_file() and x.stat().st_size)]
  if bad:
    raise ValueError(
      f'{len(bad):,} of {len(shards):,} files are missing or empty in '
      f'{builder.data_dir}: {", ".join(bad[:3])}{", ..." * (len(bad) > 3)}\n'
      f'{remedy}'
    )
  adapter = file_adapters.ADAPTER_FOR_FORMAT[builder.info.file_format]
  for path in dict.fromkeys([shards[0], shards[-1]]):
    try:
      adapter.num_examples(path)  # opens it
    except Exception as error:  # each format has its own errors
      raise ValueError(f'cannot read {path}: {error}\n{remedy}') from error


def _corrupt_description(name: str, data_dir: pathlib.Path) -> pathlib.Path:
  """Returns the JSON file that cannot be parsed, or a placeholder."""
  parsed, _ = naming.parse_builder_name_kwargs(name)
  folder = data_dir / parsed.name
  for path in sorted(folder.rglob('*.json')):
    try:
      json.loads(path.read_bytes())
    except ValueError:
      return path
  return folder / '<version>' / 'dataset_info.json'


def _prepare_again(
  folder: pathlib.Path, name: str, data_dir: str | os.PathLike[str] | None
) -> str:
  return (
    f'If {folder} is corrupt, delete it and prepare it again with: '
    + _how_to_prepare(name, data_dir)
  )
