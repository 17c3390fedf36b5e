"""Sharpness-aware minimisation beside float64 and by hand."""

import itertools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfnets_jax.models import dropout
from nfnets_jax.runtime import parallel
from nfnets_jax.training import build, normalize, sam, train_step
from tests import golden as reference
from tests import steps


def test_ascent_on_a_quadratic():
  """Of ½·xᵀAx the gradient is Ax, and that of SAM A(x + ρ·Ax/‖Ax‖)."""
  rng = np.random.default_rng(0)
  a = rng.standard_normal((5, 5))
  a, x, rho = a @ a.T, rng.standard_normal(5), 0.3
  g = a @ x
  expected = a @ (x + rho * g / np.linalg.norm(g))
  grad = jax.grad(lambda x: 0.5 * x @ jnp.asarray(a, jnp.float32) @ x)
  at = sam.ascend(jnp.asarray(x, jnp.float32), grad(x.astype('f4')), rho)
  np.testing.assert_allclose(grad(at), expected, rtol=1e-5)


def test_no_gradient_no_step():
  params = {'w': jnp.ones(3)}
  same = sam.ascend(params, {'w': jnp.zeros(3)}, 0.1)
  np.testing.assert_array_equal(same['w'], params['w'])


@pytest.mark.parametrize('fraction', [0.01, 0.2, 0.25, 0.5, 0.7, 1.0])
def test_images_are_evenly_spaced_and_of_either_parity(fraction):
  for size in (1, 2, 3, 5, 32, 97, 4096):
    chosen = sam.choose(size, fraction)
    assert len(set(chosen)) == len(chosen) == max(1, round(size * fraction))
    assert chosen.min() >= 0 and chosen.max() < size
    np.testing.assert_array_equal(chosen % 2, np.arange(len(chosen)) % 2)
    even = np.arange(len(chosen)) * size / len(chosen)
    assert np.abs(np.sort(chosen) - even).max() < 2


@pytest.mark.parametrize('fraction', [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize('size', [32, 4096])
def test_the_same_images_on_all_devices_and_in_all_micro_batches(
  size, fraction
):
  chosen = set(sam.choose(size, fraction).tolist())
  for devices in (1, 2, 8, 32):
    each = size // devices
    for parts in (1, 2, 4, each):
      if each % parts:
        continue
      rows, weights, ascents = sam.plan(each, devices, fraction, parts)
      index = rows + each * np.arange(devices)[:, None]
      assert sorted(index[weights > 0]) == sorted(chosen)
      # The mean over devices of their means is that of the images.
      shares = weights[weights > 0] / weights.size
      np.testing.assert_allclose(shares, 1 / len(chosen), rtol=1e-6)
      # Micro-batches no larger than the descent's, padded by at most an image
      # each, and by one for devices that have fewer.
      images = rows.shape[1]
      assert images % ascents == 0 and images // ascents <= each // parts
      assert images - len(chosen) / devices < 1 + ascents


@pytest.mark.parametrize(
  ('rho', 'fraction', 'message'),
  [
    (0.05, 0, r'sam_fraction must be in \(0, 1\], got 0'),
    (0.05, 1.5, r'sam_fraction must be in \(0, 1\], got 1.5'),
    (0.0, 0.2, 'sam_rho must be positive, got 0; None turns SAM off'),
    (float('nan'), 0.2, 'sam_rho must be positive, got nan'),
  ],
)
def test_invalid_arguments(rho, fraction, message):
  with pytest.raises(ValueError, match=message):
    sam.check(rho, fraction)


def _dense():
  def forward(images, is_training, image_index=None, standardized=False):
    x = jax.nn.gelu(hk.Linear(16)(hk.Flatten()(images)))
    x = dropout.dropout(x, 0.5, is_training, image_index)
    return {'logits': hk.Linear(10)(x)}

  return hk.transform_with_state(forward)


def _gradient(config, net, devices, micro_batches, batch):
  """The momentum of the first step, which is its gradient."""
  optimizer = optax.sgd(0.1, momentum=0.9)
  state = train_step.init_state(net, optimizer, 0, image_size=8)
  params = jax.tree.map(jnp.asarray, reference.fill_tree(state.params))
  step = jax.pmap(
    steps.constant_step(config, net, optimizer, micro_batches=micro_batches),
    axis_name=parallel.AXIS,
    in_axes=(None, 0),
    out_axes=(None, None),
    devices=jax.devices()[:devices],
  )
  split = jax.tree.map(
    lambda x: x.reshape(devices, len(x) // devices, *x.shape[1:]), batch
  )
  after, _ = step(state._replace(params=params), split)
  return params, _flat(after.opt_state[0].trace)


def _flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


_RECIPE = {'optimizer.sam_rho': 0.5, 'label_smoothing': 0.1}


_SPLITS = list(itertools.product((1, 2, 8), (1, 2, 4)))


@pytest.mark.parametrize(
  'splits',
  [_SPLITS[-1:], pytest.param(_SPLITS[1:], marks=pytest.mark.thorough)],
)
def test_step_does_not_depend_on_devices_and_micro_batches(make_config, splits):
  """Of 32 images six ascend, some devices have none, and dropout is on."""
  config, net, batch = make_config(1, _RECIPE), _dense(), steps.random_batch(32)
  _, expected = _gradient(config, net, 1, 1, batch)
  for split in splits:
    _, gradient = _gradient(config, net, *split, batch)
    assert reference.relative_error(gradient, expected) <= 1e-6, split


@pytest.mark.thorough
def test_alone_it_depends_on_the_devices_only(make_config):
  changes = {'optimizer.sam_per_device': True}
  config = make_config(1, _RECIPE | changes)
  net, batch = _dense(), steps.random_batch(32)
  found = {
    split: _gradient(config, net, *split, batch)[1]
    for split in ((1, 1), (2, 1), (2, 4))
  }
  assert reference.relative_error(found[2, 4], found[2, 1]) <= 1e-6
  assert reference.relative_error(found[2, 1], found[1, 1]) > 1e-2


@pytest.mark.thorough
@pytest.mark.parametrize('split', [(2, 2), (8, 4)])
def test_nor_does_that_of_an_nfnet(make_config, split):
  changes = {'model.drop_rate': 0.5, 'model.stochdepth_rate': 0.5}
  config = make_config(1, _RECIPE | changes)
  net, batch = build.create_net(config, 10), steps.random_batch(32)
  _, expected = _gradient(config, net, 1, 1, batch)
  _, gradient = _gradient(config, net, *split, batch)
  assert reference.relative_error(gradient, expected) <= 1e-5
  config.optimizer.sam_rho = None
  _, plain = _gradient(config, net, 1, 1, batch)
  assert reference.relative_error(plain, expected) > 1e-2


@pytest.mark.thorough
@pytest.mark.parametrize('per_device', [False, True])
def test_gradient_is_that_of_the_equations(make_config, per_device):
  """Of two devices with two micro-batches each, written out."""
  config = make_config(
    1,
    {
      'label_smoothing': 0.0,
      'optimizer.sam_rho': 0.5,
      'optimizer.sam_fraction': 0.25,
      'optimizer.sam_per_device': per_device,
    },
  )
  net, batch = build.create_net(config, 10), steps.random_batch(16)
  batch |= {'mix_label': batch['label'], 'ratio': np.ones(16, np.float32)}
  params, gradient = _gradient(config, net, 2, 2, batch)

  def loss(params, images, labels):
    outputs, _ = net.apply(
      params, {}, None, normalize.normalize(images), is_training=False
    )
    return optax.softmax_cross_entropy_with_integer_labels(
      outputs['logits'], labels
    ).mean()

  grad = jax.jit(jax.grad(loss))
  expected = []
  for part in np.split(np.arange(16), 2):
    chosen = part[[0, 5]] if per_device else [0, 5, 8, 13]
    tree = grad(params, batch['image'][chosen], batch['label'][chosen])
    scale = 0.5 / np.linalg.norm(_flat(tree))
    above = jax.tree.map(lambda p, g, s=scale: p + s * g, params, tree)
    expected.append(
      _flat(grad(above, batch['image'][part], batch['label'][part]))
    )
  mean = np.mean(expected, axis=0)
  assert reference.relative_error(gradient, mean) <= 1e-5
  plain = _flat(grad(params, batch['image'], batch['label']))
  assert reference.relative_error(gradient, plain) > 1e-2
