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
from tensorflow_datasets.core import naming

import nfnets_jax.data.digits  # noqa: F401, registers itself with TFDS
from nfnets_jax import paths
from nfnets_jax.data import shards, splits

# Data sets that need no preparation.
UNPREPARED = ('fake', 'folder')

_INFO = 'dataset_info.json'  # every prepared data set has one
_ARRAY_RECORD = tfds.core.FileFormat.ARRAY_RECORD
_DATA_DIR_VARIABLE = 'TFDS_DATA_DIR'


def find(
  name: str, data_dir: str | os.PathLike[str] | None = None
) -> tfds.core.DatasetBuilder:
  """Returns the TFDS builder of a data set, prepared or not.

  The code of a data set is only needed to prepare it.

  Args:
    name: in TFDS notation, `name[/config][:version]`; or the folder that holds
      a prepared data set, relative to `data_dir` (`name/[config/]version`) or
      beginning with `/`, `./`, `../` or `~`.
    data_dir: root of the data sets.

  Raises:
    ValueError: if neither TFDS nor `data_dir` has the data set or version, its
      description is corrupt, or it requires a package that is missing.

  Example:
    >>> find('digits').name
    'digits'
  """
  root = resolve(data_dir)
  try:
    return _open(name, root)
  except tfds.core.DatasetNotFoundError as error:
    if found := _below(root / re.split('[/:]', name)[0]):
      raise ValueError(_choice(f'{name!r} in {root}', found, root)) from error
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
    name: as in `find`.
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
  if builder.info.file_format != _ARRAY_RECORD:  # it has several
    builder.info.set_file_format(
      _ARRAY_RECORD, override=True, override_if_initialized=True
    )
  # Images are decoded in `transforms`.
  decoders = {
    key: tfds.decode.SkipDecoding()
    for key, feature in fields.items()
    if isinstance(feature, tfds.features.Image)
  }
  sizes = {x.name: x.num_examples for x in builder.info.splits.values()}
  try:
    parts = splits.ranges(split, sizes)
  except ValueError as error:
    listed = ', '.join(f'{x} {size:,}' for x, size in sizes.items())
    raise ValueError(
      f'cannot read split {split!r} of data set {name!r}: '
      f'{str(error).rstrip(".")} (examples: {listed})'
    ) from error
  source = shards.Examples(builder.info, parts, decoders)
  try:
    source.check_files()
  except ValueError as error:
    remedy = _prepare_again(pathlib.Path(builder.data_dir), name, data_dir)
    raise ValueError(f'{error}\n{remedy}') from error
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
  """Returns whether there are ArrayRecord files, which allow shuffling."""
  return _ARRAY_RECORD in builder.info.available_file_formats()


def no_random_access(builder: tfds.core.DatasetBuilder) -> str:
  """Returns the error message for a data set without random access."""
  file_format = builder.info.file_format or tfds.core.FileFormat.TFRECORD
  found = f'{builder.data_dir} holds data set {builder.name!r} in the format '
  if file_format != tfds.core.FileFormat.TFRECORD:
    return (
      f"{found}{file_format.value}; write it with file_format='array_record'"
    )
  command = prepare_command(
    _without_version(builder),
    from_tfrecord=builder.data_dir,
    data_dir='ANOTHER_FOLDER',
  )
  return (
    f'{found}{file_format.value}, which has no random access; convert it (this '
    f'needs tensorflow) with: {command}'
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
  infos = pathlib.Path(builder.data_dir).parent.glob(f'*/{_INFO}')
  names = [
    repr(f'{_without_version(builder)}:{path.parent.name}')
    for path in sorted(infos)
    if tfds.core.Version.is_valid(path.parent.name)
  ]
  return f', only {" and ".join(names)}' if names else ''


def _without_version(builder: tfds.core.DatasetBuilder) -> str:
  return builder.info.full_name.removesuffix(f'/{builder.version}')


def _open(name: str, root: pathlib.Path) -> tfds.core.DatasetBuilder:
  """Returns a builder by its folder or its name; see `find`."""
  if (folder := _folder(name, root)) is not None:
    return tfds.builder_from_directory(folder)
  try:
    return tfds.builder(name, data_dir=root)
  except tfds.core.DatasetNotFoundError:
    # TFDS does not know the default config of a copy without `.config`.
    found = [] if ':' in name else _below(root / name)
    if len(found) != 1:
      raise
    return tfds.builder_from_directory(found[0])


def _folder(name: str, root: pathlib.Path) -> pathlib.Path | None:
  """Returns the folder of a prepared data set if the name is a path."""
  if not re.match(r'/|~|\.\.?/', name):
    return root / name if (root / name / _INFO).is_file() else None
  folder = paths.local_literal(name, 'data.name').absolute()
  if (folder / _INFO).is_file():
    return folder
  found = _below(folder)
  if not found:
    raise ValueError(
      f'{folder} is not a data set that TFDS has prepared: there is no {_INFO} '
      'in it or in the folder of a version'
    )
  if len(found) > 1:
    raise ValueError(_choice(str(folder), found, folder.parent))
  return found[0]


def _choice(wanted: str, found: list[pathlib.Path], root: pathlib.Path) -> str:
  """Returns the error message for a name without its config or version."""
  names = ' or '.join(str(path.relative_to(root)) for path in found)
  return f'there is no data set {wanted}; give {names}'


def _below(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the prepared `[config/]version` below the folder of a data set."""
  infos = [*folder.glob(f'*/{_INFO}'), *folder.glob(f'*/*/{_INFO}')]
  return [
    path.parent
    for path in sorted(infos)
    if tfds.core.Version.is_valid(path.parent.name)
  ]


def _corrupt_description(name: str, root: pathlib.Path) -> pathlib.Path:
  """Returns the JSON file that cannot be parsed, or a placeholder."""
  folder = _folder(name, root)
  if folder is None:
    folder = root / naming.parse_builder_name_kwargs(name)[0].name
  for path in sorted(folder.rglob('*.json')):
    try:
      json.loads(path.read_bytes())
    except ValueError:
      return path
  return folder / '<version>' / _INFO


def _prepare_again(
  folder: pathlib.Path, name: str, data_dir: str | os.PathLike[str] | None
) -> str:
  try:
    tfds.builder_cls(re.split('[/:]', name)[0])
  except (tfds.core.DatasetNotFoundError, ValueError):  # or not a name
    return f'If {folder} is corrupt, copy or write it again.'
  return (
    f'If {folder} is corrupt, delete it and prepare it again with: '
    + _how_to_prepare(name, data_dir)
  )
