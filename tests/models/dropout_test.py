import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax.models import dropout


@pytest.mark.parametrize('drop', [dropout.dropout, dropout.stochastic_depth])
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
  net = hk.transform(lambda x: dropout.stochastic_depth(x, 0.25, True))
  out = np.asarray(net.apply({}, jax.random.key(0), x))
  per_image = out.reshape(4000, -1)
  assert set(np.unique(per_image)) == {0.0, 1.0}  # not rescaled
  np.testing.assert_array_equal(per_image.min(1), per_image.max(1))
  assert per_image[:, 0].mean() == pytest.approx(0.75, abs=0.03)


def test_stochastic_depth_rescales_if_asked():
  x = jnp.ones((4000, 1, 1, 1))
  net = hk.transform(
    lambda x: dropout.stochastic_depth(x, 0.2, True, rescale=True)
  )
  out = np.asarray(net.apply({}, jax.random.key(0), x))
  np.testing.assert_allclose(np.unique(out), [0, 1.25])
  assert out.mean() == pytest.approx(1, abs=0.03)


def test_dropout_zeroes_elements_at_its_rate_and_keeps_the_mean():
  net = hk.transform(lambda x: dropout.dropout(x, 0.2, True))
  out = np.asarray(net.apply({}, jax.random.key(0), jnp.ones((100, 200))))
  np.testing.assert_allclose(np.unique(out), [0, 1.25])
  assert out.mean() == pytest.approx(1, abs=0.02)


def test_stochastic_depth_is_off_in_evaluation():
  x = jnp.ones((4, 2, 2, 3))
  np.testing.assert_array_equal(dropout.stochastic_depth(x, 0.9, False), x)
