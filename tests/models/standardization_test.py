import functools

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax.models import (
  layers,
  standardization,
)


def _normal(seed, shape):
  return jax.random.normal(jax.random.key(seed), shape)


def test_standardize_weight_equals_float64():
  w = np.random.default_rng(0).standard_normal((3, 3, 8, 6))
  gain = np.linspace(0.5, 2, 6)
  mean = w.mean((0, 1, 2))
  std = np.sqrt(w.var((0, 1, 2)) * 72)
  ours = standardization.standardize_weight(
    jnp.asarray(w, jnp.float32), jnp.asarray(gain, jnp.float32)
  )
  np.testing.assert_allclose(ours, gain * (w - mean) / std, atol=1e-6)


def test_standardize_weight_bears_a_constant_filter():
  w = jnp.full((3, 3, 4, 2), 0.7)

  @jax.jit
  @jax.value_and_grad
  def total(w):
    return jnp.sum(standardization.standardize_weight(w, jnp.ones(2)))

  value, grad = total(w)
  # Rounding of the mean, magnified by the bound: 1e-7 · 72 / √1e-4 at most.
  np.testing.assert_allclose(value, 0, atol=5e-3)
  assert np.isfinite(grad).all()


def _two_convolutions():
  def forward(x, standardized=False):
    conv = functools.partial(layers.WSConv2D, standardized=standardized)
    x = conv(8, 3, groups=2, name='first')(x)
    x = layers.Conv2D(8, 1, name='plain')(jax.nn.gelu(x))
    return conv(4, 3, stride=2, name='second')(x)

  net = hk.without_apply_rng(hk.transform(forward))
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
  params = jax.jit(net.init)(jax.random.key(1), x)
  keys = jax.random.split(jax.random.key(2), 2)
  for key, name in zip(keys, ('first', 'second'), strict=True):
    gain = params[name]['gain']
    params[name]['gain'] = jax.random.normal(key, gain.shape)
  return net, params, x


@pytest.mark.thorough
def test_folded_weights_compute_the_same():
  net, params, x = _two_convolutions()
  folded = standardization.fold(params)
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

  folded, pull_back = jax.vjp(standardization.fold, params)
  grads = jax.grad(loss)(folded, standardized=True)
  ours, theirs = pull_back(grads)[0], jax.grad(loss)(params)
  chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_folded_weights_need_a_net_that_takes_them():
  net, params, x = _two_convolutions()
  with pytest.raises(ValueError, match='gain'):
    net.apply(standardization.fold(params), x)
