import dataclasses

import numpy as np
import pytest

from nfnets_jax.data import datasets, imagenet
from nfnets_jax.training import eval_state

IDS, NAMES = imagenet.classes()


def _loaded(names, count=None):
  count = len(names) if count is None else count
  return eval_state.EvalState((), count, names, 'runs/x', False)


def _data(names):
  return datasets.Dataset('photos', 'test', [], tuple(names))


@pytest.mark.parametrize(
  ('loaded', 'names'),
  [
    (_loaded(('cat', 'dog')), ('cat', 'dog')),
    (_loaded(None, 2), ('cat', 'dog')),  # nobody knows
    (_loaded(None, 1000), IDS),
    (_loaded(None, 1000), map(str, range(1000))),  # ImageNet-V2
    (_loaded(IDS), map(' '.join, zip(IDS, NAMES, strict=True))),
  ],
)
def test_same_classes(loaded, names, said):
  assert eval_state.match_classes(loaded, _data(names)) is None
  assert not said


@pytest.mark.parametrize(
  ('loaded', 'names', 'expected', 'message'),
  [
    (_loaded(('cat', 'dog', 'emu')), ('emu', 'cat'), [2, 0], 'has 2 of the 3'),
    (_loaded(('cat', 'dog')), ('dog', 'cat'), [1, 0], 'in another order'),
    (_loaded(None, 1000), IDS[:400:2], range(0, 400, 2), '200 of the 1000'),
  ],
)
def test_some_classes_or_another_order(loaded, names, expected, message, said):
  found = eval_state.match_classes(loaded, _data(names))
  np.testing.assert_array_equal(found, expected)
  assert len(said) == 1 and message in said[0]


@pytest.mark.parametrize(
  ('loaded', 'names', 'message'),
  [
    (_loaded(None, 2), ('cat',), '2 classes, and photos has 1; train first'),
    (_loaded(None, 2), IDS[:1], '2 classes, and photos has 1; train first'),
    (_loaded(None, 2), 'abc', '2 classes, and photos has 3; train first'),
    (
      _loaded(('cat', 'dog')),
      ('cat', 'emu'),
      "have changed:\n.*'dog' -> 'emu'",
    ),
    (_loaded(('cat', 'dog', 'emu')), ('cat', 'fox'), "runs/x: .*'fox'"),
    (_loaded(None, 1000), ('cat', 'fox'), "runs/x: .*'cat', 'fox'"),
  ],
)
def test_classes_that_the_net_lacks(loaded, names, message):
  with pytest.raises(ValueError, match=message):
    eval_state.match_classes(loaded, _data(names))


def test_renamed_classes_may_be_allowed(said):
  loaded = _loaded(('cat', 'dog'))
  assert eval_state.match_classes(loaded, _data(('cat', 'emu')), True) is None
  assert "'dog' -> 'emu'" in said[0]


def test_weights_that_may_be_the_released_ones():
  assert _loaded(None, 1000).is_foreign
  assert not _loaded(None, 10).is_foreign
  assert not _loaded(IDS).is_foreign  # exported from here
  run = dataclasses.replace(_loaded(None, 1000), is_run=True)
  assert not run.is_foreign
