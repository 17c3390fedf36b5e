"""Lists the image files in folders, and says what is skipped and why."""

import os
import pathlib

from absl import logging

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

A_FOLDER = 'folders inside the folder of a class'

# Skipped names by reason.
Skipped = dict[str, list[str]]


def walk(
  folder: str | os.PathLike[str], skipped: Skipped, deep: bool = True
) -> list[str]:
  """Lists the images in a folder as relative paths, sorted by their parts.

  Args:
    folder: where to look.
    skipped: filled with the skipped names by reason.
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
      inside = entries(path)
    except OSError:
      if not prefix:
        raise
      skipped.setdefault('folders that cannot be read', []).append(prefix)
      continue
    key = (status.st_dev, status.st_ino)
    if key in above:
      reason = 'links to a folder that contains them'
      skipped.setdefault(reason, []).append(prefix)
      continue
    for entry in inside:
      name = prefix + entry.name
      reason = reason_to_skip(entry)
      if not reason:
        images.append(name)
      elif deep and reason == A_FOLDER:
        pending.append((name + '/', above | {key}))
      else:
        skipped.setdefault(reason, []).append(name)
  return sorted(images, key=lambda name: name.split('/'))


def warn(folder: str | os.PathLike[str], skipped: Skipped) -> None:
  """Logs a warning about the names that `walk` skipped, if any."""
  if skipped:
    reasons = [
      f'{reason}, {len(names):,}: {shorten(sorted(names))}'
      for reason, names in skipped.items()
    ]
    logging.warning('%s: skipped %s', printable(folder), '; '.join(reasons))


def printable(path: str | os.PathLike[str]) -> str:
  r"""Escapes bytes that are not UTF-8 and control characters of a path.

  Example:
    >>> printable(os.fsdecode(b'caf\xe9/a\n.jpg'))
    'caf\\xe9/a\\n.jpg'
  """
  text = os.fsencode(path).decode(errors='backslashreplace')
  return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _is_hidden(name: str) -> bool:
  """Returns whether it is hidden, or what macOS adds to a .zip file."""
  return name.startswith('.') or name == '__MACOSX'


def reason_to_skip(entry: os.DirEntry[str]) -> str:
  """Returns the reason to skip an entry; '' for an image."""
  if _is_hidden(entry.name):
    return 'hidden files or folders'
  try:
    if entry.is_dir():
      return A_FOLDER
    if entry.is_file():
      if entry.name.lower().endswith(SUFFIXES):
        return ''
      return f'files without an image suffix ({", ".join(SUFFIXES)})'
  except OSError:  # such as a cycle of links
    pass
  return 'broken links' if entry.is_symlink() else 'pipes, sockets or devices'


def entries(path: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
  """Returns the entries of a folder, sorted by name."""
  with os.scandir(path) as found:
    return sorted(found, key=lambda entry: entry.name)


def describe(path: str | os.PathLike[str]) -> str:
  """Lists the first entries of a folder that are not hidden, for messages."""
  names = [
    entry.name + '/' * entry.is_dir()
    for entry in entries(path)
    if not _is_hidden(entry.name)
  ]
  return shorten(names)


def shorten(names: list[str]) -> str:
  """Joins the first five names, for messages."""
  if not names:
    return 'nothing'
  more = f' and {len(names) - 5:,} more' if len(names) > 5 else ''
  return ', '.join(map(printable, names[:5])) + more
