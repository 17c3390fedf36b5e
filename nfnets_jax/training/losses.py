"""The training loss and its gradient."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from nfnets_jax.training.normalize import normalize
from nfnets_jax.training.train_step import Batch, Metrics, create_policy


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


def label_distributions(batch: Batch, num_classes: int) -> jax.Array:
  """Returns the class probabilities of mixed images, float32 `[B, K]`.

  `label` and `mix_label` are int32 `[B]`; `ratio`, float32 `[B]`, is the weight
  of `label`, and `mix_label` has the rest.

  Example:
    >>> batch = {'label': jnp.array([0]), 'mix_label': jnp.array([2]),
    ...          'ratio': jnp.array([0.75])}
    >>> label_distributions(batch, 3).tolist()
    [[0.75, 0.0, 0.25]]
  """
  label, mix_label = (
    jax.nn.one_hot(batch[name], num_classes, dtype=jnp.float32)
    for name in ('label', 'mix_label')
  )
  ratio = batch['ratio'][:, None]
  return ratio * label + (1 - ratio) * mix_label


def loss_gradient(
  params: hk.MutableParams,
  model_state: hk.MutableState,
  key: jax.Array,
  batch: Batch,
  standardized: bool = False,
  *,
  net: hk.TransformedWithState,
  num_classes: int,
  label_smoothing: float = 0.0,
  compute_dtype: str = 'float32',
) -> tuple[hk.MutableParams, Metrics, hk.MutableState]:
  """Returns a micro-batch's float32 gradient, mean metrics and new state.

  `params` come from `models.fold` if `standardized`; `label_smoothing` is in
  [0, 1); `compute_dtype` is one of `train_step.DTYPES`. The metrics are `loss`
  and `top_1`.
  """
  policy = create_policy(compute_dtype)
  images = policy.cast_to_compute(normalize(batch['image']))
  labels = label_distributions(batch, num_classes)

  def loss_fn(params: hk.MutableParams):
    outputs, new_state = net.apply(
      params,
      model_state,
      key,
      images,
      is_training=True,
      image_index=batch['index'],
      standardized=standardized,
    )
    logits = policy.cast_to_output(outputs['logits'])
    loss = cross_entropy(logits, labels, label_smoothing)
    return jnp.mean(batch.get('weight', 1.0) * loss), (logits, new_state)

  (loss, (logits, new_state)), grads = jax.value_and_grad(
    loss_fn, has_aux=True
  )(params)
  hits = jnp.argmax(logits, axis=1) == jnp.argmax(labels, axis=1)
  metrics = {'loss': loss, 'top_1': jnp.mean(hits.astype(jnp.float32))}
  return grads, metrics, new_state
