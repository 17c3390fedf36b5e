"""Paths as users write them, in flags, configs and arguments.

Every path from a user passes through here: `~` is expanded, and characters that
a library would misread raise an error with the option and the remedy.

Runs, weights and the compilation cache may also be in a bucket, `gs://…` or
`s3://…`: an `epath.Path` reads and writes both, through gcsfs and s3fs. All
other paths are local.
"""

import argparse
import difflib
import os
import pathlib
import pwd
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from nfnets_jax import extras

# etils prefers tensorflow, which is slow to load and reads fewer buckets.
os.environ.setdefault('EPATH_USE_TF', 'false')

PathLike = str | os.PathLike[str]
# Local, or in a bucket as well. etils is imported once it is needed.
if TYPE_CHECKING:
  from etils import epath

  Path: TypeAlias = pathlib.Path | epath.Path
else:
  Path = os.PathLike[str]

# The package behind each scheme, and its name in the settings of fsspec.
_SCHEMES = {'gs': ('gcsfs', 'gcs'), 's3': ('s3fs', 's3')}

# Orbax, tensorstore and TFDS read these as patterns or separators.
_PATTERN = re.compile(r'[*?\[\]\\\x00-\x1f\x7f\ud800-\udfff]')


def expand(path: PathLike, option: str = 'path') -> Path:
  """Returns a path, local or in a bucket, with `~` and `~user` expanded.

  Args:
    path: as given by a user.
    option: the flag, field or argument that holds it, for messages.

  Returns:
    The path; a relative path stays relative.

  Raises:
    ValueError: if it is empty, a URL other than `gs://…` and `s3://…`, or the
      home directory is unknown.
    ModuleNotFoundError: if the bucket needs a package that is not installed.

  Example:
    >>> expand('runs/digits')
    PosixGPath('runs/digits')
  """
  from etils import epath

  text = os.fspath(path)
  match = re.match(r'(\w+):/', text)
  if match is None:
    return epath.Path(local(path, option))
  scheme, _, rest = text.partition('://')
  if scheme not in _SCHEMES or not rest.strip('/'):
    raise ValueError(
      f'{option}={text} is not a path; buckets are gs://BUCKET/FOLDER and '
      's3://BUCKET/FOLDER'
    )
  package, settings = _SCHEMES[scheme]
  extras.need('buckets', package)
  import fsspec.config

  # Other processes write there too.
  fsspec.config.conf.setdefault(settings, {})['use_listings_cache'] = False
  return epath.Path(text)


def local(path: PathLike, option: str = 'path') -> pathlib.Path:
  """Calls `expand`, and refuses buckets.

  Raises:
    ValueError: as in `expand`, or if it is a URL.

  Example:
    >>> local('photographs')
    PosixPath('photographs')
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
      # Treat empty as unset, for which the standard library assumes '/'.
      return pathlib.Path(pwd.getpwuid(os.getuid()).pw_dir, *parts[1:])
    return pathlib.Path(text).expanduser()
  except (KeyError, RuntimeError) as error:  # no home, or no such user
    raise ValueError(
      f'{option}={text}: the home directory is unknown; set HOME, or give '
      'a path without ~'
    ) from error


def expand_literal(path: PathLike, option: str = 'path') -> Path:
  r"""Calls `expand`, for libraries that read some characters as patterns.

  Raises:
    ValueError: as in `expand`, or if the absolute path has one of `* ? [ ] \`,
      a control character, or bytes that are not UTF-8.
    ModuleNotFoundError: as in `expand`.

  Example:
    >>> expand_literal('runs/lr=0.1')
    PosixGPath('runs/lr=0.1')
  """
  expanded = expand(path, option)
  _check_literal(path, os.fspath(absolute(expanded)), option)
  return expanded


def local_literal(path: PathLike, option: str = 'path') -> pathlib.Path:
  """Calls `expand_literal`, and refuses buckets."""
  expanded = local(path, option)
  _check_literal(path, os.fspath(expanded.absolute()), option)
  return expanded


def _check_literal(path: PathLike, full: str, option: str) -> None:
  match = _PATTERN.search(full)
  if match:
    where = '' if match[0] in os.fspath(path) else f' ({full})'
    shown = os.fspath(path).encode(errors='backslashreplace').decode()
    raise ValueError(
      f'{option}={shown}{where} has {match[0]!r}, which checkpoints and data '
      'sets read as part of a pattern; use letters, digits and any of . _ - = +'
    )


def in_bucket(path: PathLike) -> bool:
  """Returns whether a path is a URL.

  Example:
    >>> in_bucket('gs://bucket/digits'), in_bucket('runs/digits')
    (True, False)
  """
  return '://' in os.fspath(path)


def absolute(path: PathLike) -> Path:
  """Returns an absolute path; a URL is one, which etils does not know."""
  from etils import epath

  if in_bucket(path):
    return epath.Path(path)
  return epath.Path(pathlib.Path(path).absolute())


def argument(text: str) -> pathlib.Path:
  """Calls `local`, as the `type` of an argparse argument."""
  return _argument(local, text)


def literal_argument(text: str) -> pathlib.Path:
  """Calls `local_literal`, as the `type` of an argparse argument."""
  return _argument(local_literal, text)


def _argument(take: Callable[[str], pathlib.Path], text: str) -> pathlib.Path:
  try:
    return take(text)
  except ValueError as error:
    # argparse shows the message of this type only.
    raise argparse.ArgumentTypeError(str(error)) from error


def existing(
  path: PathLike, option: str = 'path', what: str = 'file or folder'
) -> pathlib.Path:
  """Calls `local`, and checks that the path exists and has the right type.

  Raises:
    ValueError: as in `local`.
    FileNotFoundError: if it does not exist; lists similar names in its folder.
    NotADirectoryError: if it is a file and a folder is required.
    IsADirectoryError: if it is a folder and a file is required.
  """
  expanded = local(path, option)
  if expanded.is_symlink() and not expanded.exists():
    raise FileNotFoundError(
      f'{option}: {expanded} is a broken link, to {expanded.readlink()}'
    )
  if not expanded.exists():
    parent = expanded.parent
    entries = parent.iterdir() if parent.is_dir() else ()
    names = [x.name for x in entries if x.name[0] not in '._']
    similar = difflib.get_close_matches(expanded.name, sorted(names))
    hint = f'; did you mean {" or ".join(similar)}?' if similar else ''
    if not parent.is_dir():
      hint = f'; there is no folder {parent} either'
    raise FileNotFoundError(f'{option}: there is no {what} {expanded}{hint}')
  if what == 'folder' and not expanded.is_dir():
    raise NotADirectoryError(f'{option}: {expanded} is not a folder')
  if what == 'file' and expanded.is_dir():
    raise IsADirectoryError(f'{option}: {expanded} is a folder, not a file')
  return expanded


def from_environment(name: str, default: PathLike) -> pathlib.Path:
  """Returns the path in an environment variable, or the default.

  The default is used if the variable is unset or empty; it may begin with `~`.

  Raises:
    ValueError: as in `local`; the message names the variable.
  """
  value = os.environ.get(name, '')
  return local(value if value.strip() else default, f'${name}')


def read_text_lines(path: PathLike, option: str = 'path') -> list[str]:
  """Reads the lines of a text file in UTF-8, or UTF-16 with a byte-order mark.

  Line ends (LF, CRLF or CR), the byte-order mark and empty lines at the end are
  removed.

  Raises:
    ValueError: as in `local`, or if the file is not text.
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
  # str.splitlines would also split at U+2028 and the like.
  lines = re.split(r'\r\n|\n|\r', text)
  while lines and not lines[-1].strip():
    lines.pop()
  return lines
