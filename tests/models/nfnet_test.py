import dataclasses
import functools
import json
import re

import haiku as hk
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfnets_jax import models
from nfnets_jax.models import layout, nfnet, variants
from nfnets_jax.models.settings import NFNetSettings
from tests import forms
from tests import golden as reference

NFNETS = sorted(
  name
  for name, variant in variants.VARIANTS.items()
  if variant.family == 'nfnet' and name != 'nfnet_tiny'
)


def _transform(name, is_training=False, return_metrics=False, **overrides):
  return _jit(
    hk.transform(
      lambda x: models.create(name, **overrides)(
        x, is_training, return_metrics=return_metrics
      )
    )
  )


def _jit(net):
  return hk.Transformed(jax.jit(net.init), jax.jit(net.apply))


def _trace(name, px, **overrides):
  """Parameter shapes and multiply-accumulates, without computing."""
  net = _transform(name, **overrides)
  args = jax.random.key(0), jax.ShapeDtypeStruct((1, px, px, 3), jnp.float32)
  return jax.eval_shape(net.init, *args), models.count_macs(net.init, *args)


def _released_name(name):
  return f'NFNet/F{name.removeprefix("nfnet_f").replace("plus", "+")}'


@pytest.fixture(scope='module', params=['cpu', 'tpu', 'cuda'])
def f0(request):
  """F0 with the golden parameters: its outputs, loss and gradients."""
  with forms.of(request.param):
    return _golden_f0()


def _golden_f0():
  net = _transform('nfnet_f0')
  images = reference.image(2, 64)
  shapes = jax.eval_shape(net.init, jax.random.key(0), images)
  params = reference.fill_tree(shapes)

  def loss_fn(params):
    logits = net.apply(params, None, images)['logits']
    labels = jnp.array([0, 7])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return loss.mean(), logits

  (loss, logits), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
    params
  )
  return {'logits': logits, 'loss': loss, 'grads': grads, 'params': params}


@pytest.mark.thorough
@pytest.mark.parametrize('name', NFNETS)
def test_parameters_and_macs_are_the_released(name, golden):
  families = json.loads((golden / 'families.json').read_text())
  expected = families[_released_name(name)]
  variant = variants.get(name)
  assert variant.test_size == expected['test_px']
  assert variant.train_size == expected['train_px']
  shapes, macs = _trace(name, variant.test_size)
  assert sum(x.size for x in jax.tree.leaves(shapes)) == expected['params']
  assert reference.digest(shapes) == expected['digest']
  assert macs == expected['macs_at_test_px']


def test_f0_shapes(golden):
  expected = json.loads((golden / 'nfnet_f0_shapes.json').read_text())
  shapes, _ = _trace('nfnet_f0', 64)
  assert {
    module: {name: list(x.shape) for name, x in leaves.items()}
    for module, leaves in shapes.items()
  } == expected


@pytest.mark.thorough
def test_f0_logits(f0, golden):
  expected = np.load(golden / 'logits.npz')['NFNet/F0@64']
  assert reference.relative_error(f0['logits'], expected) <= 2e-5


@pytest.mark.thorough
def test_f0_gradients(f0, golden):
  expected = json.loads((golden / 'nfnet_f0_grads.json').read_text())
  assert float(f0['loss']) == pytest.approx(expected['loss'], rel=1e-5)
  norms = {
    module: {
      name: float(np.linalg.norm(np.asarray(x, np.float64)))
      for name, x in leaves.items()
    }
    for module, leaves in f0['grads'].items()
  }
  assert norms.keys() == expected['grad_norm'].keys()
  for module, leaves in expected['grad_norm'].items():
    assert norms[module] == pytest.approx(leaves, rel=1e-4)


@pytest.mark.thorough
def test_f4plus_of_the_paper_is_an_override_away():
  shapes, macs = _trace('nfnet_f4plus', 512, group_width=(192, 128, 128, 128))
  millions = sum(x.size for x in jax.tree.leaves(shapes)) / 1e6
  assert millions == pytest.approx(527.03, abs=0.005)
  assert macs / 1e9 == pytest.approx(367.41, abs=0.005)


def _white_noise_block(beta):
  """A non-transition block of 128 channels on noise of variance beta²."""

  def forward(x):
    settings = NFNetSettings(
      width=(128,), depth=(2,), strides=(1,), group_width=(32,), drop_rate=0.0
    )
    spec = layout.block_specs(settings)[1]
    return nfnet.NFBlock(settings, spec, beta)(x, False)

  net = _jit(hk.transform(forward))
  x = beta * jax.random.normal(jax.random.key(0), (16, 16, 16, 128))
  params = net.init(jax.random.key(1), x)
  return net, params, x


@pytest.mark.thorough
@pytest.mark.parametrize('beta', [1.0, 1.3])
def test_branch_has_unit_variance_for_the_variance_that_beta_predicts(beta):
  net, params, x = _white_noise_block(beta)
  out, branch = net.apply(params, None, x)
  # 'SAME' padding thins two border pixels of 16 out; the gate is near one half.
  inner = branch[:, 2:-2, 2:-2]
  assert float(jnp.mean(jnp.var(inner, (0, 1, 2)))) == pytest.approx(1, abs=0.2)
  np.testing.assert_array_equal(out, x)  # SkipInit starts at zero


@pytest.mark.thorough
def test_stream_grows_by_alpha_squared_a_block():
  """A stage of width 256 with SkipInit gains of one, on noise."""

  def forward(x):
    settings = NFNetSettings(
      width=(256,),
      depth=(6,),
      strides=(1,),
      group_width=(64,),
      stem_width=(64, 128),
      stem_strides=(1, 1),
      drop_rate=0.0,
    )
    return nfnet.NFNet(10, settings)(x, False, return_metrics=True)

  net = _jit(hk.transform(forward))
  images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
  params = hk.data_structures.map(
    lambda _, name, x: jnp.ones_like(x) if name == 'skip_gain' else x,
    net.init(jax.random.key(1), images),
  )
  outputs = net.apply(params, None, images)
  variance = [float(outputs[f'avg_var_{i}']) for i in range(7)]
  branch = [float(outputs[f'res_avg_var_{i}']) for i in range(6)]
  # Each block adds α² times the variance of its branch, no more and no less.
  np.testing.assert_allclose(
    np.diff(variance)[1:], 0.04 * np.asarray(branch[1:]), rtol=0.25
  )
  np.testing.assert_allclose(branch[1:], 1.0, atol=0.25)


def _small_net():
  settings = NFNetSettings(
    width=(32,),
    depth=(1,),
    strides=(1,),
    group_width=(16,),
    stem_width=(4, 8, 16, 16),
    final_conv_mult=1,
    drop_rate=0.0,
  )
  return nfnet.NFNet(3, settings)


@pytest.mark.parametrize(
  ('shape', 'platform', 'in_blocks'),
  [
    ((2, 24, 16), 'tpu', True),
    ((63, 4, 4), 'tpu', True),
    ((64, 4, 4), 'tpu', False),
    ((2, 22, 16), 'tpu', False),
    ((2, 24, 18), 'tpu', False),
    ((2, 24, 16), 'cuda', False),
  ],
)
def test_a_stem_of_blocks_equals_the_plain_one(shape, platform, in_blocks):
  """As on TPUs, where few whole blocks of pixels are computed as blocks."""
  images = jax.random.normal(jax.random.key(0), (*shape, 3))
  net = hk.transform(lambda x: _small_net().features(x, False))
  params = net.init(jax.random.key(1), images)

  def loss(params, images):
    maps = net.apply(params, None, images)
    return sum(jnp.sum(jnp.sin(x)) for x in maps) / len(images), maps

  gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
  lowered = forms.lowered(gradient, params, images)[platform]
  # The weight of the stem's second convolution, for blocks of 2×2 pixels.
  block_weight = r'stablehlo.convolution.*tensor<3x3x16x32xf32>'
  assert bool(re.search(block_weight, lowered)) == in_blocks
  if not in_blocks:
    return
  plain = jax.jit(gradient)(params, images)
  with forms.of(platform):
    blocks = jax.jit(gradient)(params, images)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
    blocks,
    plain,
  )


def test_any_number_of_images_can_be_exported_for_all_platforms():
  net = hk.transform(lambda x: _small_net()(x, False)['logits'])
  params = net.init(jax.random.key(1), jnp.ones((1, 16, 16, 3)))
  shape = jax.export.symbolic_shape('b, 16, 16, 3')
  images = jax.ShapeDtypeStruct(shape, jnp.float32)
  forward = jax.jit(lambda x: net.apply(params, None, x))
  platforms = ['cpu', 'cuda', 'tpu']
  exported = jax.export.export(forward, platforms=platforms)(images)
  assert exported.call(jnp.ones((2, 16, 16, 3))).shape == (2, 3)


def test_no_images_have_no_logits():
  net = hk.transform(lambda x: _small_net()(x, False)['logits'])
  params = net.init(jax.random.key(1), jnp.ones((1, 16, 16, 3)))
  assert net.apply(params, None, jnp.ones((0, 16, 16, 3))).shape == (0, 3)


@pytest.mark.parametrize('standardized', [False, True])
def test_gradients_of_folded_nets_can_be_exported_for_tpus(standardized):
  """`jax.export` refuses the layouts that training asks for."""
  settings = forms.WHOLE_LANES
  spec = layout.block_specs(settings)[0]
  net = hk.transform(
    lambda x: nfnet.NFBlock(settings, spec, 1.0, standardized=standardized)(
      x, False
    )[0]
  )
  x = jnp.ones((1, 4, 4, 128))
  params = jax.tree.map(
    lambda x: jnp.zeros(x.shape), jax.eval_shape(net.init, jax.random.key(0), x)
  )
  gradient = jax.jit(jax.grad(lambda x: jnp.sum(net.apply(params, None, x))))
  lowered = forms.lowered(gradient, x)['tpu']
  assert ('@LayoutConstraint' in lowered) == (not standardized)
  allowed = jax.export.DisabledSafetyCheck.custom_call('LayoutConstraint')
  exported = jax.export.export(
    gradient,
    platforms=['tpu'],
    disabled_checks=[] if standardized else [allowed],
  )(x)
  assert exported.serialize()


def test_betas_follow_the_predicted_variance():
  betas = []

  def forward(x):
    net = models.create('nfnet_f1')
    betas.extend(block.beta for block in net.blocks)
    return net(x, False)['logits']

  jax.eval_shape(
    hk.transform(forward).init, jax.random.key(0), jnp.ones((1, 32, 32, 3))
  )
  depth, alpha2 = (2, 4, 12, 6), 0.2**2
  expected = [1.0]
  for stage in depth:  # after a transition the variance is 1 + α²
    expected += [1 + alpha2 * (i + 1) for i in range(stage)]
  np.testing.assert_allclose(np.square(betas), expected[:-1])


def test_stochastic_depth_grows_linearly_from_zero():
  rates = []

  def forward(x):
    net = models.create('nfnet_f0')
    rates.extend(block.stochdepth_rate for block in net.blocks)
    return net(x, False)['logits']

  jax.eval_shape(
    hk.transform(forward).init, jax.random.key(0), jnp.ones((1, 32, 32, 3))
  )
  np.testing.assert_allclose(rates, 0.25 * np.arange(12) / 12)


@pytest.mark.thorough
def test_metrics_are_the_statistics_of_the_signal():
  net = _transform('nfnet_tiny', num_classes=10)
  images = reference.image(2, 16)
  params = net.init(jax.random.key(0), images)
  plain = net.apply(params, None, images)
  with_metrics = _transform('nfnet_tiny', return_metrics=True, num_classes=10)
  outputs = with_metrics.apply(params, None, images)
  num_blocks = sum(variants.get('nfnet_tiny').settings.depth)
  assert set(plain) == {'logits', 'pool'}
  assert set(outputs) == {
    'logits',
    'pool',
    *(f'avg_sq_mean_{i}' for i in range(num_blocks + 1)),
    *(f'avg_var_{i}' for i in range(num_blocks + 1)),
    *(f'res_avg_var_{i}' for i in range(num_blocks)),
  }
  np.testing.assert_allclose(outputs['logits'], plain['logits'], atol=1e-5)


@pytest.mark.thorough
def test_bfloat16_computes_with_float32_parameters():
  net = _transform('nfnet_tiny', is_training=True, num_classes=10)
  images = reference.image(4, 16)
  params = net.init(jax.random.key(0), jnp.asarray(images, jnp.bfloat16))
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  evaluate = _transform('nfnet_tiny', num_classes=10)
  exact = evaluate.apply(params, None, images)['logits']
  half = evaluate.apply(params, None, images.astype(jnp.bfloat16))['logits']
  assert half.dtype == jnp.float32
  assert np.isfinite(half).all()
  np.testing.assert_allclose(half, exact, atol=0.05)
  # It did compute in bfloat16.
  assert np.abs(half - exact).max() > 0


@pytest.mark.thorough
def test_dropout_acts_on_the_pooled_features_only_in_training():
  images = reference.image(2, 16)
  net = _transform(
    'nfnet_tiny', is_training=True, drop_rate=0.5, stochdepth_rate=0.0
  )
  params = net.init(jax.random.key(0), images)
  first, second = (
    net.apply(params, jax.random.key(seed), images) for seed in (1, 2)
  )
  np.testing.assert_array_equal(first['pool'], second['pool'])
  assert not np.allclose(first['logits'], second['logits'])


def _trained_step(remat):
  """Parameters, and a function to loss, outputs and gradients in training."""

  def forward(images):
    net = models.create(
      'nfnet_tiny',
      num_classes=10,
      remat=remat,
      depth=(1, 2),
      width=(32, 64),
      strides=(1, 2),
      group_width=(16, 16),
      stem_width=(8, 16),
      drop_rate=0.5,
      stochdepth_rate=0.8,
    )
    return net(images, is_training=True, return_metrics=True)

  net, images = hk.transform(forward), jnp.asarray(reference.image(4, 16))

  def loss_fn(params):
    outputs = net.apply(params, jax.random.key(1), images)
    return jnp.mean(outputs['logits'] ** 2), outputs

  params = jax.jit(net.init)(jax.random.key(0), images)
  return params, loss_fn


def _residual_bytes(params, loss_fn):
  """What the forward pass hands to the backward pass, parameters aside."""

  def residuals(params):
    _, backward, _ = jax.vjp(loss_fn, params, has_aux=True)
    return backward

  kept = jax.tree.leaves(jax.eval_shape(residuals, params))
  return sum(x.size * x.dtype.itemsize for x in kept if x.shape[:1] == (4,))


@pytest.fixture(scope='module')
def kept_all():
  params, loss_fn = _trained_step(None)
  params = jax.tree.map(jnp.asarray, reference.fill_tree(params))
  return params, jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['block', 'stage'])
def test_what_is_computed_again_is_the_same(kept_all, remat):
  params, expected = kept_all
  own_params, loss_fn = _trained_step(remat)
  for x, y in zip(
    jax.tree.leaves_with_path(own_params),
    jax.tree.leaves_with_path(_trained_step(None)[0]),
    strict=True,
  ):
    assert x[0] == y[0]
    np.testing.assert_array_equal(x[1], y[1])
  results = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
  for (path, x), y in zip(
    jax.tree.leaves_with_path(results), jax.tree.leaves(expected), strict=True
  ):
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_less_is_kept_for_the_backward_pass():
  everything, stages, blocks = (
    _residual_bytes(*_trained_step(remat)) for remat in (None, 'stage', 'block')
  )
  assert stages <= blocks < everything / 3


def test_how_a_net_is_computed_is_not_a_setting():
  assert not {'remat', 'standardized'} & models.arguments('nfnet_f0').keys()


@pytest.mark.thorough
def test_initialisation():
  net = _transform('nfnet_tiny')
  params = net.init(jax.random.key(0), reference.image(1, 16))
  classifier = params['NFNet/~/linear']['w']
  assert float(jnp.std(classifier)) == pytest.approx(0.01, rel=0.02)
  conv = params['NFNet/~/nf_block_3/~/conv1']['w']
  fan_in = np.prod(conv.shape[:3])
  assert float(jnp.std(conv)) == pytest.approx(fan_in**-0.5, rel=0.02)
  assert float(params['NFNet/~/nf_block']['skip_gain']) == 0


@pytest.mark.parametrize(
  ('name', 'overrides', 'message'),
  [
    ('nfnet_f9', {}, "unknown model 'nfnet_f9'.*nfnet_f0plus"),
    ('nfnet_f0', {'droprate': 0.1}, 'no argument droprate.*drop_rate'),
    ('nfnet_f0', {'num_classes': 0}, 'num_classes must be at least 1, got 0'),
    ('nfnet_f0', {'drop_rate': 1.0}, r'drop_rate must lie in \[0, 1\), got 1'),
    ('nfnet_f0', {'remat': 'layer'}, "remat is 'layer'; .* 'block', 'stage'"),
    ('nfnet_f0', {'width': (256, 512)}, 'one entry per stage'),
    ('nfnet_f0', {'depth': (1, 2, 6, 0)}, r'depth \(1, 2, 6, 0\) must be pos'),
    ('nfnet_f0', {'stem_width': (16,)}, 'one entry per convolution'),
    ('nfnet_f0', {'activation': 'mish'}, "activation is 'mish'"),
    (
      'nfnet_f0',
      {'width': (128, 512, 1536, 1536)},
      'bottleneck of 64 channels .* one group of 128; use a group_width of at '
      'most 64 or a width of at least 256',
    ),
  ],
)
def test_impossible_nets_are_refused(name, overrides, message):
  net = _transform(name, **overrides)
  with pytest.raises(ValueError, match=message):
    net.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)))


@pytest.mark.parametrize(
  'images', [np.ones((1, 8, 8, 3), np.uint8), np.ones((8, 8, 3), np.float32)]
)
def test_impossible_images_are_refused(images):
  with pytest.raises(ValueError, match=r'floating array \[B, H, W, C\], got'):
    _transform('nfnet_tiny').init(jax.random.key(0), images)


def test_batch_normalised_net_is_another_class():
  settings = dataclasses.replace(
    variants.get('nfnet_tiny').settings, norm='batch'
  )
  net = hk.transform(lambda x: nfnet.NFNet(10, settings)(x, False))
  with pytest.raises(ValueError, match="norm='batch'; use models.create"):
    jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
