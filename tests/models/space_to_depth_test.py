import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax.models import space_to_depth, xla_convolution


def _blocks(x, n):
  """The blocks of which `depth_to_space` returns the pixels."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height // n, n, width // n, n, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(
    batch, height // n, width // n, n * n * channels
  )


def _in_blocks(x, w, stride, block, out_block):
  y = space_to_depth.conv2d(_blocks(x, block), w, stride, block, out_block)
  return space_to_depth.depth_to_space(y, out_block)


def test_depth_to_space_undoes_blocks():
  x = np.arange(2 * 6 * 9 * 2).reshape(2, 6, 9, 2)
  np.testing.assert_array_equal(
    space_to_depth.depth_to_space(_blocks(x, 3), 3), x
  )


@pytest.mark.parametrize(
  ('size', 'stride', 'block', 'out_block'),
  [
    (3, 2, 1, 2),  # from an image, as the first of a stem
    (3, 1, 2, 2),
    (3, 2, 2, 1),
    (3, 2, 4, 2),
    (3, 1, 1, 1),
    (7, 2, 1, 2),
    (5, 1, 4, 4),
    (4, 2, 2, 2),
    (2, 3, 3, 1),  # a stride larger than the kernel
  ],
)
def test_blocks_are_those_of_the_convolved_pixels(
  size, stride, block, out_block
):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 24, 12, 3)).astype(np.float32)
  w = rng.normal(size=(size, size, 3, 5)).astype(np.float32)

  def results(conv):
    y, pull = jax.vjp(conv, x, w)
    return y, *pull(jnp.cos(y))

  ours = jax.jit(results, static_argnums=0)(
    functools.partial(
      _in_blocks, stride=stride, block=block, out_block=out_block
    )
  )
  plain = results(lambda x, w: xla_convolution.conv2d(x, w, stride, 1, 'same'))
  for got, want in zip(ours, plain, strict=True):
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
  ('side', 'stride', 'block', 'out_block'),
  [(6, 2, 1, 2), (4, 1, 2, 1), (4, 1, 4, 2)],
)
def test_blocks_that_do_not_fit(side, stride, block, out_block):
  x, w = jnp.ones((1, side, side, 3)), jnp.ones((3, 3, 3, 4))
  with pytest.raises(
    ValueError, match=f'cannot be computed from {side}×{side}'
  ):
    space_to_depth.conv2d(x, w, stride, block, out_block)


def test_gradients_of_weights_are_summed_in_float32():
  """Only the gradients of single pixels are rounded, and their sum."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(4, 48, 48, 16)), jnp.bfloat16)
  w = jnp.asarray(rng.normal(size=(3, 3, 16, 32)) / 12, jnp.bfloat16)
  dy = jnp.asarray(rng.normal(size=(4, 48, 48, 32)), jnp.bfloat16)

  def gradient(conv, *args):
    _, pull = jax.vjp(lambda w: conv(args[0], w), args[1])
    return np.asarray(pull(args[2])[0], np.float32)

  def plain(x, w):
    return xla_convolution.conv2d(x, w, 1, 1, 'same')

  exact = gradient(plain, *(a.astype(jnp.float32) for a in (x, w, dy)))
  error, least = (
    np.linalg.norm(gradient(conv, x, w, dy) - exact)
    for conv in (lambda x, w: _in_blocks(x, w, 1, 2, 2), plain)
  )
  assert error < 1.6 * least  # √2; 1.9 if summed in bfloat16
