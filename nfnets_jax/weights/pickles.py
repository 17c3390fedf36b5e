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

import pickletools
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO

from nfnets_jax.weights import pickle_globals

# More than any network needs, yet small in memory.
_MAX_ITEMS = 1_000_000
_MAX_DEPTH = 20


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
    >>> import numpy as np
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
    self._budget = pickle_globals.Budget(_MAX_ITEMS, size)
    self._stack: list[Any] = []
    self._memo: dict[int, Any] = {}

  def read(self) -> Any:
    try:
      for opcode, argument, position in pickletools.genops(self._file):
        self._budget.position = position or 0
        if opcode.name == 'STOP':
          return self._finished(self._pop())
        self._do(opcode.name, argument)
    except RecursionError:
      self._budget.fail('it is nested too deeply')
    except pickle_globals.RefusedError as error:
      raise ValueError(str(error)) from None
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as e:
      # Raised by pickletools for invalid opcodes and truncated data.
      position = self._budget.position
      raise ValueError(
        f'byte {position}: this is not a valid pickle of arrays: {e}'
      ) from None
    self._budget.fail('it ends without its last opcode')

  def _pop(self) -> Any:
    if not self._stack or self._stack[-1] is _MARK:
      self._budget.fail('an opcode lacks its operand')
    return self._stack.pop()

  def _pop_mark(self) -> list[Any]:
    for i in range(len(self._stack) - 1, -1, -1):
      if self._stack[i] is _MARK:
        items = self._stack[i + 1 :]
        del self._stack[i:]
        return items
    self._budget.fail('an opcode lacks its mark')

  def _push(self, value: Any) -> None:
    self._budget.spend(1)
    self._stack.append(value)

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
        self._budget.fail(f'nothing was stored under {argument}')
      self._push(self._memo[argument])
    elif name == 'GLOBAL':
      self._push(self._global(*argument.split(' ', 1)))
    elif name == 'STACK_GLOBAL':
      attribute, module = self._pop(), self._pop()
      self._push(self._global(module, attribute))
    elif name in _ACTIONS:
      _ACTIONS[name](self)
    else:
      self._budget.fail(f'the opcode {name} is not needed for arrays')

  def _top(self) -> Any:
    value = self._pop()
    self._stack.append(value)
    return value

  def _global(self, module: Any, attribute: Any) -> pickle_globals.Global:
    if not isinstance(module, str) or not isinstance(attribute, str):
      self._budget.fail('the name of a global is not a string')
    name = f'{module}.{attribute}'
    if name not in pickle_globals.GLOBALS:
      remedy = pickle_globals.REMEDIES.get(name.partition('.')[0], '')
      raise pickle_globals.RefusedError(
        f'byte {self._budget.position}: the pickle asks for {name[:200]}; '
        f'nothing of it was run{remedy}'
      )
    return pickle_globals.GLOBALS[name]

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
    pickle_globals.put(self._stack[-1], items, self._budget)

  def _append(self) -> None:
    items = [self._pop()]
    self._extend(items)

  def _appends(self) -> None:
    self._extend(self._pop_mark())

  def _extend(self, items: list[Any]) -> None:
    target = self._top()
    if type(target) is not list:
      self._budget.fail(f'it appends to a {type(target).__name__}')
    target.extend(items)

  def _set_item(self) -> None:
    value, key = self._pop(), self._pop()
    pickle_globals.put(self._top(), [key, value], self._budget)

  def _set_items(self) -> None:
    items = self._pop_mark()
    pickle_globals.put(self._top(), items, self._budget)

  def _reduce(self) -> None:
    arguments, function = self._pop(), self._pop()
    self._push(pickle_globals.call(function, arguments, self._budget))

  def _build(self) -> None:
    state, target = self._pop(), self._top()
    match target, state:
      case pickle_globals.Array(value=None), tuple():
        pickle_globals.fill(target, state, self._budget)
      case pickle_globals.Dtype(), (int(), '<' | '>' | '=' | '|' as order, *_):
        target.dtype = target.dtype.newbyteorder(order)
      case pickle_globals.Mapping(), dict():
        # Some versions of Haiku wrapped a dict in a plain object.
        self._budget.spend(len(state))
        inner = [v for v in state.values() if isinstance(v, dict)]
        if len(inner) != 1:
          self._budget.fail('a mapping has an unexpected state')
        self._budget.spend(len(inner[0]))
        target.update(inner[0])
      case _:
        self._budget.fail(f'a {type(target).__name__} has an unexpected state')

  def _new_object(self) -> None:
    arguments, kind = self._pop(), self._pop()
    if kind is not pickle_globals.MAPPING or arguments != ():
      self._budget.fail('it makes an object that is not a mapping')
    self._push(pickle_globals.Mapping())

  def _finished(self, value: Any, depth: int = 0) -> Any:
    """Returns plain containers and arrays."""
    if depth > _MAX_DEPTH:
      self._budget.fail('it is nested too deeply')
    # Counts shared containers each time: they could expand without bound.
    self._budget.spend(1)
    match value:
      case pickle_globals.Array():
        if value.value is None:
          self._budget.fail('an array has no data')
        return value.value
      case dict():
        return {k: self._finished(v, depth + 1) for k, v in value.items()}
      case list():
        return [self._finished(v, depth + 1) for v in value]
      case tuple():
        return tuple(self._finished(v, depth + 1) for v in value)
      case pickle_globals.Global() | pickle_globals.Dtype() | _Mark():
        self._budget.fail('it holds a function or a type')
    return value


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
