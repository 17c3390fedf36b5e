import json
import zlib

import haiku as hk
import jax
import numpy as np
import pytest

from nfnets_jax import models
from nfnets_jax.weights import timm
from tests import golden as reference

SMALL = {
  'width': (8, 16),
  'depth': (1, 2),
  'strides': (1, 2),
  'kernel_sizes': (3, 5),
  'expansions': (1, 2),
  'stem_width': 8,
  'final_width': 24,
}


def _fill(name, shape):
  """The values that timm's net had for its golden logits."""
  rng = np.random.default_rng([0, zlib.crc32(name.encode())])
  x = np.asarray(rng.standard_normal(shape or None, dtype=np.float32))
  if name.endswith('running_var'):
    return np.float32(1) + np.float32(0.1) * np.abs(x)
  if name.endswith('num_batches_tracked'):
    return np.asarray(0)
  if name.endswith('weight') and len(shape) == 1:
    return np.float32(1) + np.float32(0.1) * x
  if name.endswith('weight'):
    return x / np.float32(np.sqrt(max(1, np.prod(shape[1:]))))
  return np.float32(0.1) * x


@pytest.fixture(scope='module')
def tensors(golden):
  path = golden / 'timm_tf_efficientnet_b0_state_dict.json'
  shapes = json.loads(path.read_text())
  return {key: _fill(key, tuple(shape)) for key, shape in shapes.items()}


@pytest.fixture(scope='module')
def small():
  """Parameters and state of a small net after one training step."""
  net = hk.transform_with_state(
    lambda x: models.create('efficientnet_b0', 3, **SMALL)(x, True)
  )
  images = reference.image(4, 16)
  params, state = jax.jit(net.init)(jax.random.key(0), images)
  _, state = jax.jit(net.apply)(params, state, jax.random.key(1), images)
  return params, state


@pytest.mark.thorough
def test_logits_are_those_of_timm(tensors, golden):
  params, state = timm.from_timm(tensors, 'efficientnet_b0')
  net = hk.transform_with_state(
    lambda x: models.create('efficientnet_b0')(x, is_training=False)
  )
  outputs, after = jax.jit(net.apply)(
    params, state, None, reference.image(2, 96)
  )
  expected = np.load(golden / 'timm_tf_efficientnet_b0_logits.npy')
  assert reference.relative_error(outputs['logits'], expected) <= 1e-5
  jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.thorough
def test_there_and_back(tensors):
  converted = timm.from_timm(tensors, 'efficientnet_b0')
  back = timm.to_timm(*converted, 'efficientnet_b0')
  assert back.keys() == tensors.keys()
  for key, x in tensors.items():
    np.testing.assert_array_equal(back[key], x, err_msg=key)


@pytest.mark.thorough
def test_back_and_there(small):
  params, state = small
  tensors = timm.to_timm(params, state, 'efficientnet_b0', **SMALL)
  converted, statistics = timm.from_timm(tensors, 'efficientnet_b0', **SMALL)
  assert jax.tree.structure(converted) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, converted, params)
  assert jax.tree.structure(statistics) == jax.tree.structure(state)
  for module, leaves in statistics.items():
    np.testing.assert_array_equal(leaves['average'], state[module]['average'])
    # Statistics are settled: an update moves them by a hundredth.
    np.testing.assert_array_equal(leaves['hidden'], leaves['average'])
    assert np.float32(0.99) ** leaves['counter'] < 1e-30
    assert leaves['counter'].dtype == np.int32


@pytest.mark.thorough
def test_what_does_not_fit_is_listed(tensors, small):
  wrong = dict(tensors)
  del wrong['blocks.1.0.conv_dw.weight']
  wrong['bn1.bias'] = np.zeros(31)
  wrong['head.gain'] = np.zeros(2)
  with pytest.raises(ValueError) as error:
    timm.from_timm(wrong, 'efficientnet_b0')
  assert str(error.value).splitlines() == [
    "these weights are not those of timm's efficientnet_b0:",
    '  missing: blocks.1.0.conv_dw.weight (96, 1, 3, 3)',
    '  wrong shape: bn1.bias (31,), not (32,)',
    '  surplus: head.gain (2,)',
  ]
  params, state = map(dict, small)
  state['more'] = {'x': np.zeros(2)}
  del state['EfficientNet/~/stem_bn/~/var_ema']
  params['EfficientNet/~/stem_conv'] = {'w': np.zeros((3, 3, 3, 9))}
  with pytest.raises(ValueError) as error:
    timm.to_timm(params, state, 'efficientnet_b0', **SMALL)
  assert str(error.value).splitlines() == [
    'these weights are not those of efficientnet_b0:',
    '  wrong shape: parameter EfficientNet/~/stem_conv w (3, 3, 3, 9), not '
    '(3, 3, 3, 8)',
    '  missing: state EfficientNet/~/stem_bn/~/var_ema average (1, 1, 1, 8)',
    '  missing: state EfficientNet/~/stem_bn/~/var_ema counter ()',
    '  missing: state EfficientNet/~/stem_bn/~/var_ema hidden (1, 1, 1, 8)',
    '  surplus: state more x (2,)',
  ]


# Here and in timm, and the parts of the outputs that may differ: GELU is
# computed exactly there, and by its approximation with tanh here.
NETS = {
  'nfnet_f0': ('dm_nfnet_f0', 5e-4),
  'nf_resnet50': ('nf_resnet50', 5e-6),
  'nf_regnet_b0': ('nf_regnet_b0', 5e-6),
}


def _fill_normalizer_free(name, shape):
  rng = np.random.default_rng([0, zlib.crc32(name.encode())])
  x = np.asarray(rng.standard_normal(shape or None, dtype=np.float32))
  if shape == ():  # drawn in float64
    rng = np.random.default_rng([0, zlib.crc32(name.encode())])
    x = np.float32(rng.standard_normal())
  if name.endswith('weight'):
    return x / np.float32(np.sqrt(max(1, np.prod(shape[1:]))))
  if name.endswith('skipinit_gain'):
    return np.float32(0.5) + np.float32(0.1) * x
  if name.endswith('gain'):
    return np.float32(1) + np.float32(0.1) * x
  return np.float32(0.1) * x


def _normalizer_free(golden, name):
  path = golden / f'timm_{NETS[name][0]}_state_dict.json'
  shapes = json.loads(path.read_text())
  return {k: _fill_normalizer_free(k, tuple(s)) for k, s in shapes.items()}


@pytest.mark.thorough
@pytest.mark.parametrize('name', NETS)
def test_normalizer_free_logits_are_those_of_timm(golden, name):
  theirs, tolerance = NETS[name]
  tensors = _normalizer_free(golden, name)
  assert timm.identify(tensors) == name
  params, state = timm.from_timm(tensors, name)
  net = hk.transform(
    lambda x: models.create(name, **timm.overrides(name))(x, False)
  )
  outputs = jax.jit(net.apply)(params, None, reference.image(2, 64))
  expected = np.load(golden / f'timm_{theirs}_logits.npy')
  assert reference.relative_error(outputs['logits'], expected) <= tolerance
  back = timm.to_timm(params, state, name)
  assert back.keys() == tensors.keys()
  for key, x in tensors.items():
    np.testing.assert_allclose(back[key], x, rtol=2e-7, err_msg=key)


def test_others_have_no_counterpart():
  with pytest.raises(ValueError, match='resnet50 has no counterpart in timm'):
    timm.overrides('resnet50')
  with pytest.raises(ValueError, match='no net of timm .* some are ..a..'):
    timm.identify({'a': np.zeros(1)})
