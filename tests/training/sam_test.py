"""Sharpness-aware minimisation beside float64 and by hand."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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


@pytest.mark.parametrize(
  ('batch_size', 'fraction', 'parts', 'expected'),
  [
    (10, 0.2, 1, (2, 1)),
    (3, 0.2, 1, (1, 1)),
    (4, 0.2, 1, (1, 1)),
    (30, 0.2, 1, (6, 1)),
    (8, 1.0, 1, (8, 1)),
    (64, 0.2, 4, (13, 1)),  # less than a part of 16
    (64, 0.5, 8, (32, 4)),
  ],
)
def test_how_many_images(batch_size, fraction, parts, expected):
  assert sam.ascent_images(batch_size, fraction, parts) == expected


@pytest.mark.parametrize('fraction', [0, -1, 1.5])
def test_impossible_fraction(fraction):
  with pytest.raises(ValueError, match=r'must be in \(0, 1\]'):
    sam.ascent_images(8, fraction, 1)


def _first_gradient(config, devices, batch, micro_batches=1):
  net, optimizer = build.create_net(config, 10), optax.sgd(0.1, momentum=0.9)
  state = train_step.init_state(net, optimizer, 0, image_size=8)
  params = jax.tree.map(jnp.asarray, reference.fill_tree(state.params))
  state = state._replace(params=params)
  step = steps.constant_step(
    config, net, optimizer, micro_batches=micro_batches
  )
  split = jax.tree.map(
    lambda x: x.reshape(devices, len(x) // devices, *x.shape[1:]), batch
  )
  mapped = jax.jit(jax.vmap(step, axis_name=parallel.AXIS, in_axes=(None, 0)))
  after, _ = mapped(state, split)
  trace = jax.tree.map(lambda x: x[0], after.opt_state[0].trace)
  return net, params, trace


def _flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.thorough
@pytest.mark.parametrize(
  'micro_batches', [pytest.param(1, marks=pytest.mark.slow), 2]
)
def test_each_device_ascends_with_its_own_leading_images(
  make_config, micro_batches
):
  """The step's gradient is that of a loop over devices, written out."""
  config = make_config(
    1,
    {
      'model.drop_rate': 0.0,
      'model.stochdepth_rate': 0.0,
      'label_smoothing': 0.0,
      'optimizer.sam_rho': 0.5,
      'optimizer.sam_fraction': 0.25,
    },
  )
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 256, (16, 8, 8, 3), np.uint8),
    'label': rng.integers(0, 10, 16).astype(np.int32),
  }
  batch |= {'mix_label': batch['label'], 'ratio': np.ones(16, np.float32)}
  net, params, trace = _first_gradient(config, 2, batch, micro_batches)

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
    image, label = batch['image'][part], batch['label'][part]
    up = _flat(grad(params, image[:2], label[:2]))
    tree = grad(params, image[:2], label[:2])
    scale = 0.5 / np.linalg.norm(up)
    above = jax.tree.map(lambda p, g, s=scale: p + s * g, params, tree)
    expected.append(_flat(grad(above, image, label)))
  mean = np.mean(expected, axis=0)
  assert reference.relative_error(_flat(trace), mean) <= 1e-5
  plain = _flat(grad(params, batch['image'], batch['label']))
  assert reference.relative_error(_flat(trace), plain) > 1e-2
  assert isinstance(net, hk.TransformedWithState)
