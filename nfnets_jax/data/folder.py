"""A plain folder of images as a data set: `train/<class>/*.jpg`.

    DIR/train/cat/1.jpg
    DIR/train/dog/2.png
    DIR/val/cat/3.jpg

The folders in DIR are the splits, of any name but for `train`, which must be
there: the names of its folders, sorted, are the classes of every split. Images
lie in the folder of their class, not deeper. Names that begin with a dot are
passed over, and so are files with other suffixes, of which a warning says how
many there are.
"""

import hashlib
import os
import pathlib
from typing import Any

from absl import logging

from nfnets_jax.data import splits

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp')  # in any case


class FolderImages:
  """The images of a split of a folder; they are read when they are asked for.

  Their order is a hash of their paths, the same on every machine: a slice such
  as `train[:10%]` has images of all classes, and stays nearly the same when
  images are added.

  Example:
    >>> import tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for name in 'cat', 'dog':
    ...   path = folder / 'train' / name / '1.jpg'
    ...   path.parent.mkdir(parents=True)
    ...   _ = path.write_bytes(b'a JPEG file')
    >>> images = FolderImages(folder, split='train')
    >>> images.class_names
    ('cat', 'dog')
    >>> images[0]
    {'image': b'a JPEG file', 'label': 1, 'file_name': 'train/dog/1.jpg'}
  """

  def __init__(self, folder: str | os.PathLike[str], split: str):
    """Lists the images.

    Args:
      folder: the folder that holds the splits.
      split: in TFDS' notation: `'train[:90%]'`, `'val'`.

    Raises:
      FileNotFoundError: if the folder or a split is not there.
      ValueError: if a split holds no classes, or others than `train`, if a
        class holds no images, or if the notation is wrong.
    """
    self._folder = pathlib.Path(folder).expanduser()
    if not all(splits.names(split)):
      raise ValueError('the name of a split is missing')
    if not self._folder.is_dir():
      raise FileNotFoundError(f'there is no folder {self._folder}')
    self.class_names = tuple(self._classes('train'))
    self._labels = {name: i for i, name in enumerate(self.class_names)}
    paths = {name: self._images(name) for name in splits.names(split)}
    sizes = {name: len(images) for name, images in paths.items()}
    # Strings, not Path objects, which take ten times the memory.
    self._paths = [
      paths[name][i]
      for name, numbers in splits.ranges(split, sizes)
      for i in numbers
    ]

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int, /) -> dict[str, Any]:
    path = self._paths[index]
    return {
      'image': (self._folder / path).read_bytes(),
      'label': self._labels[path.split('/')[1]],
      'file_name': path,
    }

  def _classes(self, split: str) -> list[str]:
    """Returns the names of a split's classes, sorted."""
    path = self._folder / split
    if not path.is_dir():
      raise FileNotFoundError(
        f'no folder {split!r} in {self._folder}, which holds '
        f'{_summary(self._folder)}; images lie in <split>/<class>/'
      )
    classes = sorted(entry.name for entry in _entries(path) if entry.is_dir())
    if not classes:
      raise ValueError(
        f'no folder in {path}, which holds {_summary(path)}; images lie in '
        f'{path}/<class>/'
      )
    return classes

  def _images(self, split: str) -> list[str]:
    """Returns the images of a split, relative to the whole folder."""
    images: list[str] = []
    others: list[str] = []
    for name in self._classes(split):
      path = self._folder / split / name
      if name not in self._labels:
        raise ValueError(
          f'{path} is no class of {self._folder / "train"}, which has '
          f'{_shorten(self.class_names)}'
        )
      found: list[str] = []
      for entry in _entries(path):
        if not entry.is_dir():
          is_image = entry.name.lower().endswith(SUFFIXES)
          (found if is_image else others).append(f'{split}/{name}/{entry.name}')
      if not found:
        raise ValueError(
          f'no images ({", ".join(SUFFIXES)}) in {path}, which holds '
          f'{_summary(path)}'
        )
      images += found
    if others:
      logging.warning(
        '%s: passed over %s files that are not named as images (%s): %s',
        self._folder / split,
        f'{len(others):,}',
        ', '.join(SUFFIXES),
        _shorten(sorted(others)),
      )
    return sorted(images, key=_hash)


def _entries(path: pathlib.Path) -> list[os.DirEntry[str]]:
  with os.scandir(path) as entries:
    return [entry for entry in entries if not entry.name.startswith('.')]


def _hash(path: str) -> bytes:
  return hashlib.blake2b(os.fsencode(path), digest_size=16).digest()


def _summary(path: pathlib.Path) -> str:
  entries = _entries(path)
  names = (entry.name + '/' * entry.is_dir() for entry in entries)
  return _shorten(sorted(names))


def _shorten(names: list[str] | tuple[str, ...]) -> str:
  if not names:
    return 'nothing'
  more = f' and {len(names) - 5:,} more' if len(names) > 5 else ''
  return ', '.join(names[:5]) + more
