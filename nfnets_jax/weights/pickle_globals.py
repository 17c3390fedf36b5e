"""The globals that a pickle of arrays may call, emulated without calling them.

Reference:
  `numpy.ndarray.__reduce__` documents the format of an array.
"""

import dataclasses
import math
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

_MAX_RANK = 8

# Supported dtypes by their name in a pickle.
_DTYPES = {
  'f2': np.dtype(np.float16),
  'f4': np.dtype(np.float32),
  'f8': np.dtype(np.float64),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'i1': np.dtype(np.int8),
  'i4': np.dtype(np.int32),
  'i8': np.dtype(np.int64),
  'u1': np.dtype(np.uint8),
  'u4': np.dtype(np.uint32),
  'u8': np.dtype(np.uint64),
  'b1': np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class Global:
  """A recognized global, by name; never the object itself."""

  kind: str


MAPPING = Global('mapping')
_NDARRAY = Global('ndarray')
_RECONSTRUCT = Global('_reconstruct')
_SCALAR = Global('scalar')
_FROMBUFFER = Global('_frombuffer')
_DTYPE = Global('dtype')
_ENCODE = Global('encode')
_BFLOAT16 = Global('bfloat16')
_CREATE_ARRAY = Global('_create_array')
_BYTES = Global('bytes')
_LOAD_TYPE = Global('_load_type')
# Types that dill writes under its own names.
_TYPES = {'BytesType': _BYTES, 'DictType': MAPPING, 'bytes': _BYTES}

# numpy 2 renamed `core` to `_core`; Haiku has had several mappings.
GLOBALS = {
  **{
    f'numpy.{core}.{name}': value
    for core in ('core', '_core')
    for name, value in {
      'multiarray._reconstruct': _RECONSTRUCT,
      'multiarray.scalar': _SCALAR,
      'numeric._frombuffer': _FROMBUFFER,
    }.items()
  },
  'numpy.ndarray': _NDARRAY,
  'numpy.dtype': _DTYPE,
  'ml_dtypes.bfloat16': _BFLOAT16,
  '_codecs.encode': _ENCODE,
  'dill._dill._create_array': _CREATE_ARRAY,
  'dill._dill._load_type': _LOAD_TYPE,
  # Empty bytes in old protocols.
  'builtins.bytes': _BYTES,
  '__builtin__.bytes': _BYTES,
  'builtins.dict': MAPPING,
  '__builtin__.dict': MAPPING,
  'collections.OrderedDict': MAPPING,
  'haiku._src.data_structures.FlatMapping': MAPPING,
  'haiku._src.data_structures.FlatMap': MAPPING,
  'haiku._src.data_structures.frozendict': MAPPING,
}


# Remedies for arrays of other packages.
REMEDIES = {
  'jax': '. Pickle jax.device_get(params) instead',
  'jaxlib': '. Pickle jax.device_get(params) instead',
  'torch': '. Write it from PyTorch with safetensors.torch.save_file',
}


@dataclasses.dataclass
class Dtype:
  """A dtype; BUILD may set its byte order."""

  dtype: np.dtype


class Mapping(dict):
  """A mapping made by calling its class."""


@dataclasses.dataclass
class Array:
  """An array; BUILD sets `value`."""

  value: np.ndarray | None = None


class RefusedError(Exception):
  """Reported to the caller as a ValueError."""


class Budget:
  """Bounds objects and bytes that are copied; names the byte of an error."""

  def __init__(self, items: int, size: int):
    self._max_items = self._items_left = items
    self._bytes_left = size
    self.position = 0

  def fail(self, reason: str) -> NoReturn:
    """Raises a RefusedError."""
    raise RefusedError(
      f'byte {self.position}: this is not a valid pickle of arrays: {reason}'
    )

  def spend(self, items: int) -> None:
    """Counts objects."""
    self._items_left -= items
    if self._items_left < 0:
      self.fail(f'it holds more than {self._max_items:,} objects')

  def spend_bytes(self, count: int) -> None:
    """Counts bytes that are copied."""
    self._bytes_left -= count
    if self._bytes_left < 0:
      self.fail('it copies more bytes than it has')


def put(target: Any, items: list[Any], budget: Budget) -> None:
  """Sets items of a dict, from a list of keys and values in turn."""
  if not isinstance(target, dict):
    budget.fail(f'it sets an item of a {type(target).__name__}')
  if len(items) % 2:
    budget.fail('a key has no value')
  budget.spend(len(items))
  for key, value in zip(items[::2], items[1::2], strict=True):
    if not isinstance(key, (str, int)):
      budget.fail(f'a key is a {type(key).__name__}')
    target[key] = value


def call(function: Any, arguments: Any, budget: Budget) -> Any:
  """Returns what a global would return."""
  if not isinstance(function, Global) or type(arguments) is not tuple:
    budget.fail(f'it calls a {type(function).__name__}')
  match function.kind, arguments:
    case 'mapping', ():
      return Mapping()
    case 'mapping', (dict() as items,):
      budget.spend(len(items))
      return Mapping(items)
    case 'mapping', (list() as pairs,):
      result = Mapping()
      for pair in pairs:
        if not isinstance(pair, (tuple, list)):
          budget.fail('a mapping is made of something else than pairs')
        put(result, list(pair), budget)
      return result
    case '_reconstruct', (Global('ndarray'), tuple(), bytes() | str()):
      return Array()
    case 'dtype', (Global('bfloat16') | 'bfloat16', *_):
      return Dtype(_DTYPES['bfloat16'])
    case 'dtype', (str() as code, *_):
      if code.lstrip('<>=|') not in _DTYPES:
        budget.fail(f'arrays of dtype {code[:40]!r} are not weights')
      return Dtype(np.dtype(_DTYPES[code.lstrip('<>=|')]))
    case 'encode', (str() as text, 'latin1' | 'latin-1'):
      # Python 3 writes bytes this way in protocol 2.
      budget.spend_bytes(len(text))
      return text.encode('latin1')
    case '_load_type', (str() as name,) if name in _TYPES:
      return _TYPES[name]
    case 'bytes', ():
      return b''
    case '_create_array', (
      Global('_reconstruct'),
      (Global('ndarray'), tuple(), bytes() | str()),
      tuple() as state,
      None | {},
    ):
      # dill writes subclasses of numpy's array this way.
      return fill(Array(), state, budget)
    case 'scalar', (Dtype() as kind, bytes() as raw):
      return _as_array(raw, kind.dtype, (), 'C', budget)[()]
    case '_frombuffer', (
      raw,
      Dtype() as kind,
      tuple() as shape,
      str() as order,
      *_,
    ):
      return Array(_as_array(raw, kind.dtype, shape, order, budget))
  budget.fail(f'it calls {function.kind} in an unexpected way')


def fill(array: Array, state: tuple[Any, ...], budget: Budget) -> Array:
  """Sets the value of an array, as `ndarray.__setstate__`."""
  match state:
    case (
      int(),
      tuple() as shape,
      Dtype() as kind,
      bool() | int() as fortran,
      bytes() | bytearray() as raw,
    ):
      order = 'F' if fortran else 'C'
      array.value = _as_array(raw, kind.dtype, shape, order, budget)
    case _:
      budget.fail('an array has an unexpected state')
  return array


def _as_array(
  raw: Any, dtype: np.dtype, shape: tuple[Any, ...], order: str, budget: Budget
) -> np.ndarray:
  if not isinstance(raw, (bytes, bytearray)):
    budget.fail(f'the data of an array is a {type(raw).__name__}')
  sizes = [type(n) is int and 0 <= n <= len(raw) for n in shape]
  if len(shape) > _MAX_RANK or not all(sizes) or order not in ('C', 'F'):
    budget.fail(f'an array has the impossible shape {str(shape)[:80]}')
  if math.prod(shape) * dtype.itemsize != len(raw):
    budget.fail(
      f'an array of shape {shape} and dtype {dtype} has {len(raw)} bytes'
    )
  flat = np.frombuffer(raw, dtype)
  if not dtype.isnative:
    budget.spend_bytes(len(raw))
    flat = flat.astype(dtype.newbyteorder('='))
  flat.flags.writeable = False
  return flat.reshape(shape, order=order)  # type: ignore[call-overload]
