"""Finds and reads prepared data sets."""

import dataclasses
import operator
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from nfnets_jax.data import builders, decode, folder, imagenet, splits

_FAKE_CLASSES = 1000  # as ImageNet, with its splits
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
      `'digits'`, `'cifar10'` or `'imagenet2012'`, or the folder of a prepared
      one, such as `'/data/mine/1.0.0'`; see `builders.find`. `'folder'` is a
      folder of images, `<data_dir>/train/<class>/*.jpg` or
      `<data_dir>/<class>/*.jpg`; see the module `folder`. `'fake'` needs no
      files: 256 x 256 noise, a function of the index, with the splits and 1,000
      classes of ImageNet.
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

  source, class_names = builders.read(name, split, data_dir)
  dataset = Dataset(name, split, source, class_names)
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
      f'data.classes {classes!r} is not a range of the {count} classes of '
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


class _FakeImages:
  """Noise and labels, generated from the index."""

  def __init__(self, split: str):
    # Splits have disjoint seeds.
    first, total = {}, 0
    for name, size in imagenet.SPLITS.items():
      first[name] = total
      total += size
    self._seeds = np.concatenate(
      [
        first[name] + np.arange(numbers.start, numbers.stop)
        for name, numbers in splits.ranges(split, imagenet.SPLITS)
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
