"""Checks the ImageNet archives before the long preparation.

TFDS does not: it skips a split whose archive is missing, stops where an archive
is truncated, and labels the validation images in the order of their names,
whichever images are present.

Only the headers are read, a few MB of the 155 GB; each gives the offset of the
next. A partial download that was preallocated to its full size, with zeros at
the end, is detected by the first missing header. Zeros within an image are not
detected; compare the md5 sums if in doubt.

Reference:
  Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", 2015,
  https://arxiv.org/abs/1409.0575
"""

import dataclasses
import os
import re
import tarfile
from collections.abc import Collection, Iterator
from typing import BinaryIO

import tqdm

from nfnets_jax import paths
from nfnets_jax.data.imagenet import SPLITS

# Bytes. Headers and contents are padded to whole blocks; a zero block in place
# of a header ends an archive.
_BLOCK = 512

# Bytes. tar pads an archive with zeros to a multiple of 10,240 by default.
_MAX_PADDING = 1 << 20


@dataclasses.dataclass(frozen=True)
class Archive:
  """An archive of the ILSVRC 2012 challenge, as on its download page."""

  name: str
  title: str
  num_bytes: int
  md5: str
  num_images: int


ARCHIVES = {
  'train': Archive(
    name='ILSVRC2012_img_train.tar',
    title='Training images (Task 1 & 2)',
    num_bytes=147_897_477_120,
    md5='1d675b47d978889d74fa0da5fadfb00e',
    num_images=SPLITS['train'],
  ),
  'validation': Archive(
    name='ILSVRC2012_img_val.tar',
    title='Validation images (all tasks)',
    num_bytes=6_744_924_160,
    md5='29b22e2961454d5413ddabcf34fc5622',
    num_images=SPLITS['validation'],
  ),
}


class _ArchiveError(Exception):
  """An archive is invalid."""


def remedy(*splits: str) -> str:
  """Returns instructions to download the archives of some splits.

  Example:
    >>> print(remedy('validation'))  # doctest: +NORMALIZE_WHITESPACE
    To get it, register at https://image-net.org/download-images and download
    "Validation images (all tasks)" of ILSVRC2012:
      ILSVRC2012_img_val.tar, 6,744,924,160 bytes,
      md5 29b22e2961454d5413ddabcf34fc5622
  """
  archives = [ARCHIVES[split] for split in splits]
  titles = ' and '.join(f'"{archive.title}"' for archive in archives)
  lines = [
    f'To get {"it" if len(splits) == 1 else "them"}, register at '
    'https://image-net.org/download-images and download\n'
    f'{titles} of ILSVRC2012:'
  ]
  for x in archives:
    lines.append(f'  {x.name}, {x.num_bytes:,} bytes, md5 {x.md5}')
  return '\n'.join(lines)


def check(
  folder: str | os.PathLike[str], synsets: Collection[str]
) -> dict[str, int]:
  """Checks both archives, and returns the number of images of each split.

  They must exist, be complete and suit TFDS. Archives with a subset of the
  images pass; the validation images must be the first ones.

  Args:
    folder: the folder of the archives.
    synsets: class names, such as n01440764.

  Raises:
    FileNotFoundError: if the folder or an archive is missing.
    ValueError: if an archive is truncated or invalid. The message has the file,
      the fault and the remedy.
  """
  folder = paths.local(folder, 'imagenet_dir')
  if not folder.is_dir():
    raise FileNotFoundError(f'there is no folder {folder}')
  files = {x: folder / archive.name for x, archive in ARCHIVES.items()}
  missing = [split for split, path in files.items() if not path.is_file()]
  if missing:
    names = ' and no '.join(ARCHIVES[split].name for split in missing)
    raise FileNotFoundError(f'no {names} in {folder}\n{remedy(*missing)}')
  counts = {}
  for split, path in files.items():
    try:
      with path.open('rb') as file:
        counts[split] = _CHECKS[split](file, synsets)
    except _ArchiveError as error:
      size = path.stat().st_size
      raise ValueError(
        f'{path} ({size:,} bytes): {error}\n{remedy(split)}'
      ) from error
  return counts


def num_bytes(folder: str | os.PathLike[str]) -> int:
  """Returns the size of both archives, close to that of the data set."""
  folder = paths.local(folder, 'imagenet_dir')
  return sum((folder / file.name).stat().st_size for file in ARCHIVES.values())


def _check_train(file: BinaryIO, synsets: Collection[str]) -> int:
  """Checks an archive with one archive per class and counts its images."""
  # At the official size, scan only the last class, where a download may be
  # truncated: finding 1.3 million headers is slow on a slow disk.
  is_official = _size(file) == ARCHIVES['train'].num_bytes
  archives = list(_members(file, 0, _size(file)))
  if not archives:
    raise _ArchiveError('it is an empty archive')
  seen = set()
  for archive in archives:
    if not re.fullmatch(r'n\d{8}\.tar', archive.name) or not archive.isreg():
      raise _ArchiveError(
        f'it holds {archive.name}, where archives named as n01440764.tar are '
        'expected'
      )
    if archive.name[:-4] not in synsets:
      raise _ArchiveError(
        f'{archive.name} is none of the {len(synsets):,} classes of ILSVRC2012'
      )
    if archive.name in seen:
      raise _ArchiveError(f'it holds {archive.name} twice')
    seen.add(archive.name)
  if is_official and len(archives) != len(synsets):
    raise _ArchiveError(
      f'it has the size of the whole ImageNet, and holds {len(archives):,} of '
      f'the {len(synsets):,} classes'
    )
  count = 0
  for archive in tqdm.tqdm(
    archives, 'Checking archives', unit=' classes', leave=False, mininterval=1
  ):
    start = archive.offset_data
    stop = start + archive.size
    try:
      if is_official and archive is not archives[-1]:
        next(_members(file, start, stop), None)
      else:
        count += _count_images(file, start, stop)
    except _ArchiveError as error:
      raise _ArchiveError(f'{archive.name} in it: {error}') from error
  return ARCHIVES['train'].num_images if is_official else count


def _count_images(file: BinaryIO, start: int, stop: int) -> int:
  """Counts the images in the archive of a class."""
  names = set()
  count = 0
  for member in _members(file, start, stop):
    if not member.isreg():
      raise _ArchiveError(f'it holds {member.name}, not an image')
    names.add(member.name)
    count += 1
  if not count:
    raise _ArchiveError('it is an empty archive')
  if len(names) < count:
    raise _ArchiveError('it holds two images of the same name')
  return count


def _check_validation(file: BinaryIO, synsets: Collection[str]) -> int:
  """Checks an archive of images and counts them."""
  del synsets  # validation images have no class in the archive
  is_official = _size(file) == ARCHIVES['validation'].num_bytes
  names = []
  for member in _members(file, 0, _size(file)):
    if (
      not re.fullmatch(r'ILSVRC2012_val_\d{8}\.JPEG', member.name)
      or not member.isreg()
    ):
      raise _ArchiveError(
        f'it holds {member.name}, where images named as '
        'ILSVRC2012_val_00000001.JPEG are expected'
      )
    names.append(member.name)
  if not names:
    raise _ArchiveError('it is an empty archive')
  for number, name in enumerate(sorted(names), 1):
    expected = f'ILSVRC2012_val_{number:08d}.JPEG'
    # TFDS assigns its labels to the images in sorted order.
    if name != expected:
      raise _ArchiveError(
        f'image {number} of {len(names):,} should be {expected} and is {name}; '
        'images other than the first ones would get wrong labels'
      )
  num_labels = ARCHIVES['validation'].num_images
  if len(names) > num_labels:
    raise _ArchiveError(
      f'it holds {len(names):,} images, and there are {num_labels:,} labels'
    )
  if is_official and len(names) < num_labels:
    raise _ArchiveError(
      f'it has the size of all {num_labels:,} images, and holds {len(names):,}'
    )
  return len(names)


def _members(
  file: BinaryIO, start: int, stop: int
) -> Iterator[tarfile.TarInfo]:
  """Yields the members of the archive in bytes start to stop of a file."""
  # `tarfile` treats an invalid header as the end.
  file.seek(start)
  end, last = start, ''
  try:
    for member in tarfile.TarFile(fileobj=file):
      if member.offset >= stop:
        break
      end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
      last = member.name
      if end > stop:
        raise _ArchiveError(
          f'it is truncated: {last} extends to byte {end - start:,} of '
          f'{stop - start:,}'
        )
      yield member
  except tarfile.TarError as error:
    if last:
      raise _ArchiveError(f'it is corrupt after {last}: {error}') from error
  file.seek(end)
  block = file.read(max(0, min(_BLOCK, stop - end)))
  if block == bytes(_BLOCK):
    if stop - end - _BLOCK > _MAX_PADDING:
      raise _ArchiveError(
        f'{stop - end - _BLOCK:,} bytes follow its end, as in a truncated '
        'download'
      )
    return
  if not last:
    raise _ArchiveError(
      f'it is not a tar archive; it begins with {block[:20]!r}'
    )
  if len(block) < _BLOCK:
    raise _ArchiveError(
      f'it is truncated after {last}: the zeros that end an archive are missing'
    )
  raise _ArchiveError(f'it is corrupt after {last}: the next header is invalid')


def _size(file: BinaryIO) -> int:
  return file.seek(0, os.SEEK_END)


_CHECKS = {'train': _check_train, 'validation': _check_validation}
