import jax
import numpy as np
import pytest

from nfnets_jax import agc
from tests.agc.common import draw


def test_summary_is_of_all_units():
  params = {'conv': draw((3, 3, 4, 5), 1), 'head': draw((5, 2), 2)}
  grads = {'conv': draw((3, 3, 4, 5), 3, 0.1), 'head': draw((5, 2), 4)}
  found = agc.summarize(grads, params)
  assert [row.path for row in found.rows] == ['head', 'conv']
  assert [row.units for row in found.rows] == [2, 5]
  assert found.ratios.shape == (7,)
  ratios = np.linalg.norm(grads['head'], axis=0)
  ratios = ratios / np.linalg.norm(params['head'], axis=0)
  assert found.rows[0].largest == pytest.approx(ratios.max(), rel=1e-5)
  assert found.rows[0].median == pytest.approx(np.median(ratios), rel=1e-5)
  assert len(str(found).splitlines()) == 3
  less = agc.summarize(grads, params, exclude=lambda path, x: path == 'head')
  assert [row.path for row in less.rows] == ['conv']
  # λ that clips two of the seven.
  suggested = agc.suggest_clipping([found], fraction=1.5 / 7)
  assert np.sum(found.ratios > suggested) == 2
  # Larger gradients ask for a larger λ.
  larger = agc.summarize(jax.tree.map(lambda x: 10 * x, grads), params)
  assert agc.suggest_clipping([found, larger]) > suggested
  for summaries, fraction in (([], 0.1), ([found], 0.0), ([found], 1.0)):
    with pytest.raises(
      ValueError, match='no finite ratios|fraction must be in'
    ):
      agc.suggest_clipping(summaries, fraction)
