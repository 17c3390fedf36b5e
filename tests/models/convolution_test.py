import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from nfnets_jax.models import (
  convolution,
  cost,
  cpu_convolution,
  xla_convolution,
)
from tests import forms


def _normal(seed, shape):
  return jax.random.normal(jax.random.key(seed), shape)


def _plain_conv(x, w, stride, groups):
  return lax.conv_general_dilated(
    x,
    w,
    (stride, stride),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
    precision='highest',
  )


@pytest.mark.parametrize('size', [1, 3, 4])
@pytest.mark.parametrize('stride', [1, 2, 3])
@pytest.mark.parametrize('groups', [1, 4])
def test_conv2d_and_its_gradients_equal_the_plain_convolution(
  size, stride, groups
):
  x = _normal(0, (2, 9, 8, 16))
  w = _normal(1, (size, size, 16 // groups, 8))
  _assert_same(
    lambda x, w: convolution.conv2d(x, w, stride, groups),
    lambda x, w: _plain_conv(x, w, stride, groups),
    x,
    w,
  )


def _assert_same(conv, other, x, w):
  """Compares two convolutions and their gradients."""
  shape = jax.eval_shape(conv, x, w).shape
  cotangent = np.random.default_rng(2).normal(size=shape).astype(np.float32)
  ours, theirs = (
    jax.jit(functools.partial(_pullback, f))(x, w, cotangent)
    for f in (conv, other)
  )
  np.testing.assert_allclose(ours[0], theirs[0], atol=1e-4)
  for got, want in zip(ours[1:], theirs[1:], strict=True):
    np.testing.assert_allclose(got, want, atol=2e-4)


def _pullback(conv, x, w, cotangent):
  """The convolution and its gradients."""
  out, vjp = jax.vjp(conv, x, w)
  return out, *vjp(cotangent.astype(out.dtype))


# Depthwise, two channels out for each in, and more groups than convolutions.
@pytest.mark.thorough
@pytest.mark.parametrize(
  ('groups', 'channels_in', 'channels_out', 'size', 'stride'),
  [
    (8, 8, 8, 3, 1),
    (8, 8, 8, 3, 2),
    (8, 8, 8, 5, 2),
    (8, 8, 16, 3, 2),
    (37, 74, 111, 3, 2),
  ],
)
@pytest.mark.parametrize('sides', [(9, 8), (1, 2)])
def test_many_groups_equal_the_plain_convolution(
  groups, channels_in, channels_out, size, stride, sides
):
  x = _normal(0, (2, *sides, channels_in))
  w = _normal(1, (size, size, channels_in // groups, channels_out))

  def ours(x, w):
    return convolution.conv2d(x, w, stride, groups)

  def plain(x, w):
    return _plain_conv(x, w, stride, groups)

  cotangent = _normal(2, jax.eval_shape(plain, x, w).shape)
  both = jax.jit(
    lambda x, w: [_pullback(conv, x, w, cotangent) for conv in (ours, plain)]
  )
  got, expected = both(x, w)
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)
  # Sums are float32 also where numbers are not.
  half, _ = both(*(a.astype(jnp.bfloat16) for a in (x, w)))
  for a, b in zip(half, expected, strict=True):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(a, b, atol=0.02 * float(jnp.abs(b).max()))
  # They are counted as what they compute.
  assert cost.count_macs(ours, x, w) == cost.count_macs(plain, x, w)


@pytest.mark.thorough
@pytest.mark.parametrize(('groups', 'channels'), [(8, 8), (20, 40)])
def test_many_groups_in_loops_maps_and_float64(groups, channels):
  xs = _normal(0, (2, 3, 7, 6, channels))
  w = _normal(1, (3, 3, channels // groups, channels))
  dys = _normal(2, (2, 3, 4, 3, channels))

  def gradients(x, w, dy):
    conv = functools.partial(convolution.conv2d, stride=2, groups=groups)
    return _pullback(conv, x, w, dy)

  expected = [
    _pullback(lambda x, w: _plain_conv(x, w, 2, groups), x, w, dy)
    for x, dy in zip(xs, dys, strict=True)
  ]
  expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected)
  looped = jax.jit(
    lambda xs, dys: lax.map(
      lambda args: gradients(args[0], w, args[1]), (xs, dys)
    )
  )(xs, dys)
  mapped = jax.pmap(gradients, in_axes=(0, None, 0))(xs, w, dys)
  for result in (looped, mapped):
    for a, b in zip(result, expected, strict=True):
      np.testing.assert_allclose(a, b, atol=2e-4)
  with jax.enable_x64(True):
    wide = jax.jit(gradients)(
      *(jnp.asarray(np.asarray(a, np.float64)) for a in (xs[0], w, dys[0]))
    )
    for a, b in zip(wide, expected, strict=True):
      assert a.dtype == jnp.float64
      np.testing.assert_allclose(a, b[0], atol=2e-4)


def test_mean_before_a_pointwise_convolution_is_the_mean_after():
  x, w, bias = (
    _normal(i, shape)
    for i, shape in enumerate([(2, 5, 4, 16), (1, 1, 16, 8), (8,)])
  )
  cotangents = _normal(3, (2, 5, 4, 8)), _normal(4, (2, 8))

  def with_gradients(function):
    out, vjp = jax.vjp(function, x, w, bias)
    return *out, *vjp(cotangents)

  after = with_gradients(convolution._mean_after)
  y = np.asarray(_plain_conv(x, w, 1, 1)) + np.asarray(bias)
  np.testing.assert_allclose(after[0], y, atol=1e-5)
  np.testing.assert_allclose(after[1], y.mean((1, 2)), atol=1e-5)
  for function in (convolution._mean_before, convolution.pointwise_with_mean):
    for got, want in zip(with_gradients(function), after, strict=True):
      np.testing.assert_allclose(got, want, atol=2e-5)


# What TPUs and GPUs run, beside what the CPU runs: nothing else executes it.
@pytest.mark.parametrize('padding', ['same', 'symmetric'])
@pytest.mark.parametrize(
  ('size', 'stride', 'groups'), [(1, 1, 1), (1, 2, 1), (3, 1, 2), (3, 2, 4)]
)
def test_convolution_for_accelerators_is_that_of_the_cpu(
  size, stride, groups, padding
):
  x = _normal(0, (2, 9, 8, 16))
  w = _normal(1, (size, size, 16 // groups, 8))
  options = (stride, groups, padding)
  _assert_same(
    lambda x, w: xla_convolution.conv2d(x, w, *options),
    lambda x, w: cpu_convolution.conv2d(x, w, *options),
    x,
    w,
  )


def test_the_layout_of_weights_is_kept_in_training_on_tpus_alone():
  def gradient(w):
    return jax.grad(lambda w: jnp.sum(jnp.square(convolution.keep_layout(w))))(
      w
    )

  w = _normal(0, (3, 3, 2, 6))
  np.testing.assert_array_equal(gradient(w), 2 * w)
  # In the forward and the backward pass.
  lowered = forms.lowered(gradient, w)
  counts = {k: x.count('@LayoutConstraint') for k, x in lowered.items()}
  assert counts == {'cpu': 0, 'tpu': 2, 'cuda': 0}
  # Else it could not be exported.
  forward = jax.jit(convolution.keep_layout)
  assert jax.export.export(forward, platforms=['tpu'])(w).serialize()


@pytest.mark.parametrize(
  ('groups', 'counted'),
  [(2, 2), (1, 0), (4, 0)],  # one group, and groups of 64 channels
)
def test_groups_are_apart_where_tpus_train(groups, counted):
  x = _normal(0, (2, 4, 4, 256))

  def forward(x):
    return jnp.sin(convolution.keep_groups_apart(x, groups))

  def gradient(x):
    return jax.grad(lambda x: jnp.sum(forward(x)))(x)

  lowered = forms.lowered(gradient, x)
  counts = {k: x.count('@LayoutConstraint') for k, x in lowered.items()}
  assert counts == {'cpu': 0, 'tpu': counted, 'cuda': 0}
  # Of [B, H, W, groups, C / groups], minor to major.
  layout = 'result_layouts = [dense<[4, 0, 3, 2, 1]>'
  assert lowered['tpu'].count(layout) == counted
  with forms.of('tpu'):
    np.testing.assert_allclose(forward(x), jnp.sin(x), rtol=1e-6)
    np.testing.assert_allclose(gradient(x), jnp.cos(x), rtol=1e-6)
    per_image = jax.vmap(gradient)(x[:, None])
    np.testing.assert_allclose(per_image[:, 0], jnp.cos(x), rtol=1e-6)
  assert jax.export.export(jax.jit(forward), platforms=['tpu'])(x).serialize()


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_the_gradient_of_a_bias_is_summed_in_float32(dtype):
  dy = _normal(0, (8, 32, 32, 4)).astype(dtype)
  _, pull_back = jax.vjp(convolution.add_bias, dy, jnp.zeros(4))
  dx, total = pull_back(dy)
  assert (dx.dtype, total.dtype) == (dtype, jnp.float32)
  exact = np.asarray(dy, np.float64).sum((0, 1, 2))
  np.testing.assert_allclose(total, exact, rtol=1e-4, atol=1e-3)


def test_widening_by_bits_is_widening():
  every = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
  widened = jax.jit(convolution._widen_bits)(every)
  np.testing.assert_array_equal(widened, every.astype(np.float32))
  slope = jax.grad(lambda x: convolution._widen_bits(x).sum())(every[:3])
  np.testing.assert_array_equal(slope, jnp.ones(3, jnp.bfloat16))


def test_gradients_are_widened_by_bits_on_gpus_alone():
  def gradient(dy):
    return jax.vjp(convolution.add_bias, dy, jnp.zeros(4))[1](dy)

  lowered = forms.lowered(gradient, jnp.ones((2, 3, 3, 4), jnp.bfloat16))
  uses_bits = {k: 'bitcast_convert' in x for k, x in lowered.items()}
  assert uses_bits == {'cpu': False, 'tpu': False, 'cuda': True}


def test_unknown_padding():
  with pytest.raises(
    ValueError, match="padding is 'valid'; choose one of 'same', 's"
  ):
    convolution.conv2d(
      jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), padding='valid'
    )
