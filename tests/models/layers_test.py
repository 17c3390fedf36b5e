import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax.models import activations, checks, layers


def _normal(seed, shape):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize('activation', checks.ACTIVATIONS)
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


@pytest.mark.parametrize(
  'options', [{'kernel_size': 3}, {'stride': 2}, {'groups': 2}]
)
def test_the_mean_is_of_1x1_convolutions_alone(options):
  options = {'kernel_size': 1} | options
  net = hk.transform(lambda x: layers.WSConv2D(4, **options).with_mean(x))
  with pytest.raises(ValueError, match='is for 1×1 convolutions, not for'):
    net.init(jax.random.key(0), jnp.ones((1, 4, 4, 2)))


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
