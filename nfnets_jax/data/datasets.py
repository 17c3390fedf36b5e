"""Finds prepared data sets and reads them, example by example."""

import dataclasses
import difflib
import os
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds

import nfnets_jax.data.digits  # noqa: F401, registers itself with TFDS

_FAKE_SPLITS = {'train': 1_281_167, 'validation': 50_000}  # as ImageNet
_FAKE_CLASSES = 1000
_FAKE_SHAPE = (256, 256, 3)


class Source(Protocol):
  """Random access to examples, safe to use from several threads."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Dataset:
  """One split of a data set for image classification.

  Attributes:
    name: the name that TFDS knows it by.
    split: which part, in TFDS' notation.
    source: the examples, `{'image': encoded bytes, 'label': int}`. Those of
      `fake` hold uint8 `[H, W, 3]` instead of bytes. Other features of the data
      set may be there too.
    class_names: the name of each label.
  """

  name: str
  split: str
  source: Source
  class_names: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.source)

  @property
  def num_classes(self) -> int:
    """How many labels there are, 0 to num_classes - 1."""
    return len(self.class_names)


def load(
  name: str, split: str, data_dir: str | os.PathLike[str] | None = None
) -> Dataset:
  """Opens one split of a data set that has been prepared.

  Args:
    name: any TFDS data set with the features `image` and `label`, such as
      `'digits'`, `'cifar10'` or `'imagenet2012'`, also one that TFDS knows only
      from its files in `data_dir`. `'fake'` needs no files: noise of 256 x 256
      pixels, a function of the index, in the splits and 1,000 classes of
      ImageNet.
    split: in TFDS' notation: `'train'`, `'train[10000:]'`, `'train[:5%]'`,
      `'train+validation'`.
    data_dir: where data sets are kept, `~/tensorflow_datasets` by default. It
      is only read.

  Returns:
    The split; its examples are read when they are asked for.

  Raises:
    ValueError: if there is no such data set or split, or it does not suit.
    FileNotFoundError: if the data set is not prepared.

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

  builder = find(name, data_dir)
  if not builder.is_prepared():
    raise FileNotFoundError(
      f'data set {name!r} is not prepared in {builder.data_dir}; prepare it '
      f'with: {_command(name, data_dir)}'
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
  try:
    source = builder.as_data_source(
      split=split, decoders={'image': tfds.decode.SkipDecoding()}
    )
  except NotImplementedError as error:
    raise ValueError(
      f'data set {name!r} in {builder.data_dir} is in the format '
      f'{builder.info.file_format}, which has no random access; prepare it in '
      f'another folder with: {_command(name, "DIR")}'
    ) from error
  except ValueError as error:
    raise ValueError(
      f'cannot read split {split!r} of data set {name!r}: {error}'
    ) from error
  return Dataset(name, split, source, tuple(fields['label'].names))


def find(
  name: str, data_dir: str | os.PathLike[str] | None = None
) -> tfds.core.DatasetBuilder:
  """Finds the TFDS builder of a data set, prepared or not.

  Args:
    name: the name of a data set, as in `load`.
    data_dir: where data sets are kept, `~/tensorflow_datasets` by default.

  Returns:
    The builder.

  Raises:
    ValueError: if neither TFDS nor `data_dir` has such a data set.

  Example:
    >>> find('digits').name
    'digits'
  """
  try:
    return tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError as error:
    known = tfds.list_builders(with_community_datasets=False)
    similar = difflib.get_close_matches(name, known)
    hint = f'; did you mean {" or ".join(similar)}?' if similar else ''
    raise ValueError(
      f'unknown data set {name!r}: TFDS has none of that name, and '
      f'{data_dir or "its default folder"} holds none{hint}'
    ) from error


def _command(name: str, data_dir: str | os.PathLike[str] | None) -> str:
  option = f' --data_dir={os.fspath(data_dir)}' if data_dir else ''
  return f'python -m nfnets_jax.data.prepare {name}{option}'


class _FakeImages:
  """Noise and labels, made from the index when they are asked for."""

  def __init__(self, split: str):
    infos = {
      name: tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0)
      for name, size in _FAKE_SPLITS.items()
    }
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    # One seed for every example: those of a split follow those of the last.
    seeds, first = {}, 0
    for name, size in _FAKE_SPLITS.items():
      seeds[name] = np.arange(first, first + size)
      first += size
    self._seeds = np.concatenate(
      [seeds[part.splitname][part.from_ : part.to] for part in parts]
    )

  def __len__(self) -> int:
    return len(self._seeds)

  def __getitem__(self, index: int, /) -> dict[str, Any]:
    rng = np.random.default_rng(self._seeds[index])
    return {
      'image': rng.integers(256, size=_FAKE_SHAPE, dtype=np.uint8),
      'label': int(rng.integers(_FAKE_CLASSES)),
    }
