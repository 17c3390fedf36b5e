"""The training loss."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(
  logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
  """Softmax cross-entropy per example, `[B]`, float32, in nats.

  Args:
    logits: `[B, K]`; converted to float32.
    labels: `[B, K]` probabilities: one-hot, or mixed by MixUp and CutMix.
    label_smoothing: probability mass spread evenly over the classes, in [0, 1).

  Example:
    >>> loss = cross_entropy(jnp.zeros((1, 4)), jnp.array([[1.0, 0, 0, 0]]))
    >>> bool(jnp.allclose(loss, jnp.log(4.0)))
    True

  Reference:
    Szegedy et al. 2016, https://arxiv.org/abs/1512.00567, section 7; Brock et
    al. 2021, appendix A (smoothing 0.1).
  """
  smoothed = optax.smooth_labels(labels.astype(jnp.float32), label_smoothing)
  return optax.softmax_cross_entropy(logits.astype(jnp.float32), smoothed)
