"""Paths as users write them, in flags, configs and arguments.

Every path that a user gives is taken in here: `~` is expanded, and what a
library below would misread is refused with the option and the remedy.
"""

import argparse
import difflib
import os
import pathlib
import pwd
import re
from collections.abc import Callable

PathLike = str | os.PathLike[str]

# Orbax, tensorstore and TFDS read these as patterns or separators.
_PATTERN = re.compile(r'[*?\[\]\\\x00-\x1f\x7f\ud800-\udfff]')


def expand(path: PathLike, option: str = 'path') -> pathlib.Path:
  """Returns a path with `~` and `~user` expanded.

  Args:
    path: as given by a user.
    option: the flag, field or argument that it was given as, for messages.

  Returns:
    The path, absolute only if it was given so or began with `~`.

  Raises:
    ValueError: if it is empty or an address such as `gs://bucket`, or the home
      directory is unknown.

  Example:
    >>> expand('runs/digits')
    PosixPath('runs/digits')
  """
  text = os.fspath(path)
  if not text.strip():
    raise ValueError(f'{option} is empty; give a path')
  if '\0' in text:
    raise ValueError(f'{option}={text!r} has a null character; give a path')
  if re.match(r'\w+:/', text):
    raise ValueError(
      f'{option}={text} is not a path on this machine; mount the bucket or '
      'give a local path'
    )
  try:
    parts = pathlib.Path(text).parts
    if parts[:1] == ('~',) and not os.environ.get('HOME'):
      # Empty counts as unset, for which the standard library takes '/'.
      return pathlib.Path(pwd.getpwuid(os.getuid()).pw_dir, *parts[1:])
    return pathlib.Path(text).expanduser()
  except (KeyError, RuntimeError) as error:  # no home, or no such user
    raise ValueError(
      f'{option}={text}: the home directory is unknown; set HOME, or give '
      'a path without ~'
    ) from error


def expand_literal(path: PathLike, option: str = 'path') -> pathlib.Path:
  r"""As `expand`, for libraries that read some characters as patterns.

  Args:
    path: as given by a user.
    option: as for `expand`.

  Returns:
    As `expand`.

  Raises:
    ValueError: as `expand`, or if the absolute path has one of `* ? [ ] \`, a
      control character, or bytes that are not UTF-8.

  Example:
    >>> expand_literal('runs/lr=0.1')
    PosixPath('runs/lr=0.1')
  """
  expanded = expand(path, option)
  found = _PATTERN.search(str(expanded.absolute()))
  if found:
    where = '' if found[0] in os.fspath(path) else f' ({expanded.absolute()})'
    shown = os.fspath(path).encode(errors='backslashreplace').decode()
    raise ValueError(
      f'{option}={shown}{where} has {found[0]!r}, which checkpoints and data '
      'sets read as part of a pattern; use letters, digits and any of . _ - = +'
    )
  return expanded


def argument(text: str) -> pathlib.Path:
  """As `expand`, for `type=` of an argument of argparse."""
  return _argument(expand, text)


def literal_argument(text: str) -> pathlib.Path:
  """As `expand_literal`, for `type=` of an argument of argparse."""
  return _argument(expand_literal, text)


def _argument(take: Callable[[str], pathlib.Path], text: str) -> pathlib.Path:
  try:
    return take(text)
  except ValueError as error:
    # argparse shows the message of this error alone.
    raise argparse.ArgumentTypeError(str(error)) from error


def existing(
  path: PathLike, option: str = 'path', what: str = 'file or folder'
) -> pathlib.Path:
  """As `expand`, for a file or folder that must exist.

  Args:
    path: as given by a user.
    option: as for `expand`.
    what: 'file', 'folder' or 'file or folder': what it must be.

  Returns:
    As `expand`.

  Raises:
    ValueError: as `expand`.
    FileNotFoundError: if it does not exist, with similar names beside it.
    NotADirectoryError: if it is a file and must be a folder.
    IsADirectoryError: if it is a folder and must be a file.
  """
  expanded = expand(path, option)
  if expanded.is_symlink() and not expanded.exists():
    raise FileNotFoundError(
      f'{option}: {expanded} is a broken link, to {expanded.readlink()}'
    )
  if not expanded.exists():
    beside = expanded.parent
    entries = beside.iterdir() if beside.is_dir() else ()
    names = [x.name for x in entries if x.name[0] not in '._']
    similar = difflib.get_close_matches(expanded.name, sorted(names))
    hint = f'; did you mean {" or ".join(similar)}?' if similar else ''
    if not beside.is_dir():
      hint = f'; there is no folder {beside} either'
    raise FileNotFoundError(f'{option}: there is no {what} {expanded}{hint}')
  if what == 'folder' and not expanded.is_dir():
    raise NotADirectoryError(f'{option}: {expanded} is not a folder')
  if what == 'file' and expanded.is_dir():
    raise IsADirectoryError(f'{option}: {expanded} is a folder, not a file')
  return expanded


def from_environment(name: str, default: PathLike) -> pathlib.Path:
  """Returns the path in an environment variable, or the default.

  Args:
    name: of the variable; empty counts as unset.
    default: used if the variable is unset; may begin with `~`.

  Returns:
    As `expand`.

  Raises:
    ValueError: as `expand`; the message names the variable.
  """
  value = os.environ.get(name, '')
  return expand(value if value.strip() else default, f'${name}')


def read_text_lines(path: PathLike, option: str = 'path') -> list[str]:
  """Reads a list, one entry a line.

  Args:
    path: of a text file in UTF-8, or in UTF-16 with a byte-order mark.
    option: as for `expand`.

  Returns:
    The lines without their ends (LF, CRLF or CR), without a byte-order mark,
    and without empty lines at the end.

  Raises:
    ValueError: as `expand`, or if the file is not text.
    OSError: if it cannot be read.
  """
  expanded = existing(path, option, 'file')
  data = expanded.read_bytes()
  utf_16 = data.startswith((b'\xff\xfe', b'\xfe\xff'))
  try:
    text = data.decode('utf-16' if utf_16 else 'utf-8-sig')
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{option}: {expanded} is not text in UTF-8: {error.reason} at byte '
      f'{error.start}; save it as UTF-8'
    ) from error
  if '\0' in text:
    raise ValueError(
      f'{option}: {expanded} is not text in UTF-8: it has null characters; '
      'save it as UTF-8'
    )
  # str.splitlines would also split at U+2028 and other characters of a name.
  lines = re.split(r'\r\n|\n|\r', text)
  while lines and not lines[-1].strip():
    lines.pop()
  return lines
