"""A plain folder of images as a data set.

    photos/train/cat/1.jpg        photos/cat/1.jpg
    photos/train/dog/2.png        photos/dog/2.png
    photos/val/cat/3.jpg

On the left, each folder is a split. The sorted subfolders of `train` are the
classes of every split; without `train`, those of all splits together are. On
the right, the folders are the classes and all images are the split `train`.
`all` is every image of the folder. The names of splits must not contain `+`,
`[` or `/`.

A folder of training images only can hold out a test split: the images whose
hash of `<class>/<file>` is in the lowest tenth. An image stays in its split
when others are added, and every class keeps at least one training image. If no
hash is that low, the lowest is held out.

Images lie directly in the folder of their class. Links are followed. A warning
counts and names what is skipped: hidden names, other suffixes, broken links and
the like.
"""

import hashlib
import os
import pathlib
import unicodedata
from typing import Any

from nfnets_jax import paths
from nfnets_jax.data import image_files, splits

# Upper bound of the hashes of held-out images.
_TENTH = (2**128 // 10).to_bytes(16)


class FolderImages:
  """The images of one split of a folder, read lazily.

  They are ordered by a hash of their paths, the same on every machine. A slice
  such as `train[:10%]` has images of all classes, and changes little when
  images are added.

  Attributes:
    class_names: name of each label.
    note: one line about the held-out split; empty if there is none.

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

  def __init__(
    self,
    folder: str | os.PathLike[str],
    split: str,
    test_split: str | None = None,
  ):
    """Lists the images of a split.

    Args:
      folder: the folder.
      split: in TFDS notation, such as `'train[:90%]'` or `'all'`.
      test_split: the test split of the run. If the folder holds training images
        only, and not this split, it is held out from `train`.

    Raises:
      FileNotFoundError: if the folder or a split does not exist.
      ValueError: if a split has no classes or classes not in `train`, a class
        has no images, no image can be held out, or the notation is invalid.
    """
    self._folder = paths.local(folder, 'data_dir')
    wanted = splits.names(split)
    if not all(wanted):
      raise ValueError('the name of a split is missing')
    prefixes = _prefixes(self._folder)
    shown = image_files.printable(self._folder)
    held_out = _missing(test_split, prefixes)
    known = [*prefixes, held_out] if held_out else [*prefixes]
    if 'all' in wanted and 'all' not in known:
      wanted = [name for name in wanted if name != 'all'] + known
    for name in wanted:
      if name not in known:
        raise FileNotFoundError(
          f'no folder {name!r} in {shown}, which holds '
          f'{image_files.describe(self._folder)}; ' + _advice(name, prefixes)
        )
    classes = _classes(self._folder, prefixes)
    self._labels = {name: i for i, name in enumerate(classes)}
    self.class_names = tuple(map(image_files.printable, classes))
    images: dict[str, list[str]] = {}
    for name in dict.fromkeys('train' if x == held_out else x for x in wanted):
      skipped: image_files.Skipped = {}
      images[name] = self._list(prefixes[name], skipped)
      if name in wanted:
        image_files.warn(self._folder / prefixes[name], skipped)
    self.note = ''
    if held_out and 'train' in images:
      every = images['train']
      test = _hold_out(every, prefixes['train'])
      images['train'] = [path for path in every if path not in test]
      images[held_out] = [path for path in every if path in test]
      self.note = (
        f'{shown} holds training images only: {held_out!r} is {len(test):,} of '
        f'the {len(every):,}, held out by a hash of their names'
      )
    sizes = {name: len(images[name]) for name in dict.fromkeys(wanted)}
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
      'label': self._labels[path.split('/')[-2]],
      'file_name': image_files.printable(path),
      'orient': True,  # cameras store the orientation only in EXIF
    }

  def _list(self, prefix: str, skipped: image_files.Skipped) -> list[str]:
    """Returns the images of a split, relative to the root folder."""
    images: list[str] = []
    for name in _class_folders(self._folder, prefix, skipped):
      path = self._folder / prefix / name
      if name not in self._labels:
        twins = [x for x in self._labels if _composed(x) == _composed(name)]
        hint = (
          f'; its {twins[0]} differs in the Unicode form of the accents only: '
          'rename the folder'
          if twins
          else ''
        )
        raise ValueError(
          f'{image_files.printable(path)} is not a class of '
          f'{image_files.printable(self._folder / "train")}, which has '
          f'{image_files.shorten(list(self._labels))}{hint}'
        )
      others: image_files.Skipped = {}
      files = image_files.walk(path, others, deep=False)
      if not files:
        raise ValueError(
          f'no images ({", ".join(image_files.SUFFIXES)}) in '
          f'{image_files.printable(path)}, which holds '
          f'{image_files.describe(path)}'
        )
      images += [f'{prefix}{name}/{file}' for file in files]
      for reason, names in others.items():
        skipped.setdefault(reason, []).extend(
          f'{prefix}{name}/{other}' for other in names
        )
    return sorted(images, key=_hash)


def find_test_split(folder: str | os.PathLike[str]) -> str | None:
  """Returns the split to evaluate on, None if there are training images only.

  It is the first of `validation`, `val` and `test`, else the first that is not
  `train`.

  Raises:
    FileNotFoundError: if the folder does not exist or is empty.

  Example:
    >>> import tempfile
    >>> root = pathlib.Path(tempfile.mkdtemp())
    >>> for name in 'train', 'sketch', 'val':
    ...   (root / name / 'cat').mkdir(parents=True)
    >>> find_test_split(root)
    'val'
  """
  found = _prefixes(paths.local(folder, 'data_dir'))
  names = [x for x in ('validation', 'val', 'test', *found) if x in found]
  return next((name for name in names if name != 'train'), None)


def _prefixes(root: pathlib.Path) -> dict[str, str]:
  """Maps the splits of a folder to the prefix of their paths."""
  if not root.is_dir():
    raise FileNotFoundError(f'there is no folder {image_files.printable(root)}')
  names = sorted(
    x.name
    for x in image_files.entries(root)
    if image_files.reason_to_skip(x) == image_files.A_FOLDER
  )
  if 'train' not in names and any(
    not image_files.reason_to_skip(entry)
    for name in names
    for entry in image_files.entries(root / name)
  ):
    return {'train': ''}
  if not names:
    raise FileNotFoundError(
      f'no folder in {image_files.printable(root)}, which holds '
      f'{image_files.describe(root)}; images lie in <class>/ or '
      '<split>/<class>/'
    )
  names.sort(key=lambda name: name != 'train')
  return {name: f'{name}/' for name in names}


def _missing(test_split: str | None, prefixes: dict[str, str]) -> str | None:
  """Returns the split to hold out, if any."""
  if test_split is None or [*prefixes] != ['train']:
    return None
  names = [x for x in splits.names(test_split) if x not in ('train', 'all')]
  return names[0] if names else None


def _advice(missing: str, prefixes: dict[str, str]) -> str:
  """Returns what to do about a split that is missing."""
  if prefixes == {'train': ''}:
    return 'these are classes, and their images the split train'
  for name in prefixes:
    if name.casefold() == missing.casefold():
      return f'rename {name!r} to {missing!r}'
  layouts = 'images lie in <split>/<class>/'
  return layouts if 'train' in prefixes else f'{layouts} or <class>/, no deeper'


def _hold_out(images: list[str], prefix: str) -> set[str]:
  """Returns the images of the held-out split."""
  hashes = {path: _hash(path.removeprefix(prefix)) for path in images}
  by_class: dict[str, list[str]] = {}
  for path in sorted(images, key=hashes.__getitem__):
    by_class.setdefault(path.split('/')[-2], []).append(path)
  spare = [path for found in by_class.values() for path in found[:-1]]
  if not spare:
    raise ValueError(
      'every class has a single image, so none can be held out for testing; '
      'add images, or set data.test_split=train'
    )
  lowest = min(spare, key=hashes.__getitem__)
  return {path for path in spare if hashes[path] < _TENTH} | {lowest}


def _classes(root: pathlib.Path, prefixes: dict[str, str]) -> list[str]:
  """Returns the sorted class names of all splits."""
  sources = ['train'] if 'train' in prefixes else prefixes
  return sorted(
    {x for name in sources for x in _class_folders(root, prefixes[name], {})}
  )


def _class_folders(
  root: pathlib.Path, prefix: str, skipped: image_files.Skipped
) -> list[str]:
  """Returns the sorted class folders of a split."""
  classes = []
  path = root / prefix
  for entry in image_files.entries(path):
    reason = image_files.reason_to_skip(entry)
    if reason == image_files.A_FOLDER:
      classes.append(entry.name)
    else:
      reason = reason or 'images outside the folders of the classes'
      skipped.setdefault(reason, []).append(prefix + entry.name)
  if not classes:
    shown = image_files.printable(path)
    raise ValueError(
      f'no folder in {shown}, which holds {image_files.describe(path)}; images '
      f'lie in {shown}/<class>/'
    )
  return classes


def _composed(name: str) -> str:
  return unicodedata.normalize('NFC', name)


def _hash(path: str) -> bytes:
  return hashlib.blake2b(os.fsencode(path), digest_size=16).digest()
