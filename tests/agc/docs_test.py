"""The recipes of docs/agc.md run, and clip."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfnets_jax import agc
from nfnets_jax.agc import clip

TEXT = (pathlib.Path(__file__).parents[2] / 'docs' / 'agc.md').read_text()
BLOCKS = re.findall(r'^```python\n(.*?)^```', TEXT, re.M | re.S)


@pytest.mark.thorough
@pytest.mark.parametrize('code', BLOCKS)
def test_recipes_run(code, monkeypatch):
  clipped = {}
  original = clip.scale_units

  def spy(leaves, equation):
    clipped.update(leaves)
    return original(leaves, equation)

  monkeypatch.setattr(clip, 'scale_units', spy)
  names = {}
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    exec(compile(code, 'docs/agc.md', 'exec'), names)
  if 'updates' in names or 'nnx' in names:
    # Two layers with biases, all but the weights of the second clipped.
    assert len(clipped) == 3
  elif 'clipping' in names:
    assert names['clipping'] == pytest.approx(0.02)
  elif 'sharded' in names:
    (found,) = names['clipped'].values()
    np.testing.assert_allclose(found, np.full((8, 16), 0.01), rtol=1e-6)


def test_there_are_recipes_for_all():
  for name in ('haiku', 'flax.linen', 'nnx', 'equinox'):
    assert sum(f'import {name}' in code for code in BLOCKS) == 1


def _moves(optimizer, steps):
  """How far a parameter at zero moves a step, in λ·ε·(learning rate)."""
  rate, clipping, eps = 0.1, 0.01, 1e-3
  chain = optax.chain(agc.adaptive_grad_clip(clipping, eps), optimizer(rate))
  # Ten units that stay far below ε.
  params = {'bias': jnp.zeros(10)}
  state = chain.init(params)
  grads = {'bias': jnp.full(10, 7.0)}
  found = []
  for _ in range(steps):
    updates, state = jax.jit(chain.update)(grads, state, params)
    params = optax.apply_updates(params, updates)
    found.append(np.linalg.norm(updates['bias']) / (clipping * eps * rate))
  assert np.linalg.norm(params['bias']) < eps
  return np.asarray(found)


def test_what_starts_at_zero_moves_as_said():
  step = np.arange(1, 31)
  for nesterov in (True, False):
    found = _moves(
      lambda rate, nesterov=nesterov: optax.sgd(rate, 0.9, nesterov=nesterov),
      30,
    )
    expected = (1 - 0.9 ** (step + nesterov)) / (1 - 0.9)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert np.all(found < 10)
    if nesterov:
      first = [f'{x:.1f}' for x in found[:3]]
      assert first == ['1.9', '2.7', '3.4']
      assert f'{first[0]}, {first[1]} and {first[2]} times' in TEXT
  np.testing.assert_allclose(_moves(optax.sgd, 3), np.ones(3), rtol=1e-4)
