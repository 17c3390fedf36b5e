"""Finds and reads prepared data sets."""

import dataclasses
import difflib
import json
import operator
import os
import pathlib
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf import json_format
from tensorflow_datasets.core import file_adapters, naming

import nfnets_jax.data.digits  # noqa: F401, registers itself with TFDS
from nfnets_jax import paths
from nfnets_jax.data import decode, folder, splits

# Data sets that need no preparation.
UNPREPARED = ('fake', 'folder')

_DATA_DIR_VARIABLE = 'TFDS_DATA_DIR'
_FAKE_SPLITS = {'train': 1_281_167, 'validation': 50_000}  # as ImageNet
_FAKE_CLASSES = 1000
_FAKE_SHAPE = (256, 256, 3)


class Source(Protocol):
  """Random access to examples; thread-safe."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class LabelError(ValueError):
  """The label is out of range; the message names the example."""


@dataclasses.dataclass(frozen=True)
class Dataset:
  """One split of an image classification data set.

  Attributes:
    name: TFDS name, `fake` or `folder`.
    split: in TFDS notation.
    source: the examples, `{'image': encoded bytes, 'label': int}`; images of
      `fake` are uint8 `[H, W, 3]`. There may be other features, such as
      `file_name` (bytes from TFDS, a string from `folder`). Examples of
      `folder` have `'orient': True`.
    class_names: name of each label.
    in_memory: whether decoded examples are kept in memory.
    note: one line for the user about the split, such as that it is held out
      from the training images; usually empty.
  """

  name: str
  split: str
  source: Source
  class_names: tuple[str, ...]
  in_memory: bool = False
  note: str = ''

  def __len__(self) -> int:
    return len(self.source)

  @property
  def num_classes(self) -> int:
    """Number of classes; labels are 0 to num_classes - 1."""
    return len(self.class_names)


def load(
  name: str,
  split: str,
  data_dir: str | os.PathLike[str] | None = None,
  test_split: str | None = None,
) -> Dataset:
  """Opens one split of a prepared data set.

  Args:
    name: any TFDS data set with the features `image` and `label`, such as
      `'digits'`, `'cifar10'` or `'imagenet2012'`, including those that exist
      only as files in `data_dir`. `'folder'` is a folder of images,
      `<data_dir>/train/<class>/*.jpg` or `<data_dir>/<class>/*.jpg`; see the
      module `folder`. `'fake'` needs no files: 256 x 256 noise, a function of
      the index, with the splits and 1,000 classes of ImageNet.
    split: in TFDS notation: `'train'`, `'train[10000:]'`, `'train[:5%]'`,
      `'train+validation'`.
    data_dir: root of the data sets, by default $TFDS_DATA_DIR or
      `~/tensorflow_datasets`. Never written to.
    test_split: the run's test split, only for `folder`: if the folder has
      training images only, it is held out from `train`; see `folder`. Give the
      same for both splits of a run.

  Returns:
    The split, read lazily. It can be pickled.

  Raises:
    ValueError: if the data set or split does not exist or is unsuitable; if
      files are missing, empty or corrupt (all must exist, the first and the
      last are opened); or if `data_dir` has characters that TFDS reads as a
      pattern, such as brackets, except for `folder`.
    LabelError: if the first example has no label, as in the test split of
      `imagenet2012`.
    FileNotFoundError: if the data set is not prepared, or the folder or a split
      of it does not exist.

  Example:
    >>> dataset = load('fake', split='train[:100]')
    >>> len(dataset), dataset.num_classes
    (100, 1000)
    >>> dataset.source[0]['image'].shape
    (256, 256, 3)
  """
  if name == 'fake':
    names = tuple(str(label) for label in range(_FAKE_CLASSES))
    return Dataset(name, split, _FakeImages(split), names)
  if name == 'folder':
    if data_dir is None:
      raise ValueError("data set 'folder' needs data_dir, the folder to read")
    try:
      images = folder.FolderImages(data_dir, split, test_split)
    except ValueError as error:
      raise ValueError(
        f'cannot read split {split!r} of folder {data_dir}: {error}'
      ) from error
    return Dataset(name, split, images, images.class_names, note=images.note)

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
  remedy = _prepare_anew(pathlib.Path(builder.data_dir), name, data_dir)
  _check_files(builder, [x.filename for x in part.file_instructions], remedy)
  dataset = Dataset(name, split, source, tuple(fields['label'].names))
  try:
    first = source[0]
  except Exception:  # the loader reports or skips it
    return dataset
  check_label(dataset, 0, first)
  return dataset


def check_label(
  dataset: Dataset, index: int, example: Mapping[str, Any]
) -> int:
  """Returns the label of an example after checking its range.

  Raises:
    LabelError: if the label is not an integer in [0, num_classes - 1].

  Example:
    >>> dataset = load('fake', split='train[:3]')
    >>> check_label(dataset, 2, {'label': 1000})
    Traceback (most recent call last):
      ...
    nfnets_jax.data.datasets.LabelError: fake split train[:3]: example 2 has ...
  """
  label: Any = example.get('label')
  try:
    number = operator.index(label)
  except TypeError:
    number = -1
  if not 0 <= number < dataset.num_classes:
    note = '; a split without labels has -1' if number == label == -1 else ''
    raise LabelError(
      f'{dataset.name} split {dataset.split}: example {index} has the label '
      f'{label!r}, and labels are integers from 0 to '
      f'{dataset.num_classes - 1}{note}'
    )
  return number


@dataclasses.dataclass(frozen=True)
class _Selected:
  """The examples of some classes, whose labels are indices into `classes`."""

  source: Source
  indices: np.ndarray
  classes: np.ndarray  # sorted

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int, /) -> dict[str, Any]:
    example = self.source[int(self.indices[index])]
    label = np.searchsorted(self.classes, int(example['label']))
    return {**example, 'label': int(label)}


def select_classes(dataset: Dataset, classes: str) -> Dataset:
  """Keeps only some classes, relabelled from 0.

  Reads all examples once for their labels.

  Args:
    dataset: a split.
    classes: 'FIRST-LAST', both inclusive and counted from 0, or 'present', the
      classes that have examples.

  Raises:
    ValueError: if the range is invalid or has no examples.
    LabelError: if a label is out of range.

  Example:
    >>> few = select_classes(load('fake', split='train[:2000]'), '10-14')
    >>> few.class_names, int(few.source[0]['label']) in range(5)
    (('10', '11', '12', '13', '14'), True)
  """
  match = re.fullmatch(r'(\d+)-(\d+)', classes)
  first, last = (int(x) for x in match.groups()) if match else (1, 0)
  if classes != 'present' and not first <= last < dataset.num_classes:
    count = dataset.num_classes
    raise ValueError(
      f'data.classes {classes!r} is no range of the {count} classes of '
      f"{dataset.name}; use one such as '0-{count - 1}', or 'present'"
    )
  labels = np.asarray(
    [check_label(dataset, i, x) for i, x in enumerate(_all(dataset.source))]
  )
  kept = np.arange(first, last + 1) if match else np.unique(labels)
  indices = np.flatnonzero(np.isin(labels, kept))
  if not indices.size:
    raise ValueError(
      f'{dataset.name} {dataset.split} has no example of the classes {classes}'
    )
  names = tuple(dataset.class_names[label] for label in kept)
  source = _Selected(dataset.source, indices, kept)
  return dataclasses.replace(dataset, source=source, class_names=names)


def file_name(example: dict[str, Any]) -> str | None:
  """Returns the name of an example's file as text, None if it has none."""
  name = example.get('file_name')
  return (
    name.decode(errors='backslashreplace') if isinstance(name, bytes) else name
  )


class _Kept:
  """Caches decoded examples of a source in memory."""

  def __init__(self, source: Source):
    self._source = source
    # If two threads read the same example, they store equal values.
    self._examples: dict[int, dict[str, Any]] = {}

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int, /) -> dict[str, Any]:
    if index not in self._examples:
      example = self._source[index]
      try:
        image = decode.decode(example['image'], example.get('orient', False))
      except ValueError as error:
        raise ValueError(f'{file_name(example)}: {error}') from error
      self._examples[index] = {**example, 'image': image}
    return self._examples[index]


def keep_in_memory(dataset: Dataset) -> Dataset:
  """Caches decoded examples in memory, as uint8 `[H, W, 3]`.

  For many epochs of small images, where reading and decoding dominate. Each
  worker process has its own cache.

  Example:
    >>> kept = keep_in_memory(load('fake', split='train[:2]'))
    >>> kept.source[1] is kept.source[1]
    True
  """
  kept = _Kept(dataset.source)
  return dataclasses.replace(dataset, source=kept, in_memory=True)


def _all(source: Source) -> Iterator[dict[str, Any]]:
  return (source[i] for i in range(len(source)))


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
      f'unknown data set {name!r}: TFDS has none of that name, and {root} '
      f'holds none{hint}'
    ) from error
  except AssertionError as error:  # no such version
    raise ValueError(str(error)) from error
  except ModuleNotFoundError as error:
    raise ValueError(
      f'data set {name!r} takes a package that is not installed ({error}); '
      'install it, or name a data set of the TFDS catalogue'
    ) from error
  except (json_format.ParseError, json.JSONDecodeError) as error:
    path = _damaged_description(name, root)
    remedy = _prepare_anew(path.parent, name, data_dir)
    raise ValueError(f'{path} is damaged: {error}\n{remedy}') from error


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
  if data_dir is not None:
    return paths.expand_literal(data_dir, 'data_dir')
  default = paths.from_environment(_DATA_DIR_VARIABLE, '~/tensorflow_datasets')
  return paths.expand_literal(default, f'${_DATA_DIR_VARIABLE}')


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
    f'{file_format.value}, which has no random access; convert it, which takes '
    f'tensorflow, with: {command}'
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
    'FOLDER being where ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar are'
  )


def _other_versions(builder: tfds.core.DatasetBuilder) -> str:
  """Lists the other versions that are prepared, for an error message."""
  infos = pathlib.Path(builder.data_dir).parent.glob('*/dataset_info.json')
  names = [
    repr(f'{_without_version(builder)}:{path.parent.name}')
    for path in sorted(infos)
    if tfds.core.Version.is_valid(path.parent.name)
  ]
  return f', which is beside {" and ".join(names)}' if names else ''


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


def _damaged_description(name: str, data_dir: pathlib.Path) -> pathlib.Path:
  """Returns the JSON file that cannot be parsed, or a placeholder."""
  parsed, _ = naming.parse_builder_name_kwargs(name)
  folder = data_dir / parsed.name
  for path in sorted(folder.rglob('*.json')):
    try:
      json.loads(path.read_bytes())
    except ValueError:
      return path
  return folder / '<version>' / 'dataset_info.json'


def _prepare_anew(
  folder: pathlib.Path, name: str, data_dir: str | os.PathLike[str] | None
) -> str:
  return (
    f'If {folder} is damaged, delete it and prepare it anew with: '
    + _how_to_prepare(name, data_dir)
  )


class _FakeImages:
  """Noise and labels, generated from the index."""

  def __init__(self, split: str):
    # Splits have disjoint seeds.
    first, total = {}, 0
    for name, size in _FAKE_SPLITS.items():
      first[name] = total
      total += size
    self._seeds = np.concatenate(
      [
        first[name] + np.arange(numbers.start, numbers.stop)
        for name, numbers in splits.ranges(split, _FAKE_SPLITS)
      ]
    )

  def __len__(self) -> int:
    return len(self._seeds)

  def __getitem__(self, index: int, /) -> dict[str, Any]:
    rng = np.random.default_rng(self._seeds[index])
    return {
      'image': rng.integers(256, size=_FAKE_SHAPE, dtype=np.uint8),
      'label': int(rng.integers(_FAKE_CLASSES)),
    }
