"""Converts TFDS data sets from TFRecord, the default of TFDS, to ArrayRecord.

TFRecord has no random access. The records are the same in both formats, so they
are copied unchanged, shard by shard, to a sibling of the target folder:

    <data_dir>/imagenet2012/incomplete.1a2b3c4d_5.1.0

It is renamed at the end, and an interrupted conversion resumes from it. Its
name has a digest of the source, so two sources never mix. The source is only
read. Of two concurrent runs, one finishes and the other finds the result.
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
from tensorflow_datasets.core import dataset_info, file_adapters, naming

from nfnets_jax import paths
from nfnets_jax.data import builders
from nfnets_jax.data.prepare import storage

_INFO = 'dataset_info.json'  # every data set has one
_ARRAY_RECORD = tfds.core.FileFormat.ARRAY_RECORD


class _Shard(NamedTuple):
  """Source and target of a file, and its number of records."""

  source: pathlib.Path
  target: pathlib.Path
  length: int


def convert(
  name: str,
  source: str | os.PathLike[str],
  data_dir: str | os.PathLike[str] | None = None,
) -> tfds.core.DatasetBuilder:
  """Converts a data set, or resumes an interrupted conversion.

  Args:
    name: name of the data set, such as `imagenet2012`, or
      `imagenet2012:5.1.0` if `source` has several versions.
    source: the data_dir of the TFRecord files, or the folder of the version.
    data_dir: where to write, as in `datasets.load`.

  Returns:
    The builder of the data set in `data_dir`.

  Raises:
    FileNotFoundError: if the data set or some of its files are missing.
    ValueError: if the files do not match the info, or the target exists and is
      something else, such as a copy in another format.
    OSError: if the disk is full.
    ModuleNotFoundError: if tensorflow is not installed.
  """
  folder = _find(name, paths.local_literal(source, 'from_tfrecord'))
  info = _read_info(folder)
  names = [info.name, *filter(None, [info.config_name])]
  root = builders.resolve(data_dir)
  target = root.joinpath(*names, info.version)
  if target.exists():
    _check_target(target, folder, info)
    print(f'{target} exists already; nothing is converted')
  else:
    digest = hashlib.blake2b((folder / _INFO).read_bytes(), digest_size=4)
    work = target.with_name(f'incomplete.{digest.hexdigest()}_{info.version}')
    for line in storage.leftovers(target, keep=work):
      print(line)
    try:
      _convert_shards(info, folder, work)
      _write_info(info, folder, work)
      _delete_partial_files(work)
      work.rename(target)
    except Exception:
      if not target.exists():
        raise
      # Another run has renamed the folder while this one was writing to it.
      _delete_partial_files(target)
      _check_target(target, folder, info)
      print(f'{target} was finished by another run')
  return builders.find(f'{"/".join(names)}:{info.version}', root)


def _find(name: str, source: pathlib.Path) -> pathlib.Path:
  """Returns the version folder to convert."""
  parsed, wanted = naming.parse_builder_name_kwargs(name)
  if (source / _INFO).is_file():
    folders = [source]
  else:
    folder = source / parsed.name
    infos = [*folder.glob(f'*/{_INFO}'), *folder.glob(f'*/*/{_INFO}')]
    # Folders are named after the config and the version.
    folders = [
      path.parent
      for path in sorted(infos)
      if not path.parent.name.startswith('incomplete.')
      and {*wanted.values()} <= {*path.parent.relative_to(folder).parts}
    ]
  if not folders:
    raise FileNotFoundError(
      f'no data set {name!r} in {source}: there is no '
      f'{source / parsed.name}/<version>/{_INFO}'
    )
  if len(folders) > 1:
    raise ValueError(
      f'{source} holds several versions of data set {name!r}; give the folder '
      f'of one: {", ".join(map(str, folders))}'
    )
  info = _read_info(folders[0])
  if (
    info.name != parsed.name
    or wanted.get('version', info.version) != info.version
    or wanted.get('config', info.config_name) != info.config_name
  ):
    raise ValueError(
      f'{folders[0]} holds data set {info.name!r}, config '
      f'{info.config_name or None!r}, version {info.version!r}, not {name!r}'
    )
  if tfds.core.FileFormat(info.file_format or 'tfrecord') == _ARRAY_RECORD:
    raise ValueError(f'{folders[0]} is in the format array_record already')
  return folders[0]


def _read_info(folder: pathlib.Path) -> Any:
  """Reads the description of a data set."""
  try:
    return dataset_info.read_proto_from_builder_dir(folder)
  except json_format.ParseError as error:
    raise ValueError(f'{folder / _INFO} is corrupt: {error}') from error


def _check_target(
  target: pathlib.Path, folder: pathlib.Path, info: Any
) -> None:
  """Checks that an existing target is what would be written."""
  if target.samefile(folder):
    raise ValueError(f'{target} is the source itself; give another --data_dir')
  if not (target / _INFO).is_file():
    raise ValueError(
      f'{target} exists already and is not a prepared data set; give another '
      '--data_dir, or move it away'
    )
  existing = _read_info(target)
  file_format = existing.file_format or 'tfrecord'
  if file_format != _ARRAY_RECORD.value:
    raise ValueError(
      f'{target} exists already, in the format {file_format}; give another '
      '--data_dir'
    )
  if _num_examples(existing) != _num_examples(info):
    raise ValueError(
      f'{target} exists already, with the splits '
      f'{_num_examples(existing)}, '
      f'where {folder} has {_num_examples(info)}; give another --data_dir'
    )


def _num_examples(info: Any) -> dict[str, int]:
  return {x.name: sum(x.shard_lengths) for x in info.splits}


def _convert_shards(
  info: Any, folder: pathlib.Path, work: pathlib.Path
) -> None:
  """Converts the shards that are not converted yet."""
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
  """Lists the shards of all splits, and checks that they exist."""
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
  # The process id keeps concurrent runs apart.
  partial = shard.target.with_name(f'{shard.target.name}.partial.{os.getpid()}')
  writer = file_adapters.ADAPTER_FOR_FORMAT[_ARRAY_RECORD]
  try:
    records = _records(shard.source, adapter, progress)
    writer.write_examples(partial, enumerate(records))
    count = _num_records(partial)
    if count != shard.length:
      raise ValueError(
        f'{shard.source} holds {count} records, but its {_INFO} says '
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
  except Exception as error:  # tensorflow has its own errors
    raise ValueError(f'cannot read {path}: {error}') from error


def _num_records(path: pathlib.Path) -> int | None:
  """Returns the number of records; None if it is not a valid ArrayRecord."""
  if not path.is_file():
    return None
  try:
    return file_adapters.ADAPTER_FOR_FORMAT[_ARRAY_RECORD].num_examples(path)
  except Exception:  # any fault of the file
    return None


def _delete_partial_files(folder: pathlib.Path) -> None:
  """Deletes partial files of this process and of dead ones."""
  for path in folder.glob('*.partial.*'):
    process = path.suffix[1:]
    is_mine = process == str(os.getpid())
    if process.isdecimal() and (is_mine or not _is_alive(int(process))):
      path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
  with contextlib.suppress(PermissionError):  # it belongs to another user
    try:
      os.kill(process, 0)
    except ProcessLookupError:
      return False
  return True


def _write_info(info: Any, folder: pathlib.Path, work: pathlib.Path) -> None:
  """Writes the metadata, `dataset_info.json` last."""
  for path in folder.iterdir():
    is_text = path.suffix in ('.json', '.txt') or path.name == 'LICENSE'
    if is_text and path.name != _INFO:
      shutil.copyfile(path, work / path.name)
  info.file_format = _ARRAY_RECORD.value
  del info.alternative_file_formats[:]
  dataset_info.write_dataset_info_proto(info, work)
