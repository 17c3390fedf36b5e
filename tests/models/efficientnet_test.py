import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfnets_jax import models
from nfnets_jax.models import variants
from nfnets_jax.training import optimizer
from tests import golden as reference

# Published counts: parameters, and image sizes in pixels.
PUBLISHED = {
  'efficientnet_b0': (5_288_548, 224),
  'efficientnet_b1': (7_794_184, 240),
  'efficientnet_b2': (9_109_994, 260),
  'efficientnet_b3': (12_233_232, 300),
  'efficientnet_b4': (19_341_616, 380),
  'efficientnet_b5': (30_389_784, 456),
  'efficientnet_b6': (43_040_704, 528),
  'efficientnet_b7': (66_347_960, 600),
  'efficientnet_b8': (87_413_142, 672),
}

SMALL = {
  'width': (8, 16),
  'depth': (1, 2),
  'strides': (1, 2),
  'kernel_sizes': (3, 5),
  'expansions': (1, 2),
  'stem_width': 8,
  'final_width': 24,
}


def _transform(is_training=False, return_metrics=False, **overrides):
  def forward(images):
    net = models.create('efficientnet_b0', **overrides)
    return net(images, is_training, return_metrics=return_metrics)

  net = hk.transform_with_state(forward)
  return hk.TransformedWithState(jax.jit(net.init), jax.jit(net.apply))


@pytest.mark.thorough
@pytest.mark.parametrize(
  'name',
  [
    # The smallest and one where roundings matter are enough for every day.
    name
    if name in ('efficientnet_b0', 'efficientnet_b2')
    else pytest.param(name, marks=pytest.mark.slow)
    for name in PUBLISHED
  ],
)
def test_parameters_are_the_published(name):
  net = hk.transform_with_state(lambda x: models.create(name)(x, False))
  params, size = PUBLISHED[name]
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shapes, _ = jax.eval_shape(net.init, jax.random.key(0), images)
  assert sum(x.size for x in jax.tree.leaves(shapes)) == params
  assert variants.get(name).train_size == variants.get(name).test_size == size
  # Logs of the optimizer tell stages by the names of the blocks.
  depth = models.arguments(name)['depth']
  parts = {module: optimizer._part(module, depth) for module in shapes}
  last = f'EfficientNet/~/mb_conv_block_{sum(depth) - 1}/~/project_conv'
  assert parts[last] == 'stage_7'
  assert parts['EfficientNet/~/stem_conv'] == 'stem'
  assert parts['EfficientNet/~/linear'] == 'head'
  assert set(parts.values()) == {'stem', 'head'} | {
    f'stage_{i + 1}' for i in range(7)
  }


def test_macs_of_b0_are_the_published():
  net = hk.transform_with_state(
    lambda x: models.create('efficientnet_b0')(x, False)
  )
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  macs = models.count_macs(net.init, jax.random.key(0), images)
  assert macs / 1e9 == pytest.approx(0.39, abs=0.005)


@pytest.mark.thorough
def test_initialisation():
  net = _transform(**{**SMALL, 'width': (8, 256), 'final_width': 512})
  params, state = net.init(jax.random.key(0), reference.image(1, 16))
  root = 'EfficientNet/~'

  def spread(module):
    return float(jnp.std(params[f'{root}/{module}']['w']))

  # Variance 2 / fan_out, which for a depthwise convolution is its pixels.
  assert spread('final_conv') == pytest.approx((2 / 512) ** 0.5, rel=0.02)
  depthwise = spread('mb_conv_block_2/~/depthwise_conv')
  assert depthwise == pytest.approx((2 / 25) ** 0.5, rel=0.03)
  gate = spread('mb_conv_block_2/~/squeeze_excite/~/linear_1')
  assert gate == pytest.approx((2 / 512) ** 0.5, rel=0.03)
  classifier = params[f'{root}/linear']['w']
  assert float(jnp.abs(classifier).max()) == pytest.approx(1000**-0.5, rel=1e-3)
  # The gate's hidden channels are a quarter of the block's input.
  hidden = params[f'{root}/mb_conv_block_2/~/squeeze_excite/~/linear']['w']
  assert hidden.shape == (512, 64)
  assert {x.dtype.name for x in jax.tree.leaves((params, state))} == {
    'float32',
    'int32',
  }


@pytest.mark.slow
def test_evaluation_takes_the_averages_that_training_gathers():
  images = reference.image(4, 16)
  train = _transform(is_training=True, drop_rate=0.0, **SMALL)
  params, state = train.init(jax.random.key(0), images)
  _, state = train.apply(params, state, jax.random.key(1), images)
  evaluate = _transform(return_metrics=True, **SMALL)
  outputs, after = evaluate.apply(params, state, None, images)
  jax.tree.map(np.testing.assert_array_equal, after, state)
  assert outputs['logits'].shape == (4, 1000)
  assert {'pool', 'avg_var_3', 'res_avg_var_2'} <= outputs.keys()
  one, _ = evaluate.apply(params, state, None, images[:1])
  np.testing.assert_allclose(one['logits'], outputs['logits'][:1], atol=1e-5)
  half, _ = evaluate.apply(params, state, None, images.astype(jnp.bfloat16))
  assert half['logits'].dtype == jnp.float32
  np.testing.assert_allclose(half['logits'], outputs['logits'], atol=0.05)


@pytest.fixture(scope='module')
def kept_all():
  """Initial parameters and state, and a step that keeps everything."""
  net = _transform(is_training=True, stochdepth_rate=0.8, **SMALL)
  params, state = net.init(jax.random.key(0), reference.image(4, 16))
  return params, state, _gradients(params, state, None)


def _gradients(params, state, remat):
  net = _transform(is_training=True, remat=remat, stochdepth_rate=0.8, **SMALL)
  images, labels = jnp.asarray(reference.image(4, 16)), jnp.arange(4)

  def loss_fn(params):
    outputs, after = net.apply(params, state, jax.random.key(1), images)
    loss = optax.softmax_cross_entropy_with_integer_labels(
      outputs['logits'], labels
    )
    return loss.mean(), after

  return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['block', 'stage'])
def test_what_is_computed_again_is_the_same(kept_all, remat):
  params, state, expected = kept_all
  result = _gradients(params, state, remat)
  for (path, x), y in zip(
    jax.tree.leaves_with_path(result), jax.tree.leaves(expected), strict=True
  ):
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=name)


def test_stochastic_depth_grows_linearly_where_the_input_is_added():
  blocks = []

  def forward(x):
    net = models.create('efficientnet_b0')
    blocks.extend(net.blocks)
    return net(x, False)['logits']

  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  jax.eval_shape(
    hk.transform_with_state(forward).init, jax.random.key(0), images
  )
  rates = [block.stochdepth_rate for block in blocks]
  np.testing.assert_allclose(rates, 0.2 * np.arange(16) / 16)
  # Of each stage all blocks but the first.
  assert sum(block.adds_input for block in blocks) == 16 - 7


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'depth': (1, 2)}, 'one entry per stage'),
    ({'stochdepth_rate': 1.0}, r'stochdepth_rate must lie in \[0, 1\)'),
    ({'remat': 'layer'}, "remat is 'layer'"),
    ({'num_classes': 0}, 'num_classes must be at least 1'),
  ],
)
def test_impossible_nets_are_refused(overrides, message):
  with pytest.raises(ValueError, match=message):
    _transform(**overrides).init(jax.random.key(0), jnp.ones((1, 32, 32, 3)))
