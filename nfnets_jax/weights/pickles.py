"""Reads arrays from a pickle without unpickling it.

The released weights are pickles of nested dicts of numpy arrays, written with
dill by an old numpy. Unpickling would run code from the file. Instead, its
opcodes are interpreted as data. Of the functions that a pickle can call, only
the few of numpy that make arrays are recognized, and even those are emulated
rather than called. Any other global raises an error before anything else is
read.

Time and memory are bounded: the number of objects by a constant, the bytes that
are copied by the size of the file.

Reference:
  Python's `pickletools` documents the opcodes, and `numpy.ndarray.__reduce__`
  the format of an array.
"""

import dataclasses
import math
import pickletools
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

import ml_dtypes
import numpy as np

# More than any network needs, yet small in memory.
_MAX_ITEMS = 1_000_000
_MAX_RANK = 8
_MAX_DEPTH = 20

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
class _Global:
  """A recognized global, by name; never the object itself."""

  kind: str


_MAPPING = _Global('mapping')
_NDARRAY = _Global('ndarray')
_RECONSTRUCT = _Global('_reconstruct')
_SCALAR = _Global('scalar')
_FROMBUFFER = _Global('_frombuffer')
_DTYPE = _Global('dtype')
_ENCODE = _Global('encode')
_BFLOAT16 = _Global('bfloat16')
_CREATE_ARRAY = _Global('_create_array')
_BYTES = _Global('bytes')
_LOAD_TYPE = _Global('_load_type')
# Types that dill writes under its own names.
_TYPES = {'BytesType': _BYTES, 'DictType': _MAPPING, 'bytes': _BYTES}

# numpy 2 renamed `core` to `_core`; Haiku has had several mappings.
_GLOBALS = {
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
  'builtins.dict': _MAPPING,
  '__builtin__.dict': _MAPPING,
  'collections.OrderedDict': _MAPPING,
  'haiku._src.data_structures.FlatMapping': _MAPPING,
  'haiku._src.data_structures.FlatMap': _MAPPING,
  'haiku._src.data_structures.frozendict': _MAPPING,
}


# Remedies for arrays of other packages.
_REMEDIES = {
  'jax': '. Pickle jax.device_get(params) instead',
  'jaxlib': '. Pickle jax.device_get(params) instead',
  'torch': '. Write it from PyTorch with safetensors.torch.save_file',
}


@dataclasses.dataclass
class _Dtype:
  """A dtype; BUILD may set its byte order."""

  dtype: np.dtype


class _Mapping(dict):
  """A mapping made by calling its class."""


@dataclasses.dataclass
class _Array:
  """An array; BUILD sets `value`."""

  value: np.ndarray | None = None


class _Mark:
  """The MARK on the stack."""


_MARK = _Mark()


def read(file: BinaryIO, size: int) -> Any:
  r"""Returns the contents of a pickle of dicts, lists and arrays.

  Args:
    file: the pickle, of any protocol. Reads beyond its end must not allocate
      memory, as with `io.BytesIO` and `mmap.mmap`.
    size: of the file in bytes.

  Returns:
    Dicts, lists, tuples, strings, numbers and read-only numpy arrays.

  Raises:
    ValueError: if the data is not a pickle, is truncated, or has any other
      content; the message says what, and at which byte.

  Example:
    >>> import io, pickle
    >>> data = pickle.dumps({'w': np.ones(2, np.float32)})
    >>> read(io.BytesIO(data), len(data))
    {'w': array([1., 1.], dtype=float32)}
    >>> read(io.BytesIO(b'cos\nsystem\n(S"true"\ntR.'), 25)
    Traceback (most recent call last):
      ...
    ValueError: byte 0: the pickle asks for os.system; nothing of it was run
  """
  with warnings.catch_warnings():
    # Ignore warnings about escapes in old strings.
    warnings.simplefilter('ignore')
    return _Reader(file, size).read()


class _Reader:
  """An interpreter of the opcodes that weights need."""

  def __init__(self, file: BinaryIO, size: int):
    self._file = file
    self._bytes_left = size
    self._stack: list[Any] = []
    self._memo: dict[int, Any] = {}
    self._items_left = _MAX_ITEMS
    self._position = 0

  def read(self) -> Any:
    try:
      for opcode, argument, position in pickletools.genops(self._file):
        self._position = position or 0
        if opcode.name == 'STOP':
          return self._finished(self._pop())
        self._do(opcode.name, argument)
    except RecursionError:
      self._fail('it is nested too deeply')
    except _RefusedError as error:
      raise ValueError(str(error)) from None
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as e:
      # Raised by pickletools for invalid opcodes and truncated data.
      raise ValueError(
        f'byte {self._position}: this is no whole pickle of arrays: {e}'
      ) from None
    self._fail('it ends without its last opcode')

  def _fail(self, why: str) -> NoReturn:
    raise _RefusedError(
      f'byte {self._position}: this is no whole pickle of arrays: {why}'
    )

  def _pop(self) -> Any:
    if not self._stack or self._stack[-1] is _MARK:
      self._fail('an opcode has nothing to work on')
    return self._stack.pop()

  def _pop_mark(self) -> list[Any]:
    for i in range(len(self._stack) - 1, -1, -1):
      if self._stack[i] is _MARK:
        items = self._stack[i + 1 :]
        del self._stack[i:]
        return items
    self._fail('an opcode lacks its mark')

  def _push(self, value: Any) -> None:
    self._spend(1)
    self._stack.append(value)

  def _spend(self, items: int) -> None:
    self._items_left -= items
    if self._items_left < 0:
      self._fail(f'it holds more than {_MAX_ITEMS:,} objects')

  def _spend_bytes(self, count: int) -> None:
    self._bytes_left -= count
    if self._bytes_left < 0:
      self._fail('it copies more bytes than it has')

  def _do(self, name: str, argument: Any) -> None:
    if name in _IGNORED:
      return
    if name in _LITERALS:
      self._push(argument)
    elif name in _CONSTANTS:
      self._push(_CONSTANTS[name]())
    elif name in ('PUT', 'BINPUT', 'LONG_BINPUT'):
      self._memo[argument] = self._top()
    elif name == 'MEMOIZE':
      self._memo[len(self._memo)] = self._top()
    elif name in ('GET', 'BINGET', 'LONG_BINGET'):
      if argument not in self._memo:
        self._fail(f'nothing was stored under {argument}')
      self._push(self._memo[argument])
    elif name == 'GLOBAL':
      self._push(self._global(*argument.split(' ', 1)))
    elif name == 'STACK_GLOBAL':
      attribute, module = self._pop(), self._pop()
      self._push(self._global(module, attribute))
    elif name in _ACTIONS:
      _ACTIONS[name](self)
    else:
      self._fail(f'the opcode {name} is not one that weights need')

  def _top(self) -> Any:
    value = self._pop()
    self._stack.append(value)
    return value

  def _global(self, module: Any, attribute: Any) -> _Global:
    if not isinstance(module, str) or not isinstance(attribute, str):
      self._fail('the name of a global is no string')
    name = f'{module}.{attribute}'
    if name not in _GLOBALS:
      raise _RefusedError(
        f'byte {self._position}: the pickle asks for {name[:200]}; nothing of '
        f'it was run{_REMEDIES.get(name.partition(".")[0], "")}'
      )
    return _GLOBALS[name]

  def _tuple(self) -> None:
    self._push(tuple(self._pop_mark()))

  def _tuple_of(self, n: int) -> None:
    items = [self._pop() for _ in range(n)]
    self._push(tuple(reversed(items)))

  def _list(self) -> None:
    self._push(self._pop_mark())

  def _dict(self) -> None:
    items = self._pop_mark()
    self._push({})
    self._put(self._stack[-1], items)

  def _append(self) -> None:
    items = [self._pop()]
    self._extend(items)

  def _appends(self) -> None:
    self._extend(self._pop_mark())

  def _extend(self, items: list[Any]) -> None:
    target = self._top()
    if type(target) is not list:
      self._fail(f'it appends to a {type(target).__name__}')
    target.extend(items)

  def _set_item(self) -> None:
    value, key = self._pop(), self._pop()
    self._put(self._top(), [key, value])

  def _set_items(self) -> None:
    items = self._pop_mark()
    self._put(self._top(), items)

  def _put(self, target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict):
      self._fail(f'it sets an item of a {type(target).__name__}')
    if len(items) % 2:
      self._fail('a key has no value')
    self._spend(len(items))
    for key, value in zip(items[::2], items[1::2], strict=True):
      if not isinstance(key, (str, int)):
        self._fail(f'a key is a {type(key).__name__}')
      target[key] = value

  def _reduce(self) -> None:
    arguments, function = self._pop(), self._pop()
    self._push(self._call(function, arguments))

  def _call(self, function: Any, arguments: Any) -> Any:
    """Emulates a global: returns its result without calling it."""
    if not isinstance(function, _Global) or type(arguments) is not tuple:
      self._fail(f'it calls a {type(function).__name__}')
    match function.kind, arguments:
      case 'mapping', ():
        return _Mapping()
      case 'mapping', (dict() as items,):
        self._spend(len(items))
        return _Mapping(items)
      case 'mapping', (list() as pairs,):
        result = _Mapping()
        for pair in pairs:
          if not isinstance(pair, (tuple, list)):
            self._fail('a mapping is made of no pairs')
          self._put(result, list(pair))
        return result
      case '_reconstruct', (_Global('ndarray'), tuple(), bytes() | str()):
        return _Array()
      case 'dtype', (_Global('bfloat16') | 'bfloat16', *_):
        return _Dtype(_DTYPES['bfloat16'])
      case 'dtype', (str() as code, *_):
        if code.lstrip('<>=|') not in _DTYPES:
          self._fail(f'arrays of dtype {code[:40]!r} are no weights')
        return _Dtype(np.dtype(_DTYPES[code.lstrip('<>=|')]))
      case 'encode', (str() as text, 'latin1' | 'latin-1'):
        # Python 3 writes bytes this way in protocol 2.
        self._spend_bytes(len(text))
        return text.encode('latin1')
      case '_load_type', (str() as name,) if name in _TYPES:
        return _TYPES[name]
      case 'bytes', ():
        return b''
      case '_create_array', (
        _Global('_reconstruct'),
        (_Global('ndarray'), tuple(), bytes() | str()),
        tuple() as state,
        None | {},
      ):
        # dill writes subclasses of numpy's array this way.
        return self._filled(_Array(), state)
      case 'scalar', (_Dtype() as kind, bytes() as raw):
        return self._as_array(raw, kind.dtype, (), 'C')[()]
      case '_frombuffer', (
        raw,
        _Dtype() as kind,
        tuple() as shape,
        str() as order,
        *_,
      ):
        return _Array(self._as_array(raw, kind.dtype, shape, order))
    self._fail(f'it calls {function.kind} in a way that no array needs')

  def _build(self) -> None:
    state, target = self._pop(), self._top()
    match target, state:
      case _Array(value=None), tuple():
        self._filled(target, state)
      case _Dtype(), (int(), '<' | '>' | '=' | '|' as order, *_):
        target.dtype = target.dtype.newbyteorder(order)
      case _Mapping(), dict():
        # Some versions of Haiku wrapped a dict in a plain object.
        self._spend(len(state))
        inner = [v for v in state.values() if isinstance(v, dict)]
        if len(inner) != 1:
          self._fail('a mapping has an unknown inside')
        self._spend(len(inner[0]))
        target.update(inner[0])
      case _:
        self._fail(f'a {type(target).__name__} has an unknown inside')

  def _filled(self, array: _Array, state: tuple[Any, ...]) -> _Array:
    match state:
      case (
        int(),
        tuple() as shape,
        _Dtype() as kind,
        bool() | int() as fortran,
        bytes() | bytearray() as raw,
      ):
        order = 'F' if fortran else 'C'
        array.value = self._as_array(raw, kind.dtype, shape, order)
      case _:
        self._fail('an array has an unknown inside')
    return array

  def _new_object(self) -> None:
    arguments, kind = self._pop(), self._pop()
    if kind is not _MAPPING or arguments != ():
      self._fail('it makes an object that is no mapping')
    self._push(_Mapping())

  def _as_array(
    self, raw: Any, dtype: np.dtype, shape: tuple[Any, ...], order: str
  ) -> np.ndarray:
    if not isinstance(raw, (bytes, bytearray)):
      self._fail(f'the data of an array is a {type(raw).__name__}')
    sizes = [type(n) is int and 0 <= n <= len(raw) for n in shape]
    if len(shape) > _MAX_RANK or not all(sizes) or order not in ('C', 'F'):
      self._fail(f'an array has the impossible shape {str(shape)[:80]}')
    if math.prod(shape) * dtype.itemsize != len(raw):
      self._fail(
        f'an array of shape {shape} and dtype {dtype} has {len(raw)} bytes'
      )
    flat = np.frombuffer(raw, dtype)
    if not dtype.isnative:
      self._spend_bytes(len(raw))
      flat = flat.astype(dtype.newbyteorder('='))
    flat.flags.writeable = False
    return flat.reshape(shape, order=order)  # type: ignore[call-overload]

  def _finished(self, value: Any, depth: int = 0) -> Any:
    """Returns plain containers and arrays."""
    if depth > _MAX_DEPTH:
      self._fail('it is nested too deeply')
    # Counts shared containers each time: they could expand without bound.
    self._spend(1)
    match value:
      case _Array():
        if value.value is None:
          self._fail('an array has no data')
        return value.value
      case dict():
        return {k: self._finished(v, depth + 1) for k, v in value.items()}
      case list():
        return [self._finished(v, depth + 1) for v in value]
      case tuple():
        return tuple(self._finished(v, depth + 1) for v in value)
      case _Global() | _Dtype() | _Mark():
        self._fail('it holds a function or a type')
    return value


class _RefusedError(Exception):
  """Reported to the caller as a ValueError."""


_IGNORED = {'PROTO', 'FRAME'}
_LITERALS = {
  'INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4',
  'FLOAT', 'BINFLOAT', 'STRING', 'BINSTRING', 'SHORT_BINSTRING',
  'UNICODE', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8',
  'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8', 'BYTEARRAY8',
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
  'NONE': lambda: None,
  'NEWTRUE': lambda: True,
  'NEWFALSE': lambda: False,
  'EMPTY_TUPLE': tuple,
  'EMPTY_LIST': list,
  'EMPTY_DICT': dict,
  'MARK': lambda: _MARK,
}
_ACTIONS: dict[str, Callable[[_Reader], None]] = {
  'TUPLE': _Reader._tuple,
  'TUPLE1': lambda reader: reader._tuple_of(1),
  'TUPLE2': lambda reader: reader._tuple_of(2),
  'TUPLE3': lambda reader: reader._tuple_of(3),
  'LIST': _Reader._list,
  'DICT': _Reader._dict,
  'APPEND': _Reader._append,
  'APPENDS': _Reader._appends,
  'SETITEM': _Reader._set_item,
  'SETITEMS': _Reader._set_items,
  'REDUCE': _Reader._reduce,
  'BUILD': _Reader._build,
  'NEWOBJ': _Reader._new_object,
}
