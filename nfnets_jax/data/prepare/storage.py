"""Disk space and leftover folders of data set preparation.

A data set is written to a sibling folder `incomplete.*`, which is renamed at
the end. A killed process leaves that folder behind.
"""

import pathlib
import shlex
import shutil


def check_space(folder: pathlib.Path, num_bytes: int) -> None:
  """Raises an OSError if the disk of `folder` has less than `num_bytes` free.

  Example:
    >>> check_space(pathlib.Path('/tmp/data'), num_bytes=10**18)
    Traceback (most recent call last):
      ...
    OSError: not enough space in /tmp/data: 1,000,000,000.0 GB are needed, ...
  """
  parents = [folder, *folder.absolute().parents]
  free = shutil.disk_usage(next(x for x in parents if x.exists())).free
  if free < num_bytes:
    raise OSError(
      f'not enough space in {folder}: {in_gigabytes(num_bytes)} are needed, '
      f'{in_gigabytes(free)} are free'
    )


def leftovers(
  target: pathlib.Path, keep: pathlib.Path | None = None
) -> list[str]:
  """Lists folders of killed runs, with a command to delete each.

  They are not deleted, since those of concurrent runs look the same.

  Args:
    target: the folder of the prepared data set, such as `imagenet2012/5.1.0`.
    keep: a folder to skip, because the caller resumes it.
  """
  lines = []
  for path in sorted(target.parent.glob(f'incomplete.*_{target.name}')):
    if path == keep:
      continue
    size = sum(x.stat().st_size for x in path.rglob('*') if x.is_file())
    command = f'rm -r {shlex.quote(str(path))}'
    lines.append(
      f'{path} ({in_gigabytes(size)}) is left by a run that was killed or is '
      f'still running; in the former case, delete it: {command}'
    )
  return lines


def in_gigabytes(num_bytes: int) -> str:
  """Formats a size in units of 10^9 bytes.

  Example:
    >>> in_gigabytes(147_897_477_120)
    '147.9 GB'
  """
  return f'{num_bytes / 1e9:,.1f} GB'
