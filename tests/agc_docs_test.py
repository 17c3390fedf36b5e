"""The recipes of docs/agc.md run, and clip."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from nfnets_jax import agc

TEXT = (pathlib.Path(__file__).parents[1] / 'docs' / 'agc.md').read_text()
BLOCKS = re.findall(r'^```python\n(.*?)^```', TEXT, re.M | re.S)


@pytest.mark.thorough
@pytest.mark.parametrize('code', BLOCKS)
def test_recipes_run(code, monkeypatch):
  clipped = {}
  original = agc._clip

  def spy(grad, param, *arguments):
    done = original(grad, param, *arguments)
    clipped[len(clipped)] = bool(jnp.any(done.is_clipped))
    return done

  monkeypatch.setattr(agc, '_clip', spy)
  names = {}
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    exec(compile(code, 'docs/agc.md', 'exec'), names)
  if 'updates' in names or 'nnx' in names:
    # Two layers with biases, and the weights of the second left out.
    assert len(clipped) == 3
  elif 'clipping' in names:
    assert names['clipping'] == pytest.approx(0.02)


def test_there_are_recipes_for_all():
  for name in ('haiku', 'flax.linen', 'nnx', 'equinox'):
    assert sum(f'import {name}' in code for code in BLOCKS) == 1
