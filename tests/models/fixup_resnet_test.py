import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax import models
from nfnets_jax.models import fixup_resnet, layout, settings
from tests import golden as reference


@pytest.fixture(scope='module')
def params():
  """A transition, wide enough for a standard deviation, of a net of 16."""

  def forward(x):
    net = settings.BottleneckSettings(depth=(3, 4, 6, 3))
    transition = layout.block_specs(net)[3]
    return fixup_resnet.FixupBlock(net, transition)(x, False)

  net = hk.transform(forward)
  return jax.jit(net.init)(jax.random.key(0), jnp.ones((1, 4, 4, 256)))


def test_branches_are_scaled_with_depth_and_end_in_zero(params):
  # L = 16 blocks of m = 3 convolutions: L^(−1/4) = 1/2.
  for conv, fan_in, scale in (
    ('conv0', 256, 0.5),
    ('conv1', 9 * 128, 0.5),
    ('conv_shortcut', 256, 1.0),
  ):
    std = float(jnp.std(params[f'fixup_block/~/{conv}']['w']))
    assert std == pytest.approx(scale * (2 / fan_in) ** 0.5, rel=0.03)
  assert not np.any(params['fixup_block/~/conv2']['w'])


def test_scalars(params):
  assert {k: float(v) for k, v in params['fixup_block'].items()} == {
    'multiplier': 1.0,
    **{f'bias{i}{side}': 0.0 for i in range(3) for side in 'ab'},
  }
  assert all(
    set(leaves) == {'w'} for m, leaves in params.items() if 'conv' in m
  )


def test_depth_is_that_of_the_net_and_the_classifier_starts_at_zero():
  net = hk.transform(
    lambda x: models.create(
      'fixup_resnet50', 10, width=(64, 64), depth=(4, 12), strides=(1, 1)
    )(x, False)
  )
  key, images = jax.random.key(0), reference.image(1, 16)
  module = 'Fixup_ResNet/~/fixup_block_15/~/conv1'
  # Only what is looked at is compiled.
  weights, classifier = jax.jit(
    lambda: [
      net.init(key, images)[name]['w']
      for name in (module, 'Fixup_ResNet/~/linear')
    ]
  )()
  std = float(jnp.std(weights))
  assert std == pytest.approx(0.5 * (2 / (9 * 16)) ** 0.5, rel=0.05)
  assert not np.any(classifier)


def test_scalars_count():
  """Each scalar moves the logits."""
  net = hk.transform(
    lambda x: models.create(
      'fixup_resnet50', 10, width=(16,), depth=(2,), strides=(1,)
    )(x, False)['logits']
  )
  images = reference.image(2, 32)
  shapes = jax.eval_shape(net.init, jax.random.key(0), images)
  params = reference.fill_tree(shapes)
  grads = jax.jit(jax.grad(lambda p: jnp.sum(net.apply(p, None, images) ** 2)))(
    params
  )
  for module, leaves in grads.items():
    for name, grad in leaves.items():
      assert np.any(np.asarray(grad)), f'{module} {name}'


def test_it_has_the_weights_of_a_resnet():
  def weights(name):
    net = hk.transform_with_state(lambda x: models.create(name)(x, True))
    params, _ = jax.eval_shape(
      net.init, jax.random.key(0), jnp.ones((1, 64, 64, 3))
    )
    return sorted(x['w'].shape for x in params.values() if 'w' in x)

  assert weights('fixup_resnet50') == weights('resnet50')
