"""Copies a prepared data set from a bucket to local disk.

    python -m nfnets_jax.data.fetch gs://bucket/tfds imagenet2012 \
      [--data_dir=DIR]

ArrayRecord reads local files only, and a process reads examples of all shards,
since the shuffle is global: run this on each host, or mount the bucket.

Each file is verified by size, from gs:// by MD5 too, and renamed when complete,
the description of the data set last. After an interruption, the same command
copies the rest.
"""

import argparse
import base64
import concurrent.futures
import hashlib
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import tqdm

from nfnets_jax import extras, paths
from nfnets_jax.data import builders
from nfnets_jax.data.prepare import storage

# Without it, TFDS sees no data set.
_LAST = 'dataset_info.json'
_THREADS = 8


def fetch(
  source: paths.PathLike,
  name: str,
  data_dir: paths.PathLike | None = None,
) -> pathlib.Path:
  """Copies `source/name` to `data_dir/name`, except what is there already.

  Args:
    source: folder of TFDS data sets, `gs://…` or `s3://…`.
    name: a data set, such as `imagenet2012` or `imagenet2012/5.1.0`.
    data_dir: None means the default; see `builders.resolve`.

  Returns:
    The local folder.

  Raises:
    FileNotFoundError: if there is no data set.
    FileExistsError: if a local file has another size.
    OSError: if the disk is too small, or a copy differs from the original.
  """
  if not paths.in_bucket(source):
    raise ValueError(f'SOURCE={source} is not gs://BUCKET/FOLDER or s3://…')
  folder = paths.expand_literal(source, 'SOURCE') / name.replace(':', '/')
  target = builders.resolve(data_dir) / name.replace(':', '/')
  import fsspec

  system, root = fsspec.core.url_to_fs(os.fspath(folder))
  found = {
    path.removeprefix(f'{root}/'): info
    for path, info in system.find(root, detail=True).items()
  }
  if not any(path.endswith(_LAST) for path in found):
    raise FileNotFoundError(f'there is no prepared data set in {folder}')
  missing = [x for x in found if not _is_there(target / x, found[x]['size'])]
  size = sum(found[x]['size'] for x in missing)
  storage.check_space(target, size)
  shards = [x for x in missing if not x.endswith(_LAST)]
  with (
    tqdm.tqdm(total=size, unit='B', unit_scale=True, desc=name) as bar,
    concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
  ):
    # The first error cancels what has not begun.
    try:
      for part in (shards, [x for x in missing if x not in shards]):
        copies = [
          pool.submit(_copy, system, f'{root}/{x}', target / x, found[x])
          for x in part
        ]
        for copy in concurrent.futures.as_completed(copies):
          bar.update(copy.result())
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise
  return target


def _is_there(path: pathlib.Path, size: int) -> bool:
  if not path.exists():
    return False
  if path.stat().st_size != size:
    raise FileExistsError(
      f'{path} has {path.stat().st_size:,} bytes, and {size:,} in the bucket; '
      'move it away'
    )
  return True


def _copy(
  system: Any, source: str, path: pathlib.Path, info: dict[str, Any]
) -> int:
  """Copies and verifies a file; returns its size."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'{path.name}.part')
  system.get_file(source, os.fspath(partial))
  size, expected = partial.stat().st_size, _md5(info)
  digest = None
  if expected is not None:
    with partial.open('rb') as file:
      digest = hashlib.file_digest(file, 'md5').hexdigest()
  if (size, digest) != (info['size'], expected):
    partial.unlink()
    raise OSError(
      f'the copy of {source} has {size:,} bytes and MD5 {digest}, not '
      f'{info["size"]:,} and {expected}; run the same command again'
    )
  partial.rename(path)
  return size


def _md5(info: dict[str, Any]) -> str | None:
  """Returns the hex digest of Google Cloud Storage; None elsewhere.

  The ETag of S3 is one only if the object was written in one part and is not
  encrypted by a key of the user, which a listing does not tell.
  """
  digest = info.get('md5Hash')
  return base64.b64decode(digest).hex() if digest else None


def main(argv: Sequence[str] | None = None) -> None:
  """Copies the data set named on the command line."""
  parser = argparse.ArgumentParser(
    prog='python -m nfnets_jax.data.fetch',
    description=(__doc__ or '').split('\n')[0],
  )
  parser.add_argument('source', metavar='SOURCE', help='gs://… or s3://…')
  parser.add_argument('name', help='a TFDS data set, such as imagenet2012')
  parser.add_argument(
    '--data_dir',
    help='where to copy it (default: $TFDS_DATA_DIR, or ~/tensorflow_datasets)',
  )
  args = parser.parse_args(argv)
  try:
    extras.need('train', 'tensorflow_datasets')
    print(f'{args.name}: {fetch(args.source, args.name, args.data_dir)}')
  except KeyboardInterrupt:
    sys.exit('\ninterrupted: the same command copies the rest')
  except (ValueError, ModuleNotFoundError, OSError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  main()
