"""A plain folder of images as a data set: `train/<class>/*.jpg`.

    DIR/train/cat/1.jpg
    DIR/train/dog/2.png
    DIR/val/cat/3.jpg

The folders in DIR are the splits. Their names must not contain `+`, `[` or `/`.
`train` is required: its subfolders, sorted, are the classes of every split.
Images lie directly in the folder of their class. Links are followed. A warning
counts and names what is skipped: hidden names, other suffixes, broken links and
the like.
"""

import hashlib
import os
import pathlib
from typing import Any

from absl import logging

from nfnets_jax import paths
from nfnets_jax.data import splits

# Case-insensitive.
SUFFIXES = (
  '.jpg',
  '.jpeg',
  '.jfif',
  '.png',
  '.webp',
  '.bmp',
  '.gif',
  '.tif',
  '.tiff',
)

_A_FOLDER = 'folders inside the folder of a class'

# Skipped names by reason.
PassedOver = dict[str, list[str]]


def walk(
  folder: str | os.PathLike[str], passed_over: PassedOver, deep: bool = True
) -> list[str]:
  """Lists the images in a folder as relative paths, sorted by their parts.

  Args:
    folder: where to look.
    passed_over: filled with the skipped names by reason.
    deep: whether to recurse. Links are followed unless they form a cycle.

  Raises:
    OSError: if the folder itself cannot be read.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as name:
    ...   for file in 'b.jpg', 'a.TIF', 'notes.txt':
    ...     (pathlib.Path(name) / file).touch()
    ...   walk(name, {})
    ['a.TIF', 'b.jpg']
  """
  root = pathlib.Path(folder)
  images = []
  pending: list[tuple[str, frozenset[tuple[int, int]]]] = [('', frozenset())]
  while pending:
    prefix, above = pending.pop()
    path = root / prefix
    try:
      status = path.stat()
      entries = _entries(path)
    except OSError:
      if not prefix:
        raise
      passed_over.setdefault('folders that cannot be read', []).append(prefix)
      continue
    key = (status.st_dev, status.st_ino)
    if key in above:
      reason = 'links to a folder that they lie in'
      passed_over.setdefault(reason, []).append(prefix)
      continue
    for entry in entries:
      name = prefix + entry.name
      reason = _why_not_an_image(entry)
      if not reason:
        images.append(name)
      elif deep and reason == _A_FOLDER:
        pending.append((name + '/', above | {key}))
      else:
        passed_over.setdefault(reason, []).append(name)
  return sorted(images, key=lambda name: name.split('/'))


def warn(folder: str | os.PathLike[str], passed_over: PassedOver) -> None:
  """Logs a warning about the names that `walk` skipped, if any."""
  if passed_over:
    reasons = [
      f'{reason}, {len(names):,}: {_shorten(sorted(names))}'
      for reason, names in passed_over.items()
    ]
    logging.warning('%s: passed over %s', printable(folder), '; '.join(reasons))


def printable(path: str | os.PathLike[str]) -> str:
  r"""Escapes bytes that are not UTF-8 and control characters of a path.

  Example:
    >>> printable(os.fsdecode(b'caf\xe9/a\n.jpg'))
    'caf\\xe9/a\\n.jpg'
  """
  text = os.fsencode(path).decode(errors='backslashreplace')
  return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class FolderImages:
  """The images of one split of a folder, read lazily.

  They are ordered by a hash of their paths, the same on every machine. A slice
  such as `train[:10%]` has images of all classes, and changes little when
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
    >>> images[0]['file_name'], images[0]['label'], images[0]['image']
    ('train/dog/1.jpg', 1, b'a JPEG file')
  """

  def __init__(self, folder: str | os.PathLike[str], split: str):
    """Lists the images of a split in TFDS notation, such as `'train[:90%]'`.

    Raises:
      FileNotFoundError: if the folder or a split does not exist.
      ValueError: if a split has no classes or classes not in `train`, a class
        has no images, or the notation is invalid.
    """
    self._folder = paths.expand(folder, 'data_dir')
    if not all(splits.names(split)):
      raise ValueError('the name of a split is missing')
    if not self._folder.is_dir():
      raise FileNotFoundError(f'there is no folder {printable(self._folder)}')
    classes = self._classes('train', {})
    self._labels = {name: i for i, name in enumerate(classes)}
    self.class_names = tuple(map(printable, classes))
    images = {name: self._images(name) for name in splits.names(split)}
    sizes = {name: len(files) for name, files in images.items()}
    # Strings: Path objects take ten times the memory.
    self._paths = [
      images[name][i]
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
      'file_name': printable(path),
      'orient': True,  # cameras store the orientation only in EXIF
    }

  def _classes(self, split: str, passed_over: PassedOver) -> list[str]:
    """Returns the sorted class names of a split."""
    path = self._folder / split
    if '/' in split or split.startswith('.') or not path.is_dir():
      raise FileNotFoundError(
        f'no folder {split!r} in {printable(self._folder)}, which holds '
        f'{_summary(self._folder)}; images lie in <split>/<class>/'
      )
    classes = []
    for entry in _entries(path):
      reason = _why_not_an_image(entry)
      if reason == _A_FOLDER:
        classes.append(entry.name)
      else:
        reason = reason or 'images outside the folders of the classes'
        passed_over.setdefault(reason, []).append(f'{split}/{entry.name}')
    if not classes:
      raise ValueError(
        f'no folder in {printable(path)}, which holds {_summary(path)}; images '
        f'lie in {printable(path)}/<class>/'
      )
    return sorted(classes)

  def _images(self, split: str) -> list[str]:
    """Returns the images of a split, relative to the root folder."""
    images: list[str] = []
    passed_over: PassedOver = {}
    for name in self._classes(split, passed_over):
      path = self._folder / split / name
      if name not in self._labels:
        raise ValueError(
          f'{printable(path)} is no class of '
          f'{printable(self._folder / "train")}, which has '
          f'{_shorten(list(self._labels))}'
        )
      skipped: PassedOver = {}
      files = walk(path, skipped, deep=False)
      if not files:
        raise ValueError(
          f'no images ({", ".join(SUFFIXES)}) in {printable(path)}, which '
          f'holds {_summary(path)}'
        )
      images += [f'{split}/{name}/{file}' for file in files]
      for reason, names in skipped.items():
        passed_over.setdefault(reason, []).extend(
          f'{split}/{name}/{other}' for other in names
        )
    warn(self._folder / split, passed_over)
    return sorted(images, key=_hash)


def _why_not_an_image(entry: os.DirEntry[str]) -> str:
  """Returns the reason to skip an entry; '' for an image."""
  if entry.name.startswith('.'):
    return 'hidden files or folders'
  try:
    if entry.is_dir():
      return _A_FOLDER
    if entry.is_file():
      is_image = entry.name.lower().endswith(SUFFIXES)
      suffixes = ', '.join(SUFFIXES)
      return (
        '' if is_image else f'files that are not named as images ({suffixes})'
      )
  except OSError:  # such as a cycle of links
    pass
  return 'broken links' if entry.is_symlink() else 'pipes, sockets or devices'


def _entries(path: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
  with os.scandir(path) as entries:
    return sorted(entries, key=lambda entry: entry.name)


def _hash(path: str) -> bytes:
  return hashlib.blake2b(os.fsencode(path), digest_size=16).digest()


def _summary(path: pathlib.Path) -> str:
  entries = [x for x in _entries(path) if not x.name.startswith('.')]
  return _shorten([entry.name + '/' * entry.is_dir() for entry in entries])


def _shorten(names: list[str]) -> str:
  if not names:
    return 'nothing'
  more = f' and {len(names) - 5:,} more' if len(names) > 5 else ''
  return ', '.join(map(printable, names[:5])) + more
