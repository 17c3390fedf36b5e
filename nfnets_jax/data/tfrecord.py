"""Converts a data set that TFDS prepared as TFRecord files to ArrayRecord.

TFDS writes TFRecord files unless told otherwise, and they can only be read from
their start. The records are the same in both formats, so they are copied as
they are, shard by shard, into a folder beside the one to be:

    <data_dir>/imagenet2012/incomplete.1a2b3c4d_5.1.0

That is renamed when all is there, and an interrupted conversion finds there
what it has done. Its name has a digest of what is converted, so that two copies
of a data set never mix. What is converted is only read. Where two runs convert
the same, one finishes, and the other finds it done.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
import tqdm
from google.protobuf import json_format
from tensorflow_datasets.core import (
  dataset_info,
  file_adapters,
  naming,
)

from nfnets_jax import paths
from nfnets_jax.data import datasets, storage

_INFO = 'dataset_info.json'  # a folder without it holds no data set
_ARRAY_RECORD = tfds.core.FileFormat.ARRAY_RECORD


class _Shard(NamedTuple):
  """A file to convert, its place after, and how many records it has."""

  source: pathlib.Path
  target: pathlib.Path
  length: int


def convert(
  name: str,
  source: str | os.PathLike[str],
  data_dir: str | os.PathLike[str] | None = None,
) -> tfds.core.DatasetBuilder:
  """Converts a data set, or goes on where an earlier call was interrupted.

  Args:
    name: the name of the data set, such as `imagenet2012` or, where `source`
      holds several versions, `imagenet2012:5.1.0`.
    source: the data_dir of the TFRecord files, or the folder of the version.
    data_dir: where to write, as for `datasets.load`.

  Returns:
    The builder of the data set in `data_dir`.

  Raises:
    FileNotFoundError: if there is no such data set in `source`, or it lacks
      files.
    ValueError: if its files do not hold what its info says, or something else
      is in the place to write to, such as a copy in another format.
    OSError: if the disk has no room.
    ModuleNotFoundError: if there is no tensorflow.
  """
  folder = _find(name, paths.expand_literal(source, 'from_tfrecord'))
  info = _read_info(folder)
  names = [info.name, *filter(None, [info.config_name])]
  root = datasets.resolve(data_dir)
  target = root.joinpath(*names, info.version)
  if target.exists():
    _check_target(target, folder, info)
    print(f'{target} is there already, nothing is converted')
  else:
    digest = hashlib.blake2b((folder / _INFO).read_bytes(), digest_size=4)
    work = target.with_name(f'incomplete.{digest.hexdigest()}_{info.version}')
    for line in storage.leftovers(target, mine=work):
      print(line)
    try:
      _convert_shards(info, folder, work)
      _write_info(info, folder, work)
      _delete_partial_files(work)
      work.rename(target)
    except Exception:
      if not target.exists():
        raise
      # Another run has renamed the folder, with what this one was writing.
      _delete_partial_files(target)
      _check_target(target, folder, info)
      print(f'{target} has been finished by another run')
  return datasets.find(f'{"/".join(names)}:{info.version}', root)


def _find(name: str, source: pathlib.Path) -> pathlib.Path:
  """Returns the folder with the version of the data set to convert."""
  parsed, wanted = naming.parse_builder_name_kwargs(name)
  if (source / _INFO).is_file():
    found = [source]
  else:
    folder = source / parsed.name
    infos = [*folder.glob(f'*/{_INFO}'), *folder.glob(f'*/*/{_INFO}')]
    # The folders of a config and of a version bear their names.
    found = [
      path.parent
      for path in sorted(infos)
      if not path.parent.name.startswith('incomplete.')
      and {*wanted.values()} <= {*path.parent.relative_to(folder).parts}
    ]
  if not found:
    raise FileNotFoundError(
      f'no data set {name!r} in {source}: there is no '
      f'{source / parsed.name}/<version>/{_INFO}'
    )
  if len(found) > 1:
    raise ValueError(
      f'{source} holds several versions of data set {name!r}; give the folder '
      f'of one: {", ".join(map(str, found))}'
    )
  info = _read_info(found[0])
  if (
    info.name != parsed.name
    or wanted.get('version', info.version) != info.version
    or wanted.get('config', info.config_name) != info.config_name
  ):
    raise ValueError(
      f'{found[0]} holds data set {info.name!r}, config '
      f'{info.config_name or None!r}, version {info.version!r}, not {name!r}'
    )
  if tfds.core.FileFormat(info.file_format or 'tfrecord') == _ARRAY_RECORD:
    raise ValueError(f'{found[0]} is in the format array_record already')
  return found[0]


def _read_info(folder: pathlib.Path) -> Any:
  """Reads what describes a data set."""
  try:
    return dataset_info.read_proto_from_builder_dir(folder)
  except json_format.ParseError as error:
    raise ValueError(f'{folder / _INFO} is damaged: {error}') from error


def _check_target(
  target: pathlib.Path, folder: pathlib.Path, info: Any
) -> None:
  """Checks that what is in the place to write to is what would be written."""
  if target.samefile(folder):
    raise ValueError(
      f'{target} is what is to be converted; give another --data_dir'
    )
  if not (target / _INFO).is_file():
    raise ValueError(
      f'{target} is there already, and is no prepared data set; give another '
      '--data_dir, or move it away'
    )
  there = _read_info(target)
  file_format = there.file_format or 'tfrecord'
  if file_format != _ARRAY_RECORD.value:
    raise ValueError(
      f'{target} is there already, in the format {file_format}; give another '
      '--data_dir'
    )
  if _num_examples(there) != _num_examples(info):
    raise ValueError(
      f'{target} is there already, and has the splits {_num_examples(there)}, '
      f'where {folder} has {_num_examples(info)}; give another --data_dir'
    )


def _num_examples(info: Any) -> dict[str, int]:
  return {x.name: sum(x.shard_lengths) for x in info.splits}


def _convert_shards(
  info: Any, folder: pathlib.Path, work: pathlib.Path
) -> None:
  """Converts all shards that have not been converted."""
  adapter = file_adapters.ADAPTER_FOR_FORMAT[
    tfds.core.FileFormat(info.file_format or 'tfrecord')
  ]
  shards = _shards(info, folder, work)
  todo = [x for x in shards if _num_records(x.target) != x.length]
  storage.check_space(work, sum(x.source.stat().st_size for x in todo))
  work.mkdir(parents=True, exist_ok=True)
  total = sum(x.length for x in shards)
  with tqdm.tqdm(
    desc=f'Converting {info.name}',
    initial=total - sum(x.length for x in todo),
    total=total,
    unit=' examples',
    mininterval=1,
  ) as progress:
    for shard in todo:
      _convert_shard(shard, adapter, progress)


def _shards(
  info: Any, folder: pathlib.Path, work: pathlib.Path
) -> list[_Shard]:
  """Lists the shards of all splits, and checks that none is missing."""
  source = dataset_info.get_split_dict_from_proto(
    info, folder, info.file_format or 'tfrecord'
  )
  target = dataset_info.get_split_dict_from_proto(info, work, _ARRAY_RECORD)
  shards = [
    _Shard(pathlib.Path(read), pathlib.Path(written), length)
    for split in source
    for read, written, length in zip(
      source[split].filepaths,
      target[split].filepaths,
      source[split].shard_lengths,
      strict=True,
    )
  ]
  if not shards:
    raise ValueError(f'{folder / _INFO} lists no files')
  missing = [x.source.name for x in shards if not x.source.is_file()]
  if missing:
    raise FileNotFoundError(
      f'{len(missing):,} of {len(shards):,} files are missing in {folder}: '
      f'{", ".join(missing[:3])}{", ..." if len(missing) > 3 else ""}'
    )
  return shards


def _convert_shard(shard: _Shard, adapter: Any, progress: tqdm.tqdm) -> None:
  # The number keeps two runs at a time apart.
  partial = shard.target.with_name(f'{shard.target.name}.partial.{os.getpid()}')
  writer = file_adapters.ADAPTER_FOR_FORMAT[_ARRAY_RECORD]
  try:
    records = _records(shard.source, adapter, progress)
    writer.write_examples(partial, enumerate(records))
    found = _num_records(partial)
    if found != shard.length:
      raise ValueError(
        f'{shard.source} holds {found} records, and {_INFO} beside it says '
        f'{shard.length}'
      )
    partial.replace(shard.target)
  finally:
    partial.unlink(missing_ok=True)


def _records(
  path: pathlib.Path, adapter: Any, progress: tqdm.tqdm
) -> Iterator[bytes]:
  try:
    for record in adapter.make_tf_data(os.fspath(path)).as_numpy_iterator():
      yield record
      progress.update()
  except ModuleNotFoundError:
    raise
  except Exception as error:  # tensorflow has its own
    raise ValueError(f'cannot read {path}: {error}') from error


def _num_records(path: pathlib.Path) -> int | None:
  """Returns how many records an ArrayRecord file has, None if it is none."""
  if not path.is_file():
    return None
  try:
    return file_adapters.ADAPTER_FOR_FORMAT[_ARRAY_RECORD].num_examples(path)
  except Exception:  # whatever is wrong with it
    return None


def _delete_partial_files(folder: pathlib.Path) -> None:
  """Deletes what this process and those that were killed have left."""
  for path in folder.glob('*.partial.*'):
    process = path.suffix[1:]
    is_mine = process == str(os.getpid())
    if process.isdecimal() and (is_mine or not _is_alive(int(process))):
      path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
  with contextlib.suppress(PermissionError):  # it is another user's
    try:
      os.kill(process, 0)
    except ProcessLookupError:
      return False
  return True


def _write_info(info: Any, folder: pathlib.Path, work: pathlib.Path) -> None:
  """Writes what describes the data set, `dataset_info.json` at last."""
  for path in folder.iterdir():
    is_text = path.suffix in ('.json', '.txt') or path.name == 'LICENSE'
    if is_text and path.name != _INFO:
      shutil.copyfile(path, work / path.name)
  info.file_format = _ARRAY_RECORD.value
  del info.alternative_file_formats[:]
  dataset_info.write_dataset_info_proto(info, work)
