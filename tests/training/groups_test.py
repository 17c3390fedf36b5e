import jax
import numpy as np
import pytest

from nfnets_jax.training import groups


@pytest.mark.parametrize('text', ['x', '=1', 'a=-1', 'a=b', '(=1', 'a=inf', ''])
def test_groups_written_otherwise(text):
  with pytest.raises(ValueError, match='write PATTERN=FACTOR'):
    groups.parse(text)


def test_groups_scale_updates():
  scale = groups.scale(groups.parse('conv=0.5,/b$=0'))
  ones = np.ones(2, np.float32)
  updates = {
    'net/conv': {'w': ones, 'b': ones},
    'net/linear': {'w': ones, 'b': ones * np.nan},
  }
  found, _ = scale.update(updates, scale.init(updates))
  assert jax.tree.map(lambda x: float(x[0]), found) == {
    'net/conv': {'w': 0.5, 'b': 0.5},
    'net/linear': {'w': 1.0, 'b': 0.0},
  }
  with pytest.raises(ValueError, match="'conv' is found in no parameter"):
    scale.update({'net/linear': {'w': ones}}, scale.init(updates))
