import json
import re

import haiku as hk
import jax
import numpy as np
import pytest

from nfnets_jax import models
from nfnets_jax.models import published
from nfnets_jax.weights import download, timm
from tests import golden as reference
from tests.golden import timm_features

SMALL = {
  'width': (16, 32),
  'depth': (1, 2),
  'strides': (1, 2),
}
NETS = {
  'nfnet_tiny': {},
  'nf_resnet50': {**SMALL, 'stem_width': 8},
  'resnet50': {**SMALL, 'stem_width': 8, 'stem_pool': False},
  'fixup_resnet50': {**SMALL, 'stem_width': 8},
  'nf_regnet_b0': {**SMALL, 'group_width': 16},
  'efficientnet_b0': {
    **SMALL,
    'kernel_sizes': (3, 5),
    'expansions': (1, 2),
    'stem_width': 8,
    'final_width': 24,
  },
}


def _net(name, **arguments):
  return hk.transform_with_state(
    lambda x: models.create(name, **arguments)(x, is_training=False)
  )


@pytest.mark.parametrize(
  ('name', 'remat'), [*((name, None) for name in NETS), ('nfnet_tiny', 'stage')]
)
def test_maps_have_the_announced_sizes_and_no_classifier(name, remat):
  settings = NETS[name]
  net = _net(name, features_only=True, remat=remat, **settings)
  images = jax.ShapeDtypeStruct((2, 64, 96, 3), 'float32')
  variables = jax.eval_shape(net.init, jax.random.key(0), images)
  maps, _ = jax.eval_shape(net.apply, *variables, None, images)
  info = models.feature_info(name, **settings)
  assert [x.shape for x in maps] == [
    (2, 64 // x.stride, 96 // x.stride, x.channels) for x in info
  ]
  assert [x.stride for x in info] == sorted({x.stride for x in info})
  assert not any(
    re.fullmatch(r'\w+/~/linear', module) for module in variables[0]
  )


def _maps(name):
  changes = {**timm.overrides(name), **timm_features.NETS[name][0]}
  net = _net(name, features_only=True, **changes)
  images = reference.image(1, 32)
  shapes = jax.eval_shape(_net(name, **changes).init, jax.random.key(0), images)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  tensors = {
    key: timm_features.fill(key, x.shape)
    for key, x in timm.to_timm(*zeros, name, **changes).items()
  }
  params, state = timm.from_timm(tensors, name, **changes)
  return jax.jit(net.apply)(params, state, None, images)[0]


@pytest.mark.thorough
@pytest.mark.parametrize('name', timm_features.NETS)
def test_maps_are_those_of_timm(name, golden):
  expected = np.load(golden / 'timm_features.npz')
  for i, ours in enumerate(_maps(name)):
    error = reference.relative_error(ours, expected[f'{name}/{i}'])
    assert error <= 5e-6, i
  assert f'{name}/{i + 1}' not in expected


def test_sizes_are_those_of_timm(golden):
  sizes = json.loads((golden / 'timm_feature_info.json').read_text())
  assert len(sizes) > 20
  for name, expected in sizes.items():
    info = models.feature_info(name, **timm.overrides(name))
    assert list(map(list, info)) == expected, name


@pytest.mark.slow
def test_golden_maps_are_those_of_the_installed_timm(golden):
  pytest.importorskip('timm', reason='timm is not installed')
  expected = np.load(golden / 'timm_features.npz')
  for name in timm_features.NETS:
    for i, x in enumerate(timm_features.maps(name)):
      np.testing.assert_allclose(x, expected[f'{name}/{i}'], atol=1e-5)
  sizes = json.loads((golden / 'timm_feature_info.json').read_text())
  assert timm_features.info() == sizes


def test_list():
  assert models.list('nfnet_f[01]*') == (
    'nfnet_f0',
    'nfnet_f0plus',
    'nfnet_f1',
    'nfnet_f1plus',
  )
  assert models.list('vit*') == ()
  assert {'nfnet_tiny', 'resnet50', 'nf_regnet_b8'} < set(models.list())
  with_weights = models.list(weights=True)
  assert set(with_weights) == published.WEIGHTS.keys() < set(models.list())


def test_published_weights_are_those_that_can_be_fetched():
  released = {k for k, v in published.WEIGHTS.items() if 'released' in v}
  assert released == download.ADDRESSES.keys()
  for name, sources in published.WEIGHTS.items():
    for source in set(sources) - {'released'}:
      model = source.removeprefix('hf-hub:timm/').partition('.')[0]
      assert timm.counterpart(model) == name
