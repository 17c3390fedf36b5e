"""What preparing a data set asks of the disk: room, and order.

A data set is written in a folder `incomplete.*` beside the one to be, which is
renamed when all is there. A process that is killed leaves that folder behind.
"""

import pathlib
import shlex
import shutil


def check_space(folder: pathlib.Path, num_bytes: int) -> None:
  """Checks that a data set of a known size has room.

  Args:
    folder: where it is to be; need not exist.
    num_bytes: its size.

  Raises:
    OSError: if it does not fit.

  Example:
    >>> check_space(pathlib.Path('/tmp/data'), num_bytes=10**18)
    Traceback (most recent call last):
      ...
    OSError: not enough room in /tmp/data: 1,000,000,000.0 GB are needed, ...
  """
  parents = [folder, *folder.absolute().parents]
  free = shutil.disk_usage(next(x for x in parents if x.exists())).free
  if free < num_bytes:
    raise OSError(
      f'not enough room in {folder}: {in_gigabytes(num_bytes)} are needed, '
      f'{in_gigabytes(free)} are free'
    )


def leftovers(
  target: pathlib.Path, mine: pathlib.Path | None = None
) -> list[str]:
  """Says what killed runs have left beside a folder, and how to delete it.

  They are not deleted: a run that goes on at the same time looks the same.

  Args:
    target: the folder of the prepared data set, as `imagenet2012/5.1.0`.
    mine: what is none, as it will be gone on with.

  Returns:
    A line for each folder.
  """
  lines = []
  for path in sorted(target.parent.glob(f'incomplete.*_{target.name}')):
    if path == mine:
      continue
    size = sum(x.stat().st_size for x in path.rglob('*') if x.is_file())
    lines.append(
      f'{path} ({in_gigabytes(size)}) is of a run that was killed, or that '
      f'goes on; if none does, delete it: rm -r {shlex.quote(str(path))}'
    )
  return lines


def in_gigabytes(num_bytes: int) -> str:
  """Writes a size.

  Args:
    num_bytes: the size.

  Returns:
    The size in units of 10^9 bytes.

  Example:
    >>> in_gigabytes(147_897_477_120)
    '147.9 GB'
  """
  return f'{num_bytes / 1e9:,.1f} GB'
