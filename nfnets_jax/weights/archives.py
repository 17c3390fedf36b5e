"""Opens files of weights as named arrays that are read lazily.

Three formats, recognized by their first bytes: the authors' pickles, `.npz` and
`.safetensors`. Only headers are read here.
"""

import contextlib
import dataclasses
import functools
import json
import math
import mmap
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors

from nfnets_jax.weights import pickles

# The member of our own `.npz` files that holds the metadata.
METADATA = '__nfnets_jax__'
FLOATS = tuple(map(np.dtype, (np.float16, np.float32, ml_dtypes.bfloat16)))
_MAX_MEMBERS = 100_000
_SAFETENSORS_DTYPES = {
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F32': np.dtype(np.float32),
  'F64': np.dtype(np.float64),
  'I32': np.dtype(np.int32),
  'I64': np.dtype(np.int64),
}


@dataclasses.dataclass(frozen=True)
class _Array:
  """An array that is read lazily."""

  shape: tuple[int, ...]
  dtype: np.dtype
  get: Callable[[], np.ndarray]

  def __array__(
    self, dtype: Any = None, copy: bool | None = None
  ) -> np.ndarray:
    return np.array(self.get(), dtype or self.dtype, copy=copy)


Opened = tuple[Mapping[str, str], dict[str, Any]]


@contextlib.contextmanager
def opened(path: pathlib.Path, file: BinaryIO) -> Iterator[Opened]:
  """Yields the metadata of a file, and its arrays by name."""
  size = os.fstat(file.fileno()).st_size
  start = file.read(9)
  file.seek(0)
  if start.startswith(b'PK'):
    with zipfile.ZipFile(file) as archive:
      yield _members(archive)
  elif start[8:9] == b'{' and int.from_bytes(start[:8], 'little') < size:
    with safetensors.safe_open(os.fspath(path), 'numpy') as tensors:
      yield tensors.metadata() or {}, _tensors(tensors)
  else:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      tree = pickles.read(data, size)  # type: ignore[arg-type]
    yield {}, _leaves(tree)


def _members(archive: zipfile.ZipFile) -> Opened:
  infos = archive.infolist()
  names = [info.filename for info in infos]
  if len(names) > _MAX_MEMBERS or len(set(names)) < len(names):
    raise ValueError(f'the archive has {len(names)} members, or some twice')
  metadata: dict[str, str] = {}
  arrays: dict[str, Any] = {}
  for info in infos:
    if not info.filename.endswith('.npy'):
      raise ValueError(f'the archive has a member {info.filename[:80]!r}')
    name = info.filename.removesuffix('.npy')
    array = _member(archive, info)
    if name == METADATA:
      if array.shape or array.dtype.kind != 'S' or array.dtype.itemsize > 2**24:
        raise ValueError(f'{METADATA} is not a short text')
      metadata = json.loads(bytes(array.get()[()]))
    else:
      arrays[name] = array
  return metadata, arrays


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Array:
  """Reads only the header of a member."""
  with archive.open(info) as file:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
      raise ValueError(f'{info.filename[:80]!r} has the format {version}')
    header = (
      np.lib.format.read_array_header_1_0
      if version == (1, 0)
      else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = header(file)
    start = file.tell()
  if dtype.hasobject:
    raise ValueError(f'{info.filename[:80]!r} holds Python objects')
  if dtype == np.dtype('V2'):  # numpy writes bfloat16 as V2
    dtype = np.dtype(ml_dtypes.bfloat16)
  size = math.prod(shape) * dtype.itemsize
  if min(shape, default=0) < 0 or start + size != info.file_size:
    raise ValueError(
      f'{info.filename[:80]!r} has {info.file_size} bytes, and its header says '
      f'{start + size}'
    )

  def get() -> np.ndarray:
    with archive.open(info) as file:
      file.read(start)
      data = file.read(size)
      # Reading past the last byte verifies the checksum.
      if len(data) != size or file.read(1):
        raise ValueError(f'{info.filename[:80]!r} is truncated')
    order = 'F' if fortran else 'C'
    return np.frombuffer(data, dtype).reshape(shape, order=order)  # type: ignore[call-overload]

  return _Array(shape, dtype, get)


def _tensors(file: Any) -> dict[str, Any]:
  arrays = {}
  for key in file.keys():  # noqa: SIM118, not a mapping
    part = file.get_slice(key)
    code = part.get_dtype()
    if code not in _SAFETENSORS_DTYPES:
      raise ValueError(f'{key[:80]} is {code}; weights are {float_names()}')
    arrays[key] = _Array(
      tuple(part.get_shape()),
      _SAFETENSORS_DTYPES[code],
      functools.partial(file.get_tensor, key),
    )
  return arrays


def _leaves(tree: Any) -> dict[str, Any]:
  """Flattens a dict of dicts of arrays."""
  if not isinstance(tree, dict) or not tree:
    raise ValueError('it does not hold a dict of modules')
  arrays = {}
  for module, leaves in tree.items():
    if not isinstance(leaves, dict):
      raise ValueError(f'{str(module)[:80]!r} is not a dict of parameters')
    for leaf, x in leaves.items():
      if not isinstance(x, (np.ndarray, np.generic)):
        raise ValueError(f'{module} {leaf} is not an array'[:200])
      arrays[f'{module}/{leaf}'] = x
  return arrays


def float_names() -> str:
  """Returns the supported dtypes, for messages."""
  return ', '.join(map(str, FLOATS))
