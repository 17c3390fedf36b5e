"""What every net of residual blocks does, on small ones of all families."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax import models
from tests import golden as reference

_RESNET = {
  'width': (16, 32),
  'depth': (2, 1),
  'strides': (1, 2),
  'stem_width': 8,
  'drop_rate': 0.5,
  'stochdepth_rate': 0.5,
}
SMALL = {
  'nf_resnet50': _RESNET,
  'resnet50': _RESNET,
  'skipinit_resnet50': _RESNET,
  'fixup_resnet50': _RESNET,
  'nf_regnet_b0': {
    'width': (16, 24),
    'depth': (2, 1),
    'strides': (2, 2),
    'group_width': 16,
    'drop_rate': 0.5,
    'stochdepth_rate': 0.5,
  },
}
BLOCKS = 3
IMAGES = reference.image(4, 16)


@functools.cache  # for what is compiled
def _net(name, **overrides):
  """A small net as functions of `(images, is_training, return_metrics)`."""

  def forward(images, is_training, return_metrics=False):
    net = models.create(name, 10, **{**SMALL[name], **overrides})
    return net(images, is_training, return_metrics=return_metrics)

  net = hk.transform_with_state(forward)
  return hk.TransformedWithState(
    jax.jit(net.init, static_argnums=(2, 3)),
    jax.jit(net.apply, static_argnums=(4, 5)),
  )


@functools.cache
def _filled(net):
  """Golden parameters, under which all parts count, and a fresh state."""
  shapes, state = jax.eval_shape(
    lambda key: net.init(key, IMAGES, True), jax.random.key(0)
  )
  params = jax.tree.map(jnp.asarray, reference.fill_tree(shapes))
  state = {
    module: {
      name: jnp.full(x.shape, module.endswith('var_ema'), x.dtype)
      for name, x in leaves.items()
    }
    for module, leaves in state.items()
  }
  return params, state


@pytest.mark.parametrize('name', SMALL)
def test_metrics_are_there_when_asked_for(name):
  def shapes(*return_metrics):
    params, state = _filled(_net(name))
    outputs, _ = jax.eval_shape(
      lambda: _net(name).apply(
        params, state, None, IMAGES, False, *return_metrics
      )
    )
    return {key: x.shape for key, x in outputs.items()}

  plain = shapes()
  assert set(plain) == {'logits', 'pool'}
  assert plain['logits'] == (4, 10)
  assert shapes(True) == {
    **plain,
    **{f'avg_sq_mean_{i}': () for i in range(BLOCKS + 1)},
    **{f'avg_var_{i}': () for i in range(BLOCKS + 1)},
    **{f'res_avg_var_{i}': () for i in range(BLOCKS)},
  }


@pytest.mark.thorough
def test_metrics_change_nothing():
  net = _net('nf_resnet50')
  params, state = _filled(net)
  plain, _ = net.apply(params, state, None, IMAGES, False)
  outputs, _ = net.apply(params, state, None, IMAGES, False, True)
  for key, value in plain.items():
    np.testing.assert_allclose(outputs[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('name', 'end'),
  [
    ('nf_resnet50', 'skip_gain'),
    ('nf_regnet_b0', 'skip_gain'),
    ('skipinit_resnet50', 'skip_gain'),
    ('fixup_resnet50', 'conv2'),
  ],
)
def test_blocks_begin_as_the_identity(name, end):
  net = _net(name)
  params, state = _filled(net)
  initial = jax.jit(
    # What is not returned is not compiled either.
    lambda key: _ending(end, net.init(key, IMAGES, True)[0])
  )(jax.random.key(0))
  assert sum(map(len, initial.values())) == BLOCKS
  params = hk.data_structures.merge(params, initial)
  outputs, _ = net.apply(params, state, None, IMAGES, False, True)
  block = 1  # the second, as the others are transitions
  for metric in ('avg_var', 'avg_sq_mean'):
    np.testing.assert_array_equal(
      outputs[f'{metric}_{block + 1}'], outputs[f'{metric}_{block}']
    )
  assert all(np.isfinite(x).all() for x in outputs.values())
  assert float(outputs[f'avg_var_{BLOCKS}']) > 0


def _ending(end, params):
  """The parameters whose path ends so, or whose module does."""
  return hk.data_structures.filter(
    lambda module, name, _: name == end or module.endswith(f'/{end}'), params
  )


@pytest.mark.parametrize('remat', ['block', 'stage'])
@pytest.mark.parametrize('name', SMALL)
def test_what_is_computed_again_has_the_same_parameters_and_state(name, remat):
  def shapes(remat):
    return jax.eval_shape(
      lambda key: _net(name, remat=remat).init(key, IMAGES, True),
      jax.random.key(0),
    )

  assert shapes(remat) == shapes(None)


@functools.cache
def _step(remat):
  """Outputs, state and gradients of the net that has all: state and drops."""
  net = _net('resnet50', remat=remat)
  params, state = _filled(net)

  def loss_fn(params):
    outputs, new_state = net.apply(
      params, state, jax.random.key(1), IMAGES, True, True
    )
    return jnp.mean(outputs['logits'] ** 2), (outputs, new_state)

  return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)


@pytest.mark.thorough
@pytest.mark.parametrize(
  'remat', ['block', pytest.param('stage', marks=pytest.mark.slow)]
)
def test_what_is_computed_again_is_the_same(remat):
  for (path, x), y in zip(
    jax.tree.leaves_with_path(_step(remat)),
    jax.tree.leaves(_step(None)),
    strict=True,
  ):
    where = jax.tree_util.keystr(path)
    np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5, err_msg=where)


@pytest.mark.thorough
@pytest.mark.parametrize('name', SMALL)
def test_bfloat16_computes_with_float32_parameters_and_state(name):
  net, images = _net(name), IMAGES
  half = jnp.asarray(images, jnp.bfloat16)
  made = jax.eval_shape(
    lambda key: net.init(key, half, True), jax.random.key(0)
  )
  leaves = jax.tree.leaves(made)
  assert {x.dtype for x in leaves} <= {np.dtype('float32'), np.dtype('int32')}
  params, state = _filled(net)
  outputs, new_state = net.apply(params, state, None, half, False, True)
  assert outputs['logits'].dtype == jnp.float32
  assert outputs['pool'].dtype == jnp.bfloat16
  exact, _ = net.apply(params, state, None, images, False, True)
  assert reference.relative_error(outputs['logits'], exact['logits']) < 0.03
  assert jax.tree.map(jnp.result_type, new_state) == jax.tree.map(
    jnp.result_type, state
  )


def _first_fast(*names):
  """Names of nets; compiling all but the first is for the thorough tests."""
  first, *others = names
  return [first, *(pytest.param(x, marks=pytest.mark.thorough) for x in others)]


# Batch normalisation differs in training by itself.
_DROPPING = (
  'nf_resnet50',
  'fixup_resnet50',
  'nf_regnet_b0',
  'skipinit_resnet50',
)


@pytest.mark.parametrize('name', _first_fast(*_DROPPING))
def test_training_drops_and_evaluation_does_not(name):
  net, images = _net(name), IMAGES
  params, state = _filled(net)

  def logits(seed, is_training):
    key = None if seed is None else jax.random.key(seed)
    return net.apply(params, state, key, images, is_training)[0]['logits']

  first, second = logits(0, True), logits(1, True)
  assert not np.allclose(first, second, rtol=1e-2)
  np.testing.assert_array_equal(first, logits(0, True))
  # It takes no key.
  jax.eval_shape(lambda: logits(None, False))


@pytest.mark.parametrize('name', _first_fast(*_DROPPING))
def test_masks_follow_the_image_index(name):
  params, state = _filled(_net(name))

  def forward(images, image_index):
    net = models.create(name, 10, **SMALL[name])
    return net(images, True, image_index)['logits']

  net = hk.transform_with_state(forward)
  apply = jax.jit(lambda *args: net.apply(params, state, *args)[0])
  key, index = jax.random.key(0), jnp.arange(4)
  whole = apply(key, IMAGES, index)
  half = apply(key, IMAGES[2:], index[2:])
  np.testing.assert_allclose(half, whole[2:], rtol=1e-4, atol=1e-4)
  other = apply(key, IMAGES[2:], index[:2])
  assert not np.allclose(other, whole[2:], rtol=1e-2)


@pytest.mark.parametrize(
  'name', _first_fast('resnet50', 'nf_regnet_b0', 'nf_resnet50')
)
def test_standardized_nets_take_folded_parameters(name):
  params, state = _filled(_net(name))
  expected, _ = _net(name).apply(params, state, None, IMAGES, False)
  folded, _ = _net(name, standardized=True).apply(
    models.fold(params), state, None, IMAGES, False
  )
  np.testing.assert_allclose(
    folded['logits'], expected['logits'], rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'num_classes': 0}, 'num_classes must be at least 1, got 0'),
    ({'drop_rate': 1.0}, r'drop_rate must lie in \[0, 1\), got 1'),
    ({'stochdepth_rate': -1}, r'stochdepth_rate must lie in \[0, 1\), got -1'),
    ({'remat': 'layer'}, "remat is 'layer'; .* 'block', 'stage'"),
    ({'width': (256, 512)}, 'one entry per stage'),
    ({'depth': (1, 2, 6, 0)}, r'depth \(1, 2, 6, 0\) must be pos'),
    ({'num_classes': True}, 'num_classes must be an integer, got True'),
    ({'num_classes': 10.0}, r'num_classes must be an integer, got 10\.0'),
    ({'num_classes': '10'}, "num_classes must be an integer, got '10'"),
    ({'num_classes': None}, 'num_classes must be an integer, got None'),
    ({'num_classes': -3}, 'num_classes must be at least 1, got -3'),
    ({'drop_rate': float('nan')}, r'drop_rate must lie in \[0, 1\), got nan'),
    ({'drop_rate': None}, r'drop_rate must lie in \[0, 1\), got None'),
    ({'drop_rate': '0.1'}, r"drop_rate must lie in \[0, 1\), got '0.1'"),
    ({'stochdepth_rate': 1.5}, r'stochdepth_rate must lie in \[0, 1\), got 1'),
    ({'stochdepth_rate': True}, r'stochdepth_rate .*\[0, 1\), got True'),
    ({'depth': 4}, 'depth must have one entry per stage, got 4'),
    ({'depth': '1263'}, "depth must have one entry per stage, got '1263'"),
    ({'depth': (1.0, 2.0, 6.0, 3.0)}, r'depth \(1\.0, .* positive integers'),
    ({'depth': (True, 2, 6, 3)}, r'depth \(True, 2, 6, 3\) must be positive'),
    ({'strides': (1, 2, -2, 2)}, r'strides \(1, 2, -2, 2\) must be positive'),
    ({'width': (64, 128, 256, 512.5)}, r'width \(64, .* positive integers'),
  ],
)
@pytest.mark.parametrize('name', [*SMALL, 'nfnet_f0'])
def test_impossible_nets_are_refused(name, overrides, message):
  net = hk.transform_with_state(
    lambda x: models.create(name, **overrides)(x, True)
  )
  with pytest.raises(ValueError, match=message):
    net.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)))


@pytest.mark.parametrize(
  ('name', 'overrides', 'message'),
  [
    (
      'nfnet_f0',
      {'se_ratio': 0.0},
      r'se_ratio must be a positive .*, got 0\.0',
    ),
    (
      'nfnet_f0',
      {'expansion': 0},
      'expansion must be a positive number, got 0',
    ),
    (
      'nfnet_f0',
      {'alpha': float('nan')},
      'alpha must be a positive .*, got nan',
    ),
    (
      'nfnet_f0',
      {'alpha': float('inf')},
      'alpha must be a positive .*, got inf',
    ),
    ('nfnet_f0', {'final_conv_mult': 0}, 'final_conv_mult must be at least 1'),
    (
      'nfnet_f0',
      {'final_conv_mult': 1.5},
      'final_conv_mult must be an integer',
    ),
    ('nfnet_f0', {'stem_width': (16, 32, 64, 0)}, 'stem_width .* positive int'),
    (
      'nfnet_f0',
      {'stem_strides': (2, 1, 1, 0)},
      'stem_strides .* positive int',
    ),
    (
      'nfnet_f0',
      {'stem_width': 128},
      'stem_width must have one entry per conv',
    ),
    (
      'nfnet_f0',
      {'group_width': (128,) * 3 + (-8,)},
      'group_width .* positive',
    ),
    ('nf_resnet50', {'se_ratio': -0.25}, 'se_ratio must be a positive number'),
    ('nf_resnet50', {'alpha': '0.2'}, "alpha must be a positive .*, got '0.2'"),
    ('nf_resnet50', {'stem_width': 0}, 'stem_width must be at least 1, got 0'),
    ('nf_regnet_b0', {'group_width': -8}, 'group_width must be at least 1'),
    ('nf_regnet_b0', {'group_width': 8.0}, 'group_width must be an integer'),
    (
      'nf_regnet_b0',
      {'final_width': 0},
      'final_width must be at least 1, got 0',
    ),
    ('nf_regnet_b0', {'final_width': '960'}, "must be an integer, got '960'"),
    ('nf_regnet_b0', {'stem_stride': 0}, 'stem_stride must be at least 1, got'),
    ('resnet50', {'expansion': -0.25}, 'expansion must be a positive number'),
    ('resnet50', {'stem_stride': 2.0}, 'stem_stride must be an integer, got 2'),
    ('fixup_resnet50', {'stem_width': True}, 'stem_width must be an integer'),
    ('fixup_resnet50', {'expansion': None}, 'expansion must be a positive'),
    ('efficientnet_b0', {'se_ratio': 0}, 'se_ratio must be a positive number'),
    ('efficientnet_b0', {'final_width': 0}, 'final_width must be at least 1'),
    (
      'efficientnet_b0',
      {'num_classes': True},
      'num_classes must be an integer',
    ),
    ('efficientnet_b0', {'num_classes': '9'}, 'num_classes must be an integer'),
    (
      'efficientnet_b0',
      {'expansions': (1, 6, 6, 6, 6, 6, 0.5)},
      'expansions .* must be positive integers',
    ),
  ],
)
def test_impossible_sizes_are_refused(name, overrides, message):
  net = hk.transform_with_state(
    lambda x: models.create(name, **overrides)(x, True)
  )
  with pytest.raises(ValueError, match=message):
    net.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)))


@pytest.mark.parametrize('name', ['nfnet_f0', 'skipinit_resnet50'])
def test_statistics_of_no_norm_are_not_shared(name):
  net = hk.transform_with_state(
    lambda x: models.create(name, cross_replica_axis='devices')(x, True)
  )
  with pytest.raises(ValueError, match="is 'devices', but without a norm"):
    net.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)))


def test_numbers_of_numpy_are_numbers():
  overrides = {
    'num_classes': np.int64(10),
    'depth': (np.int32(1), np.int64(1)),
    'drop_rate': np.float32(0.5),
    'expansion': np.float64(0.25),
  }
  net = hk.transform_with_state(
    lambda x: models.create(
      'nf_resnet50', **{**SMALL['nf_resnet50'], **overrides}
    )(x, False)['logits']
  )
  params, _ = jax.eval_shape(net.init, jax.random.key(0), IMAGES)
  assert params['NF_ResNet/~/linear']['b'].shape == (10,)


def test_the_narrowest_gate_has_one_channel_inside():
  overrides = {
    'width': (32,),
    'depth': (1,),
    'strides': (1,),
    'group_width': (16,),
    'stem_width': (8,),
    'stem_strides': (2,),
    'se_ratio': 0.01,
  }
  net = hk.transform(lambda x: models.create('nfnet_f0', **overrides)(x, False))
  shapes = jax.eval_shape(net.init, jax.random.key(0), IMAGES)
  gate = shapes['NFNet/~/nf_block/~/squeeze_excite/~/linear']
  assert gate['w'].shape == (32, 1)


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize(
  'images',
  [
    np.ones((1, 8, 8, 3), np.uint8),
    np.ones((1, 0, 8, 3), np.float32),
    np.ones((1, 8, 0, 3), np.float32),
    np.ones((1, 8, 8, 0), np.float32),
  ],
  ids=['uint8', 'no height', 'no width', 'no channels'],
)
def test_impossible_images_are_refused(name, images):
  with pytest.raises(ValueError, match=r'floating array \[B, H, W, C\], got'):
    _net(name).init(jax.random.key(0), images, True)


def _on_a_mesh(axis_type):
  """Parameters on all of four devices, and an image on each."""
  mesh = jax.make_mesh(
    (4,), ('data',), axis_types=(axis_type,), devices=jax.devices()[:4]
  )
  spec = jax.sharding.PartitionSpec
  everywhere = jax.sharding.NamedSharding(mesh, spec())
  split = jax.sharding.NamedSharding(mesh, spec('data'))
  net = _net('nf_resnet50')
  filled = _filled(net)
  return (
    filled,
    jax.device_put(filled, everywhere),
    jax.device_put(IMAGES, split),
  )


@pytest.mark.parametrize('mapped', [False, True])
def test_gradients_of_sharded_images(mapped):
  filled, (params, state), images = _on_a_mesh(jax.sharding.AxisType.Auto)

  def loss(params, state, images):
    outputs, _ = _net('nf_resnet50').apply(
      params, state, jax.random.key(0), images, False
    )
    return jnp.sum(outputs['logits'] ** 2)

  gradient = jax.jit(jax.grad(loss))
  expected = gradient(*filled, IMAGES)
  if mapped:
    spec = jax.sharding.PartitionSpec
    gradient = jax.jit(
      jax.shard_map(
        lambda *args: jax.lax.psum(jax.grad(loss)(*args), 'data'),
        mesh=images.sharding.mesh,
        in_specs=(spec(), spec(), spec('data')),
        out_specs=spec(),
        check_vma=False,
      )
    )
  found = gradient(params, state, images)
  assert len(jax.tree.leaves(found)[0].sharding.device_set) == 4
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, 1e-4, 1e-6 * np.abs(y).max()),
    found,
    expected,
  )


def test_explicit_axes_are_refused():
  _, (params, state), images = _on_a_mesh(jax.sharding.AxisType.Explicit)
  with pytest.raises(ValueError, match=r"over \['data'\], explicit axes of a"):
    _net('nf_resnet50').apply(params, state, None, images, False)
