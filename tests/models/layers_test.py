import functools

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from nfnets_jax.models import activations, layers


def _normal(seed, shape):
  return jax.random.normal(jax.random.key(seed), shape)


def test_standardize_weight_equals_float64():
  w = np.random.default_rng(0).standard_normal((3, 3, 8, 6))
  gain = np.linspace(0.5, 2, 6)
  mean = w.mean((0, 1, 2))
  std = np.sqrt(w.var((0, 1, 2)) * 72)
  ours = layers.standardize_weight(
    jnp.asarray(w, jnp.float32), jnp.asarray(gain, jnp.float32)
  )
  np.testing.assert_allclose(ours, gain * (w - mean) / std, atol=1e-6)


def test_standardize_weight_bears_a_constant_filter():
  w = jnp.full((3, 3, 4, 2), 0.7)

  def total(w):
    return jnp.sum(layers.standardize_weight(w, jnp.ones(2)))

  # Rounding of the mean, magnified by the bound: 1e-7 · 72 / √1e-4 at most.
  np.testing.assert_allclose(total(w), 0, atol=5e-3)
  assert np.isfinite(jax.grad(total)(w)).all()


@pytest.mark.parametrize('activation', activations.NAMES)
def test_activation_and_convolution_keep_unit_variance(activation):
  net = hk.without_apply_rng(
    hk.transform(
      lambda x: layers.WSConv2D(512, 1)(activations.scaled(activation)(x))
    )
  )
  x = _normal(0, (16, 8, 8, 256))
  out = net.apply(net.init(jax.random.key(1), x), x)
  # The variance of each channel over the batch: the mean of f(z), constant over
  # the batch, is taken out by the centred weights.
  assert float(jnp.mean(jnp.var(out, (0, 1, 2)))) == pytest.approx(1, abs=0.1)


def test_ws_conv_has_float32_parameters_and_computes_in_the_input_dtype():
  net = hk.transform(lambda x: layers.WSConv2D(8, 3, groups=2)(x))
  x = jnp.ones((1, 4, 4, 4), jnp.bfloat16)
  params = net.init(jax.random.key(0), x)['ws_conv2_d']
  assert {k: (v.shape, v.dtype) for k, v in params.items()} == {
    'w': ((3, 3, 2, 8), jnp.float32),
    'gain': ((8,), jnp.float32),
    'bias': ((8,), jnp.float32),
  }
  assert net.apply({'ws_conv2_d': params}, None, x).dtype == jnp.bfloat16


def test_impossible_groups_are_refused():
  def build(channels_in, channels_out, groups):
    net = hk.transform(
      lambda x: layers.WSConv2D(channels_out, 3, groups=groups)(x)
    )
    net.init(jax.random.key(0), jnp.ones((1, 4, 4, channels_in)))

  with pytest.raises(ValueError, match='9 output channels .* 2 groups'):
    build(4, 9, 2)
  with pytest.raises(ValueError, match='5 input channels .* 2 groups'):
    build(5, 8, 2)


def test_linear_equals_haiku():
  ours = hk.transform(lambda x: layers.Linear(5)(x))
  theirs = hk.transform(lambda x: hk.Linear(5)(x))
  x = _normal(0, (3, 7))
  params = theirs.init(jax.random.key(0), x)
  mine = ours.init(jax.random.key(0), x)
  assert jax.tree.map(jnp.shape, mine) == jax.tree.map(jnp.shape, params)
  for leaf, expected in zip(
    jax.tree.leaves(mine), jax.tree.leaves(params), strict=True
  ):
    np.testing.assert_array_equal(leaf, expected)
  np.testing.assert_allclose(
    ours.apply(params, None, x), theirs.apply(params, None, x), atol=1e-6
  )


def test_squeeze_excite_gate():
  net = hk.transform(lambda x: layers.SqueezeExcite(6, 3)(x))
  pooled = _normal(0, (2, 6))
  params = net.init(jax.random.key(0), pooled)
  first, second = (
    params[f'squeeze_excite/~/{name}'] for name in ('linear', 'linear_1')
  )
  first, second, pooled = jax.tree.map(np.asarray, (first, second, pooled))
  hidden = np.maximum(pooled @ first['w'] + first['b'], 0)
  expected = 1 / (1 + np.exp(-(hidden @ second['w'] + second['b'])))
  gate = net.apply(params, None, pooled)
  assert gate.shape == (2, 1, 1, 6)
  np.testing.assert_allclose(gate[:, 0, 0], expected, atol=1e-6)


@pytest.mark.parametrize(
  'options', [{'kernel_size': 3}, {'stride': 2}, {'groups': 2}]
)
def test_the_mean_is_of_1x1_convolutions_alone(options):
  options = {'kernel_size': 1} | options
  net = hk.transform(lambda x: layers.WSConv2D(4, **options).with_mean(x))
  with pytest.raises(ValueError, match='is for 1×1 convolutions, not for'):
    net.init(jax.random.key(0), jnp.ones((1, 4, 4, 2)))


@pytest.mark.parametrize('drop', [layers.dropout, layers.stochastic_depth])
def test_the_mask_of_an_image_follows_its_index(drop):
  def forward(x, image_index=None):
    x = drop(x, 0.5, True, image_index)
    return drop(x, 0.5, True, image_index)

  net = hk.transform(forward)
  x = jnp.ones((64, 1, 1, 8))

  def apply(first, size):
    index = first + jnp.arange(size)
    return net.apply({}, jax.random.key(0), x[:size], index)

  whole = apply(0, 64)
  np.testing.assert_array_equal(apply(16, 8), whole[16:24])
  assert not np.array_equal(apply(17, 8), whole[16:24])
  # Two layers drop half each, and not the same.
  assert float(jnp.mean(whole > 0)) == pytest.approx(0.25, abs=0.12)
  # Without indices there is one mask for the whole call.
  first, second = (net.apply({}, jax.random.key(k), x) for k in (0, 1))
  assert not np.array_equal(first, second)
  assert not np.array_equal(first, whole)


def test_stochastic_depth_drops_whole_images_at_its_rate():
  x = jnp.ones((4000, 2, 2, 3))
  net = hk.transform(lambda x: layers.stochastic_depth(x, 0.25, True))
  out = np.asarray(net.apply({}, jax.random.key(0), x))
  per_image = out.reshape(4000, -1)
  assert set(np.unique(per_image)) == {0.0, 1.0}  # not rescaled
  np.testing.assert_array_equal(per_image.min(1), per_image.max(1))
  assert per_image[:, 0].mean() == pytest.approx(0.75, abs=0.03)


def test_stochastic_depth_rescales_if_asked():
  x = jnp.ones((4000, 1, 1, 1))
  net = hk.transform(
    lambda x: layers.stochastic_depth(x, 0.2, True, rescale=True)
  )
  out = np.asarray(net.apply({}, jax.random.key(0), x))
  np.testing.assert_allclose(np.unique(out), [0, 1.25])
  assert out.mean() == pytest.approx(1, abs=0.03)


def test_dropout_zeroes_elements_at_its_rate_and_keeps_the_mean():
  net = hk.transform(lambda x: layers.dropout(x, 0.2, True))
  out = np.asarray(net.apply({}, jax.random.key(0), jnp.ones((100, 200))))
  np.testing.assert_allclose(np.unique(out), [0, 1.25])
  assert out.mean() == pytest.approx(1, abs=0.02)


def test_stochastic_depth_is_off_in_evaluation():
  x = jnp.ones((4, 2, 2, 3))
  np.testing.assert_array_equal(layers.stochastic_depth(x, 0.9, False), x)


@pytest.mark.parametrize('shape', [(4, 6), (5, 7), (3, 4), (1, 1)])
def test_avg_pool_averages_what_is_there(shape):
  x = _normal(0, (2, *shape, 3))
  window = (1, 2, 2, 1)

  def window_sum(x):
    return lax.reduce_window(x, 0.0, lax.add, window, window, 'SAME')

  expected = window_sum(x) / window_sum(jnp.ones_like(x))
  np.testing.assert_allclose(layers.avg_pool(x, 2), expected, atol=1e-6)


@pytest.mark.parametrize('shape', [(8, 8), (5, 7), (1, 2)])
def test_max_pool_and_its_gradient(shape):
  x = _normal(0, (2, *shape, 3))
  height, width = (-(-side // 2) for side in shape)
  # 'SAME': an even side is padded at its end, an odd one on both.
  before = [0 if side % 2 == 0 else 1 for side in shape]
  expected = np.empty((2, height, width, 3))
  for i in range(height):
    for j in range(width):
      top, left = 2 * i - before[0], 2 * j - before[1]
      rows = slice(max(top, 0), top + 3)
      columns = slice(max(left, 0), left + 3)
      expected[:, i, j] = np.asarray(x[:, rows, columns]).max((1, 2))
  np.testing.assert_array_equal(layers.max_pool(x, 3, stride=2), expected)
  grad = jax.grad(lambda x: layers.max_pool(x, 3, stride=2).sum())(x)
  assert float(grad.sum()) == expected.size  # every output has one origin
  half = layers.max_pool(x.astype(jnp.bfloat16), 3, stride=2)
  assert half.dtype == jnp.bfloat16


def test_batch_norm_keeps_the_variance_beside_a_large_mean():
  net = hk.transform_with_state(lambda x: layers.BatchNorm()(x, True))
  noise = jax.random.normal(jax.random.key(0), (8, 16, 16, 4))
  x = 300.0 + 0.1 * noise
  params, state = jax.jit(net.init)(jax.random.key(0), x)
  out, state = jax.jit(net.apply)(params, state, None, x)
  exact = np.asarray(x, np.float64)
  mean, var = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
  np.testing.assert_allclose(
    out, (exact - mean) / np.sqrt(var + 1e-5), atol=1e-2
  )
  averages = state['batch_norm/~/var_ema']['average']
  np.testing.assert_allclose(averages.ravel(), var, rtol=1e-3)


def _two_convolutions():
  def forward(x, standardized=False):
    conv = functools.partial(layers.WSConv2D, standardized=standardized)
    x = conv(8, 3, groups=2, name='first')(x)
    x = layers.Conv2D(8, 1, name='plain')(jax.nn.gelu(x))
    return conv(4, 3, stride=2, name='second')(x)

  net = hk.without_apply_rng(hk.transform(forward))
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
  params = net.init(jax.random.key(1), x)
  keys = jax.random.split(jax.random.key(2), 2)
  for key, name in zip(keys, ('first', 'second'), strict=True):
    gain = params[name]['gain']
    params[name]['gain'] = jax.random.normal(key, gain.shape)
  return net, params, x


@pytest.mark.thorough
def test_folded_weights_compute_the_same():
  net, params, x = _two_convolutions()
  folded = layers.fold(params)
  assert {k: set(v) for k, v in folded.items()} == {
    'first': {'w', 'bias'},
    'plain': {'w'},
    'second': {'w', 'bias'},
  }
  ours = net.apply(folded, x, standardized=True)
  np.testing.assert_array_equal(ours, net.apply(params, x))
  assert 'gain' in params['first']  # which is left as it was


@pytest.mark.thorough
def test_gradients_go_through_folding():
  net, params, x = _two_convolutions()

  def loss(params, standardized=False):
    return jnp.sum(jnp.square(net.apply(params, x, standardized=standardized)))

  folded, pull_back = jax.vjp(layers.fold, params)
  grads = jax.grad(loss)(folded, standardized=True)
  ours, theirs = pull_back(grads)[0], jax.grad(loss)(params)
  chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_folded_weights_need_a_net_that_takes_them():
  net, params, x = _two_convolutions()
  with pytest.raises(ValueError, match='gain'):
    net.apply(layers.fold(params), x)


# What TPUs and GPUs run, beside what the CPU runs: nothing else executes it.
@pytest.mark.parametrize('shape', [(2, 8, 8, 3), (1, 5, 7, 2)])
def test_pooling_for_accelerators_is_that_of_the_cpu(shape):
  x = _normal(0, shape)
  around = lax.padtype_to_pads(shape[1:3], (3, 3), (2, 2), 'SAME')
  pairs = [
    (
      lambda x: layers._mean_of_windows(x, 2),
      lambda x: layers._mean_of_reshaped(x, 2),
    ),
    (
      lambda x: layers._max_of_windows(x, 3, 2, around),
      lambda x: layers._max_of_shifted(x, 3, 2, around),
    ),
  ]
  for theirs, ours in pairs:
    expected, pull_back = jax.vjp(ours, x)
    found, their_pull_back = jax.vjp(theirs, x)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    dy = _normal(1, expected.shape)
    np.testing.assert_allclose(
      their_pull_back(dy)[0], pull_back(dy)[0], atol=1e-6
    )
