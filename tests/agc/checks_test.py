import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax import agc
from tests.agc.common import clip, draw, oracle


@pytest.mark.parametrize('dtype', [jnp.int32, jnp.complex64, jnp.bool_])
def test_other_dtypes_are_refused_by_path(dtype):
  leaf = {'net': {'w': jnp.ones((2, 2), dtype)}}
  with pytest.raises(
    TypeError, match=f'got {dtype.dtype} at net/w; exclude it'
  ):
    clip(leaf, leaf, 0.1)
  exclude = {'exclude': lambda path, leaf: True}
  assert clip(leaf, leaf, 0.1, **exclude)['net']['w'] is leaf['net']['w']


@pytest.mark.parametrize('leaf', [1.0, 3, 'w', True])
def test_leaves_that_are_no_arrays_are_named(leaf):
  array = jnp.ones(())
  message = 'got a Python .* at net/w; make it an array or exclude it'
  for g, w in ((leaf, leaf), (leaf, array), (array, leaf)):
    grads, params = {'net': {'w': g}}, {'net': {'w': w}}
    for units in (None, ['O', 'IO']):
      with pytest.raises(TypeError, match=message):
        clip(grads, params, 0.1, units=units)
      with pytest.raises(TypeError, match=message):
        agc.summarize(grads, params, units=units)
  with pytest.raises(TypeError, match='got a Python'):
    agc.unitwise_norm(leaf)
  params = {'net': {'w': leaf}, 'v': array}
  kept = clip(params, params, 0.1, exclude=lambda path, leaf: 'net' in path)
  assert kept['net']['w'] is leaf


IMPOSSIBLE = [
  np.asarray(-1.0),
  '0.01',
  True,
  np.bool_(True),
  jnp.asarray(True),
  jnp.asarray(-0.5),
  np.ones(1),
  jnp.ones((2,)),
  np.nan,
  jnp.asarray(jnp.nan),
  np.inf,
  -np.inf,
  0,
  np.float32(0),
  np.int64(-3),
  1j,
  b'1',
  None,
  [0.01],
  10**400,
]


@pytest.mark.parametrize('value', IMPOSSIBLE, ids=repr)
def test_impossible_numbers_are_refused_with_the_value(value):
  params = {'w': jnp.ones((2, 2))}
  shown = re.escape(repr(value))
  for args, kwargs in (
    ((value,), {}),
    ((0.01,), {'eps': value}),
  ):
    with pytest.raises(ValueError, match=f'must be positive, got .*{shown}'):
      agc.adaptive_grad_clip(*args, **kwargs)
  with pytest.raises(ValueError, match=f'must be positive, got {shown}'):
    clip(params, params, lambda count: value)
  with pytest.raises(ValueError, match=f'positive number, got {shown}'):
    agc.summarize(params, params, eps=value)
  with pytest.raises(ValueError, match=f'fraction must be .* got {shown}'):
    agc.suggest_clipping([agc.summarize(params, params)], value)


@pytest.mark.parametrize(
  'value',
  [
    1,
    np.int64(1),
    np.float64(1),
    np.float16(1),
    np.asarray(1.0),
    np.asarray(1),
    jnp.asarray(1.0),
    jnp.asarray(1, jnp.bfloat16),
  ],
  ids=repr,
)
def test_numbers_are_numbers(value):
  g, w = draw((4, 3), 1), draw((4, 3), 2)
  (expected,) = clip([g], [w], 1.0, eps=1.0)
  for clipping in (value, lambda count: value):
    (found,) = clip([g], [w], clipping, eps=value)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.thorough
def test_traced_numbers_are_allowed():
  g, w = draw((4, 3), 1), draw((4, 3), 2)

  def update(clipping, eps):
    return clip([g], [w], clipping, eps=eps)[0]

  np.testing.assert_array_equal(
    jax.jit(update)(0.1, 0.01),
    jax.jit(update, static_argnums=(0, 1))(0.1, 0.01),
  )
  many = jax.vmap(update, (0, None))(jnp.asarray([0.1, 0.2]), 0.01)
  np.testing.assert_allclose(many[1], oracle(g, w, (0,), 0.2), rtol=1e-5)
  for value in (jnp.ones(2), jnp.asarray(True)):
    with pytest.raises(ValueError, match='must be positive, got'):
      jax.jit(update)(value, 0.01)
    with pytest.raises(ValueError, match='must be positive, got'):
      jax.jit(update)(0.1, value)
