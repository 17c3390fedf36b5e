"""Downloads the weights that the authors released.

A download that broke off goes on where it stopped, if the server still has the
same file; what arrives is complete, or there is no file. The digest of the
first download is kept beside the file, and each later use compares.
"""

import contextlib
import errno
import fcntl
import hashlib
import http.client
import os
import pathlib
import re
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping

import tqdm

from nfnets_jax import paths
from nfnets_jax.weights import recognize

_BASE = 'https://storage.googleapis.com/dm-nfnets'
ADDRESSES: Mapping[str, str] = {
  f'nfnet_f{n}': f'{_BASE}/F{n}_haiku.npz' for n in range(7)
}
_ATTEMPTS = 5
_CHUNK = 2**20


def cache_dir() -> pathlib.Path:
  """Returns `$XDG_CACHE_HOME/nfnets_jax`, or that in `~/.cache`.

  Raises:
    ValueError: if the variable is no path, or not set and the home directory is
      unknown.
  """
  variable, default = 'XDG_CACHE_HOME', '~/.cache'
  root = paths.from_environment(variable, default)
  if not root.is_absolute():  # the standard says that it is to be ignored
    root = paths.expand(default, f'${variable}')
  return root / 'nfnets_jax'


def place(name: str) -> pathlib.Path:
  """Returns where `fetch` puts released weights.

  Args:
    name: the variant, 'nfnet_f0' to 'nfnet_f6'.

  Raises:
    ValueError: if there are no released weights of that name.
  """
  if name not in ADDRESSES:
    raise ValueError(
      f'there are no released weights of {name!r}, only of '
      f'{", ".join(ADDRESSES)}'
    )
  return cache_dir() / f'{name}.npz'


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
    ValueError: if there are no released weights of that name, the server has
      something else, or the file in the cache is not the one that was
      downloaded.
    ConnectionError: if it cannot be had; the message says what to do.
  """
  path = place(name)
  address = ADDRESSES[name] if address is None else address
  digest = path.with_suffix('.sha256')
  if path.exists():
    _verify(path, digest)
    return path
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix('.part')
  with _locked(partial, path):
    if path.exists():  # another process has downloaded it meanwhile
      _verify(path, digest)
      return path
    _download(address, partial, path, timeout)
    try:
      recognize.check_answer(partial)
    except ValueError as error:
      partial.unlink()
      raise ValueError(
        f'{address} is not weights, and was not kept: {error}'
      ) from None
    found = _sha256(partial)
    if digest.exists() and _recorded(digest) != found:
      partial.unlink()
      raise ValueError(
        f'{address} is not what it was: its sha256 is {found}, and was '
        f'{_recorded(digest)}; remove {digest} to accept it'
      )
    _record(digest, found)
    partial.replace(path)
  return path


@contextlib.contextmanager
def _locked(partial: pathlib.Path, path: pathlib.Path) -> Iterator[None]:
  """Lets one process at a time write to `partial`, unless `path` is there."""
  while True:
    with partial.open('ab') as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        print(f'another process downloads {path}; waiting for it', flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
      except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
          raise
        print(
          f'{partial} cannot be locked here ({error.strerror}); download it '
          'in one process at a time',
          flush=True,
        )
      # The process before may have renamed or removed what was waited for.
      held = os.fstat(file.fileno())
      if path.exists() or held.st_nlink:
        yield
        return


def _verify(path: pathlib.Path, digest: pathlib.Path) -> None:
  """Compares a file with the digest beside it, or makes that."""
  found = _sha256(path)
  if not digest.exists():  # the file was copied here
    _record(digest, found)
  elif _recorded(digest) != found:
    raise ValueError(
      f'{path} has been changed or damaged: its sha256 is {found}, and was '
      f'{_recorded(digest)}; remove it to download it again'
    )


def _recorded(digest: pathlib.Path) -> str:
  text = digest.read_bytes().decode(errors='replace').strip()
  if not re.fullmatch('[0-9a-f]{64}', text):
    raise ValueError(
      f'{digest} holds no sha256 but {text[:80]!r}; remove it if you trust the '
      'file beside it'
    )
  return text


def _record(digest: pathlib.Path, found: str) -> None:
  partial = digest.with_name(f'.{secrets.token_hex(8)}.part')
  partial.write_text(f'{found}\n')
  partial.replace(digest)


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
        os.truncate(partial, 0)  # and stays locked
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
