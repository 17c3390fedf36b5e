import json

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax import models
from nfnets_jax.models import variants
from tests import golden as reference

DEPTHS = (
  50,
  101,
  *(pytest.param(n, marks=pytest.mark.slow) for n in (152, 200, 288)),
)
SMALL = {
  'width': (16, 32),
  'depth': (1, 1),
  'strides': (1, 2),
  'stem_width': 8,
}


def _shapes(name, **overrides):
  net = hk.transform_with_state(
    lambda x: models.create(name, **overrides)(x, False)
  )
  return jax.eval_shape(net.init, jax.random.key(0), jnp.ones((1, 64, 64, 3)))


def _small(return_metrics=False, **overrides):
  def forward(images, is_training):
    net = models.create('resnet50', 10, **{**SMALL, **overrides})
    return net(images, is_training, return_metrics=return_metrics)

  return hk.transform_with_state(forward)


def _filled(net, images):
  shapes, state = jax.eval_shape(
    lambda key: net.init(key, images, True), jax.random.key(0)
  )
  return reference.fill_tree(shapes), _standard(state)


def _standard(state):
  """A state with running means of 0 and variances of 1."""
  return {
    module: {
      name: np.full(x.shape, module.endswith('/var_ema'), x.dtype)
      for name, x in leaves.items()
    }
    for module, leaves in state.items()
  }


def _fresh(state):
  """A state that has seen nothing."""
  return jax.tree.map(np.zeros_like, state)


@pytest.mark.parametrize('depth', DEPTHS)
def test_parameters_are_the_released(depth, golden):
  families = json.loads((golden / 'families.json').read_text())
  expected = families[f'ResNet/ResNet{depth}']
  shapes, _ = _shapes(f'resnet{depth}')
  assert sum(x.size for x in jax.tree.leaves(shapes)) == expected['params']
  assert reference.digest(shapes) == expected['digest']
  variant = variants.get(f'resnet{depth}')
  assert (variant.train_size, variant.test_size) == (224, 224)


def test_resnet50_shapes(golden):
  expected = json.loads((golden / 'bn_resnet50_shapes.json').read_text())
  assert {
    module: {name: list(x.shape) for name, x in leaves.items()}
    for module, leaves in _shapes('resnet50')[0].items()
  } == expected


@pytest.mark.thorough
def test_resnet50_logits(golden):
  net = hk.transform_with_state(lambda x: models.create('resnet50')(x, False))
  shapes, state = _shapes('resnet50')
  outputs, _ = jax.jit(net.apply)(
    reference.fill_tree(shapes), _standard(state), None, reference.image(2, 64)
  )
  expected = np.load(golden / 'logits.npz')['ResNet/ResNet50@64']
  assert reference.relative_error(outputs['logits'], expected) <= 2e-5


def test_senet_has_a_gate_in_each_block():
  plain, _ = _shapes('resnet50')
  gated, _ = _shapes('senet50')
  more = {name: x for name, x in gated.items() if name not in plain}
  assert {name: gated[name] for name in plain} == plain
  assert len(more) == 2 * 16
  # Hu et al. 2018: two layers of C·C/16 for each block, and biases here.
  weights = sum(leaves['w'].size for leaves in more.values())
  assert weights == sum(
    count * 2 * width * width // 16
    for count, width in zip((3, 4, 6, 3), (256, 512, 1024, 2048), strict=True)
  )


@pytest.mark.parametrize('family', ['resnet', 'nf_resnet'])
def test_gates_have_a_quarter_of_the_channels_inside_as_released(family):
  net = hk.transform_with_state(
    lambda x: models.create(f'{family}50', **SMALL, use_se=True)(x, False)
  )
  images = jnp.ones((1, 32, 32, 3))
  shapes, _ = jax.eval_shape(net.init, jax.random.key(0), images)
  inside = [
    leaves['w'].shape
    for module, leaves in shapes.items()
    if module.endswith('/squeeze_excite/~/linear')
  ]
  assert inside == [(16, 4), (32, 8)]


def test_senet50_has_the_size_in_the_paper():
  shapes, _ = _shapes('senet50')
  count = sum(x.size for x in jax.tree.leaves(shapes))
  assert count / 1e6 == pytest.approx(28.0, abs=0.1)  # a quarter has 35.6


@pytest.mark.thorough
@pytest.mark.parametrize('gate', [0.0, 1.0])
def test_the_gate_multiplies_the_branch(gate):
  net, images = _small(use_se=True), reference.image(2, 32)
  params, state = net.init(jax.random.key(0), images, True)
  plain = {k: x for k, x in params.items() if 'squeeze_excite' not in k}
  for name, x in params.items():
    if name.endswith('squeeze_excite/~/linear_1'):
      x |= {'w': 0 * x['w'], 'b': jnp.full_like(x['b'], 200 * gate - 100)}
    if gate == 0 and name.endswith('conv2'):
      plain[name] = {'w': 0 * x['w']}
  gated, expected = (
    some.apply(p, state, None, images, False)[0]['pool']
    for some, p in ((net, params), (_small(), plain))
  )
  np.testing.assert_allclose(gated, expected, rtol=1e-6)


def test_state_can_be_made_for_evaluation():
  net, images = _small(), reference.image(2, 32)
  made = [
    jax.eval_shape(lambda key: net.init(key, images, train), jax.random.key(0))  # noqa: B023
    for train in (True, False)
  ]
  assert made[0] == made[1]


def test_training_updates_the_running_statistics():
  net, images = _small(return_metrics=True), reference.image(4, 32)
  params, state = _filled(net, images)
  apply = jax.jit(net.apply, static_argnums=4)
  outputs, state = apply(params, _fresh(state), None, images, True)
  # The first batch is all that they have seen: its statistics, of the stem's
  # output for the first normalisation.
  bn = 'ResNet/~/res_block_v2/~/bn0/~'
  mean, var = (state[f'{bn}/{x}_ema']['average'] for x in ('mean', 'var'))
  np.testing.assert_allclose(
    jnp.mean(mean**2), outputs['avg_sq_mean_0'], rtol=1e-4
  )
  np.testing.assert_allclose(jnp.mean(var), outputs['avg_var_0'], rtol=1e-4)
  # So the evaluation of the same images gives the same, and keeps the state.
  again, same = apply(params, state, None, images, False)
  np.testing.assert_allclose(again['logits'], outputs['logits'], rtol=1e-3)
  for x, y in zip(jax.tree.leaves(same), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(x, y)
  # Of a second batch the raw average takes a tenth.
  other = 2 * images
  outputs, new_state = apply(params, state, None, other, True)
  ema = f'{bn}/var_ema'
  second = np.asarray(new_state[ema]['hidden']) - 0.9 * state[ema]['hidden']
  np.testing.assert_allclose(
    second.mean() / 0.1, outputs['avg_var_0'], rtol=1e-3
  )


@pytest.mark.thorough
@pytest.mark.parametrize('axis', ['devices', None])
def test_statistics_are_of_all_devices_or_of_each(axis):
  images = reference.image(16, 16)
  net = _small(cross_replica_axis=axis)
  params, state = _filled(net, images)
  parts, part_state = jax.pmap(
    lambda x: net.apply(params, state, None, x, True), axis_name='devices'
  )(images.reshape(8, 2, 16, 16, 3))
  whole_net = _small()
  apply = jax.jit(whole_net.apply, static_argnums=4)
  if axis is None:
    expected, expected_state = apply(params, state, None, images[:2], True)
    got, got_state = jax.tree.map(lambda x: x[0], (parts, part_state))
    hidden = part_state['ResNet/~/final_bn/~/mean_ema']['hidden']
    assert np.ptp(hidden, axis=0).max() > 0.01
  else:
    expected, expected_state = apply(params, state, None, images, True)
    got = jax.tree.map(lambda x: x.reshape(16, -1), parts)
    got_state = jax.tree.map(lambda x: x[5], part_state)
    assert (
      max(np.ptp(x, axis=0).max() for x in jax.tree.leaves(part_state)) == 0
    )
  for x, y in zip(
    jax.tree.leaves((got, got_state)),
    jax.tree.leaves((expected, expected_state)),
    strict=True,
  ):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize('norm', ['batch', None])
def test_normalisation_keeps_branches_from_doubling(norm):
  net = _small(
    return_metrics=True,
    norm=norm,
    width=(64,),
    depth=(5,),
    strides=(1,),
    stem_width=32,
  )
  images = reference.image(4, 32)
  params, state = jax.jit(net.init, static_argnums=2)(
    jax.random.key(0), images, True
  )
  outputs, _ = jax.jit(net.apply, static_argnums=4)(
    params, state, None, images, True
  )
  power = np.array(
    [outputs[f'avg_var_{i}'] + outputs[f'avg_sq_mean_{i}'] for i in range(1, 6)]
  )
  branch = np.array([outputs[f'res_avg_var_{i}'] for i in range(1, 5)])
  if norm is None:
    assert (power[-1] / power[0]) ** 0.25 == pytest.approx(2, abs=0.4)
  else:
    # ReLU halves z² and He's initialisation doubles it; the mean's share of
    # it, 1/π, is no variance, and the border sees zeros.
    np.testing.assert_allclose(branch, 1 - 1 / np.pi, atol=0.25)
    np.testing.assert_allclose(np.diff(power), 1.0, atol=0.35)


def test_nets_without_normalisation_have_biases_and_no_state():
  params, state = _shapes('resnet50', norm=None)
  assert not state
  assert not any('bn' in module for module in params)
  assert params['ResNet/~/res_block_v2/~/conv1']['b'].shape == (64,)
  assert not any('skip_gain' in leaves for leaves in params.values())


def test_skipinit_resnet_is_the_net_with_a_scale_instead_of_normalisation():
  params, state = _shapes('skipinit_resnet50')
  assert not state
  gains = [m for m, leaves in params.items() if 'skip_gain' in leaves]
  assert len(gains) == 16
  normalised, _ = _shapes('resnet50')
  for module, leaves in normalised.items():
    if 'bn' not in module:
      assert params[module]['w'].shape == leaves['w'].shape


def test_initialisation():
  net = hk.transform_with_state(
    lambda x: models.create(
      'resnet50', 100, width=(256,), depth=(1,), strides=(1,)
    )(x, True)
  )
  params, _ = jax.jit(net.init)(jax.random.key(0), reference.image(1, 32))
  conv = params['ResNet/~/res_block_v2/~/conv1']['w']
  fan_in = np.prod(conv.shape[:3])
  assert float(jnp.std(conv)) == pytest.approx((2 / fan_in) ** 0.5, rel=0.02)
  assert not np.any(params['ResNet/~/linear']['w'])


def test_unknown_normalisation_is_refused():
  with pytest.raises(ValueError, match="norm is 'layer'; .* None, 'batch'"):
    _shapes('resnet50', norm='layer')
