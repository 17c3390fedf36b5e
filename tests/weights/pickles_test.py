"""The reader of pickles: right on arrays, deaf to all else."""

import collections
import io
import os
import pickle
import struct

import dill
import jax
import ml_dtypes
import numpy as np
import pytest
from haiku._src import data_structures

from nfnets_jax.weights import pickles

TREE = {
  'NFNet/~/conv': {
    'w': np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4),
    'half': np.ones((2, 2), np.float16),
    'brain': np.ones(3, ml_dtypes.bfloat16),
    'fortran': np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    'big_endian': np.arange(3, dtype='>f4'),
    'scalar_array': np.asarray(2, np.float32),
    'scalar': np.float32(3),
    'empty': np.zeros(0, np.float32),
    'strided': np.arange(12, dtype=np.float32)[::3],
  }
}


def read(data):
  return pickles.read(io.BytesIO(data), len(data))


def check(found):
  assert list(found) == list(TREE)
  for name, x in TREE['NFNet/~/conv'].items():
    y = found['NFNet/~/conv'][name]
    assert y.dtype == x.dtype.newbyteorder('=')
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize('dump', [pickle.dumps, dill.dumps])
def test_reads_arrays_of_all_protocols(dump, protocol):
  check(read(dump(TREE, protocol=protocol)))


@pytest.mark.parametrize(
  'mapping', [collections.OrderedDict, data_structures.FlatMap]
)
@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_reads_other_mappings(mapping, protocol):
  tree = mapping({k: mapping(v) for k, v in TREE.items()})
  check(read(pickle.dumps(tree, protocol=protocol)))


def test_reads_what_an_old_numpy_and_haiku_wrote():
  """numpy 2 calls numpy.core numpy._core; Haiku has renamed its mapping."""
  data = pickle.dumps(TREE, protocol=2)
  old = data.replace(b'cnumpy._core.', b'cnumpy.core.')
  assert old != data
  check(read(old))
  name = b'chaiku._src.data_structures\nFlatMapping\n'
  old = b'\x80\x02' + name + old[2:-1] + b'\x85R.'
  check(read(old))


def test_reads_what_dill_writes_of_a_subclass():
  raw = np.arange(3, dtype=np.float32)
  function, arguments, state = raw.__reduce__()

  class Odd:
    def __reduce__(self):
      from dill import _dill

      return _dill._create_array, (function, arguments, state, None)

  found = read(pickle.dumps({'a': {'w': Odd()}}))
  np.testing.assert_array_equal(found['a']['w'], raw)


class Evil:
  """Pickles as a call of anything."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize(
  ('function', 'arguments', 'name'),
  [
    (os.system, ('touch {0}',), 'posix.system'),
    (eval, ('open("{0}", "w")',), '(__builtin__|builtins).eval'),
    (np.load, ('{0}',), 'numpy.load'),
    (pickle.loads, (b'.',), '_?pickle.loads'),
    (getattr, (np, 'save'), '(__builtin__|builtins).getattr'),
  ],
)
def test_refuses_other_globals(tmp_path, function, arguments, name, protocol):
  file = tmp_path / 'touched'
  arguments = [
    x.format(file) if isinstance(x, str) else x
    for x in arguments
    if not isinstance(x, type(np))
  ]
  data = pickle.dumps({'a': {'w': Evil(function, *arguments)}}, protocol)
  with pytest.raises(ValueError, match=f'asks for {name}; nothing of it'):
    read(data)
  assert not file.exists()


@pytest.mark.parametrize('cut', [0, 1, 10, 100, 300, -1, -2])
def test_cut_off(cut):
  data = pickle.dumps(TREE)
  with pytest.raises(ValueError, match='not a valid pickle'):
    read(data[:cut])


def bomb_of_lists():
  # Each list holds the one before ten times.
  return (
    b']'
    + b'q\x00'
    + b''.join(
      b']q' + bytes([i]) + b'(' + (b'h' + bytes([i - 1])) * 10 + b'e'
      for i in range(1, 15)
    )
    + b'.'
  )


def bomb_of_copies():
  text = b'X' + struct.pack('<I', 100_000) + b'a' * 100_000 + b'q\x00'
  encode = b'c_codecs\nencode\nq\x01(h\x00X\x06\x00\x00\x00latin1tq\x02'
  return text + encode + b'h\x01h\x02R' * 50_000 + b'.'


def bomb_of_mappings():
  items = b''.join(b'K' + bytes([i]) + b'N' for i in range(200))
  copy = b'cbuiltins\ndict\nq\x01(}(' + items + b'utq\x02'
  return copy + b'h\x01h\x02R' * 100_000 + b'.'


def long_memo():
  return b'Nr\xff\xff\xff\x7f.'  # the C unpickler would take 16 GiB


def long_bytes():
  return b'\x8e' + struct.pack('<Q', 2**62) + b'a.'


def deep():
  return b'(' + b']' * 100_000 + b'a' * 99_999 + b'.'


@pytest.mark.parametrize(
  'make',
  [
    bomb_of_lists,
    bomb_of_copies,
    bomb_of_mappings,
    long_bytes,
    deep,
  ],
)
def test_bombs(make):
  with pytest.raises(ValueError, match='not a valid pickle'):
    read(make())


def test_memo_far_out_takes_no_memory():
  assert read(long_memo()) is None


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    (b'', 'not a valid pickle'),
    (b'hello', 'not a valid pickle'),
    (b'K\x01', 'ends|exhausted|not a valid'),
    (b't.', 'lacks its mark'),
    (b'e.', 'mark'),
    (b'R.', 'lacks its operand'),
    (b'K\x01K\x02R.', 'calls a int'),
    (b'cnumpy\nndarray\n.', 'function or a type'),
    (b'ccollections\nOrderedDict\nK\x01\x85R.', 'in an unexpected way'),
    (b'(K\x01d.', 'a key has no value'),
    (b'}]Ns.', 'a key is a list'),
    (b'h\x07.', 'nothing was stored under 7'),
    (b'P1\n.', 'PERSID'),
    (b'\x82\x01.', 'EXT1'),
    (b'(.', 'lacks its operand'),
  ],
)
def test_other_damage_is_named(data, message):
  with pytest.raises(ValueError, match=message):
    read(data)


@pytest.mark.parametrize('dtype', ['O', 'V4', 'S4', 'U2', 'M8[s]', 'c8'])
def test_other_dtypes(dtype):
  x = np.zeros(2, dtype)
  if dtype == 'O':
    x[:] = None
  with pytest.raises(ValueError, match='are not weights|asks for'):
    read(pickle.dumps({'a': {'w': x}}))


def test_array_with_too_few_bytes():
  data = pickle.dumps(np.arange(5, dtype=np.float32), protocol=2)
  with pytest.raises(ValueError, match='has 20 bytes'):
    read(data.replace(b'K\x05\x85', b'K\x06\x85'))


def test_arrays_of_others_have_a_remedy():
  with pytest.raises(ValueError, match=r'for jax.*Pickle jax\.device_get'):
    read(pickle.dumps({'w': jax.numpy.zeros(2)}))
  # No PyTorch is needed to name what it would call.
  data = b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.'
  with pytest.raises(ValueError, match=r'for torch\..*save_file'):
    read(data)
