"""Downloads the authors' released weights.

An interrupted download resumes if the file on the server is unchanged. The file
appears only once it is complete. Its digest is stored next to it and verified
on each later use.
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
  """Returns `$XDG_CACHE_HOME/nfnets_jax`, by default `~/.cache/nfnets_jax`.

  Raises:
    ValueError: if the variable is not a path, or neither it nor the home
      directory is known.
  """
  variable, default = 'XDG_CACHE_HOME', '~/.cache'
  root = paths.from_environment(variable, default)
  if not root.is_absolute():  # the XDG standard says to ignore it
    root = paths.local(default, f'${variable}')
  return root / 'nfnets_jax'


def cache_path(name: str) -> pathlib.Path:
  """Returns the path where `fetch` stores the weights of a variant.

  Raises:
    ValueError: if no weights were released for that variant.
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
  """Returns the file of released weights, and downloads it if necessary.

  Args:
    name: the variant, 'nfnet_f0' to 'nfnet_f6'.
    address: URL of the file, by default the authors'.
    timeout: seconds without data after which a connection counts as broken.
      There are five attempts, each resuming the last.

  Returns:
    The file, in `cache_dir()`.

  Raises:
    ValueError: if no weights were released for that variant, the server returns
      something else, or the cached file has changed.
    ConnectionError: if the download fails; the message has the remedy.
  """
  path = cache_path(name)
  address = ADDRESSES[name] if address is None else address
  digest = path.with_suffix('.sha256')
  if path.exists():
    _verify(path, digest)
    return path
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix('.part')
  with _locked(partial, path):
    if path.exists():  # another process has downloaded it
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
    actual = _sha256(partial)
    if digest.exists() and _recorded(digest) != actual:
      partial.unlink()
      raise ValueError(
        f'{address} has changed: its sha256 is {actual}, and was '
        f'{_recorded(digest)}; remove {digest} to accept it'
      )
    _record(digest, actual)
    partial.replace(path)
  return path


@contextlib.contextmanager
def _locked(partial: pathlib.Path, path: pathlib.Path) -> Iterator[None]:
  """Locks `partial` against other processes, unless `path` exists."""
  while True:
    with partial.open('ab') as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        print(
          f'another process is downloading {path}; waiting for it', flush=True
        )
        fcntl.flock(file, fcntl.LOCK_EX)
      except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
          raise
        print(
          f'cannot lock {partial} ({error.strerror}); run one download at a '
          'time',
          flush=True,
        )
      # Another process may have renamed or removed the file meanwhile.
      held = os.fstat(file.fileno())
      if path.exists() or held.st_nlink:
        yield
        return


def _verify(path: pathlib.Path, digest: pathlib.Path) -> None:
  """Verifies a file against its digest, or records one."""
  actual = _sha256(path)
  if not digest.exists():  # the file was copied here
    _record(digest, actual)
  elif _recorded(digest) != actual:
    raise ValueError(
      f'{path} was changed or is corrupt: its sha256 is {actual}, and was '
      f'{_recorded(digest)}; remove it to download it again'
    )


def _recorded(digest: pathlib.Path) -> str:
  text = digest.read_bytes().decode(errors='replace').strip()
  if not re.fullmatch('[0-9a-f]{64}', text):
    raise ValueError(
      f'{digest} has {text[:80]!r} instead of a sha256; remove it if you trust '
      'the file beside it'
    )
  return text


def _record(digest: pathlib.Path, sha256: str) -> None:
  partial = digest.with_name(f'.{secrets.token_hex(8)}.part')
  partial.write_text(f'{sha256}\n')
  partial.replace(digest)


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _download(
  address: str, partial: pathlib.Path, path: pathlib.Path, timeout: float
) -> None:
  """Downloads to `partial`, in several attempts."""
  problem: Exception | None = None
  for attempt in range(_ATTEMPTS):
    time.sleep(min(10.0, 0.1 * 4**attempt) if attempt else 0.0)
    try:
      if _attempt(address, partial, timeout):
        return
      problem = ConnectionError('the connection was lost')
    except urllib.error.HTTPError as error:
      error.close()
      problem = error
      if error.code == 416:  # the partial file is longer than the server's
        os.truncate(partial, 0)  # and stays locked
      elif error.code < 500 and error.code != 429:
        break
    except (OSError, http.client.HTTPException) as error:
      problem = error
  raise ConnectionError(
    f'cannot download {address}: {problem}. The next call resumes the '
    f'download. Without network access, download the file elsewhere and copy '
    f'it to {path}'
  ) from problem


def _attempt(address: str, partial: pathlib.Path, timeout: float) -> bool:
  """Downloads the missing bytes; returns whether the file is complete."""
  # Resume only if the server still has the same file.
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
    else:  # changes of the file could not be detected
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
      # `read1` returns what has arrived, so a stalled connection loses nothing.
      while data := answer.read1(_CHUNK):
        file.write(data)
        bar.update(len(data))
  if total is not None and partial.stat().st_size != total:
    return False
  mark.unlink(missing_ok=True)
  return True
