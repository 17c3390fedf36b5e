"""Downloads the weights that the authors released.

A download that broke off goes on where it stopped, if the server still has the
same file; what arrives is complete, or there is no file. The digest of the
first download is kept beside the file, and each later use compares.
"""

import hashlib
import http.client
import os
import pathlib
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

import tqdm

_BASE = 'https://storage.googleapis.com/dm-nfnets'
ADDRESSES: Mapping[str, str] = {
  f'nfnet_f{n}': f'{_BASE}/F{n}_haiku.npz' for n in range(7)
}
_ATTEMPTS = 5
_CHUNK = 2**20


def cache_dir() -> pathlib.Path:
  """Returns `$XDG_CACHE_HOME/nfnets_jax`, or that in `~/.cache`."""
  root = os.environ.get('XDG_CACHE_HOME')
  # The standard says that a relative one is to be ignored.
  if not root or not pathlib.Path(root).is_absolute():
    root = '~/.cache'
  return pathlib.Path(root).expanduser() / 'nfnets_jax'


def fetch(
  name: str, *, address: str | None = None, timeout: float = 30.0
) -> pathlib.Path:
  """Returns the file of released weights, downloading it if it is not there.

  Args:
    name: the variant, 'nfnet_f0' to 'nfnet_f6'.
    address: where the file is; None is where the authors put it.
    timeout: seconds without a byte after which the connection counts as broken;
      it is tried five times, and goes on where it stopped.

  Returns:
    The file, in `cache_dir()`.

  Raises:
    ValueError: if there are no released weights of that name, or the file in
      the cache is not the one that was downloaded.
    ConnectionError: if it cannot be had; the message says what to do.
  """
  if address is None:
    if name not in ADDRESSES:
      raise ValueError(
        f'there are no released weights of {name!r}, only of '
        f'{", ".join(ADDRESSES)}'
      )
    address = ADDRESSES[name]
  path = cache_dir() / f'{name}.npz'
  digest = path.with_suffix('.sha256')
  if path.exists():
    _verify(path, digest)
    return path
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix('.part')
  _download(address, partial, path, timeout)
  found = _sha256(partial)
  if digest.exists() and digest.read_text().strip() != found:
    partial.unlink()
    raise ValueError(
      f'{address} is not what it was: its sha256 is {found}, and was '
      f'{digest.read_text().strip()}; remove {digest} to accept it'
    )
  digest.write_text(f'{found}\n')
  partial.replace(path)
  return path


def _verify(path: pathlib.Path, digest: pathlib.Path) -> None:
  """Compares a file with the digest beside it, or makes that."""
  found = _sha256(path)
  if not digest.exists():  # the file was copied here
    digest.write_text(f'{found}\n')
  elif digest.read_text().strip() != found:
    raise ValueError(
      f'{path} has been changed or damaged: its sha256 is {found}, and was '
      f'{digest.read_text().strip()}; remove it to download it again'
    )


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _download(
  address: str, partial: pathlib.Path, path: pathlib.Path, timeout: float
) -> None:
  """Downloads into `partial`, in several attempts, and returns when whole."""
  problem: Exception | None = None
  for attempt in range(_ATTEMPTS):
    time.sleep(min(10.0, 0.1 * 4**attempt) if attempt else 0.0)
    try:
      if _attempt(address, partial, timeout):
        return
      problem = ConnectionError('the connection broke off')
    except urllib.error.HTTPError as error:
      error.close()
      problem = error
      if error.code == 416:  # what is here is longer than what is there
        partial.unlink(missing_ok=True)
      elif error.code < 500 and error.code != 429:
        break
    except (OSError, http.client.HTTPException) as error:
      problem = error
  raise ConnectionError(
    f'cannot download {address}: {problem}. The next call goes on where this '
    f'one stopped. Without a network, fetch the file elsewhere and copy it to '
    f'{path}'
  ) from problem


def _attempt(address: str, partial: pathlib.Path, timeout: float) -> bool:
  """Downloads what is missing; returns whether that was all."""
  # What is here is only of use if the server still has the same file.
  mark = partial.with_suffix('.etag')
  have = partial.stat().st_size if partial.exists() and mark.exists() else 0
  request = urllib.request.Request(address)
  if have:
    request.add_header('Range', f'bytes={have}-')
    request.add_header('If-Range', mark.read_text())
  with urllib.request.urlopen(request, timeout=timeout) as answer:
    resumed = answer.status == 206
    have = have if resumed else 0
    tag = answer.headers.get('ETag')
    if tag and not tag.startswith('W/'):
      mark.write_text(tag)
    else:  # it could not be told whether the file is the same
      mark.unlink(missing_ok=True)
    length = answer.headers.get('Content-Length')
    total = have + int(length) if length is not None else None
    with (
      partial.open('ab' if resumed else 'wb') as file,
      tqdm.tqdm(
        total=total,
        initial=have,
        unit='B',
        unit_scale=True,
        desc=address.rpartition('/')[2],
      ) as bar,
    ):
      # What has come so far, so that a connection that stalls loses nothing.
      while data := answer.read1(_CHUNK):
        file.write(data)
        bar.update(len(data))
  if total is not None and partial.stat().st_size != total:
    return False
  mark.unlink(missing_ok=True)
  return True
