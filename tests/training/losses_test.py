import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax.training import losses


def _oracle(logits, labels, smoothing):
  """Kullback-Leibler's cross term, in float64."""
  logits = np.asarray(logits, np.float64)
  labels = np.asarray(labels, np.float64)
  target = labels * (1 - smoothing) + smoothing / labels.shape[1]
  log_p = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
  return -np.sum(target * log_p, axis=1)


@pytest.fixture(scope='module')
def batch():
  """Logits, and labels as MixUp makes them."""
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 3, (6, 10)).astype(np.float32)
  first, second = np.eye(10)[rng.integers(10, size=(2, 6))]
  share = rng.uniform(size=(6, 1))
  labels = (share * first + (1 - share) * second).astype(np.float32)
  return jnp.asarray(logits), jnp.asarray(labels)


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.9])
def test_equals_float64(batch, smoothing):
  loss = losses.cross_entropy(*batch, smoothing)
  assert loss.shape == (6,)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, _oracle(*batch, smoothing), rtol=1e-5)


def test_gradient_is_softmax_minus_smoothed_labels(batch):
  logits, labels = batch
  grads = jax.grad(lambda x: losses.cross_entropy(x, labels, 0.1).sum())(logits)
  expected = jax.nn.softmax(logits) - (0.9 * labels + 0.01)
  np.testing.assert_allclose(grads, expected, atol=1e-6)


def test_bfloat16_logits_make_a_float32_loss(batch):
  logits, labels = batch
  half = logits.astype(jnp.bfloat16)
  loss = losses.cross_entropy(half, labels.astype(jnp.bfloat16), 0.1)
  assert loss.dtype == jnp.float32
  expected = _oracle(half, labels.astype(jnp.bfloat16), 0.1)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_huge_logits_do_not_overflow():
  logits = jnp.array([[1e4, 0.0], [0.0, 1e4]])
  labels = jnp.array([[1.0, 0.0], [1.0, 0.0]])
  np.testing.assert_allclose(losses.cross_entropy(logits, labels), [0, 1e4])
