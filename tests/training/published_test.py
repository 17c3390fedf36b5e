import pytest

from nfnets_jax.models import variants
from nfnets_jax.training import published


@pytest.mark.parametrize('name', published._TIMM)
def test_every_released_net_has_figures(name):
  for n in range(7):
    figures = published.accuracies(f'nfnet_f{n}', name)
    assert [x.source for x in figures] == ['timm', 'paper'][: len(figures)]
    assert len(figures) == (2 if name == 'ImageNet' else 1)
    for figure in figures:
      assert figure.top_1 < (figure.top_5 or 100)
  others = [x for x in variants.VARIANTS if x not in published._MODELS]
  assert not any(published.accuracies(x, name) for x in others)


def test_sets_are_told_by_their_size():
  assert published.identify(1000, 50_000) == 'ImageNet'
  assert published.identify(1000, 50_000, label_sets=True) == 'ImageNet-ReaL'
  assert published.identify(1000, 64) is None
  assert published.identify(1000, 10_000, label_sets=True) is None
  assert not published.accuracies('nfnet_f0', None)
