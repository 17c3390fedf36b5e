"""One evaluation step as a pure function."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from nfnets_jax.models import standardization
from nfnets_jax.training.normalize import normalize
from nfnets_jax.training.train_step import (
  Batch,
  Metrics,
  TrainState,
  create_policy,
)


def eval_step(
  state: TrainState,
  batch: Batch,
  *,
  net: hk.TransformedWithState,
  micro_batches: int = 1,
  compute_dtype: str = 'float32',
  axis_name: str,
) -> dict[str, Metrics]:
  """Sums losses and hits over a batch; to be mapped over the devices.

  Args:
    state: both the current and the averaged parameters are evaluated.
    batch: per-device `image` uint8 `[B, H, W, 3]`, `label` int32 `[B]` and
      `mask` `[B]`, 0 or false for padding.
    net: takes `(images, is_training)`.
    micro_batches: number of sequential micro-batches; must divide B.
    compute_dtype: independent of training: in bfloat16, ties among 1000 logits
      decide ranks.
    axis_name: mapped axis of the devices.

  Returns:
    `{'eval': sums, 'ema_eval': sums}` over all devices: `loss` (nats, no
    smoothing), `top_1` and `top_5` hits, and the `count` of images.
  """
  models = {
    'eval': (standardization.fold(state.params), state.model_state),
    'ema_eval': (standardization.fold(state.ema_params), state.ema_model_state),
  }

  def part_sums(part: Batch) -> dict[str, Metrics]:
    return {
      name: _sums(net, *model, part, compute_dtype)
      for name, model in models.items()
    }

  if micro_batches == 1:
    both = part_sums(batch)
  else:
    parts = jax.tree.map(
      lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch
    )
    each = jax.lax.map(part_sums, parts)
    both = jax.tree.map(functools.partial(jnp.sum, axis=0), each)
  return jax.lax.psum(both, axis_name)


def _sums(
  net: hk.TransformedWithState,
  params: hk.MutableParams,
  model_state: hk.MutableState,
  batch: Batch,
  compute_dtype: str,
) -> Metrics:
  policy = create_policy(compute_dtype)
  # The default is bfloat16 products on TPU and TF32 on GPU.
  precision = 'float32' if compute_dtype == 'float32' else None
  with jax.default_matmul_precision(precision):
    outputs, _ = net.apply(
      params,
      model_state,
      None,
      policy.cast_to_compute(normalize(batch['image'])),
      is_training=False,
      standardized=True,
    )
  logits = policy.cast_to_output(outputs['logits'])
  rank = _ranks(logits, batch['label'])
  per_image = {
    'loss': optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['label']
    ),
    'top_1': (rank < 1).astype(jnp.float32),
    'top_5': (rank < 5).astype(jnp.float32),
    'count': jnp.ones(logits.shape[0]),
  }
  # `where`, since the loss of padding may be NaN.
  mask = batch['mask'] > 0
  return jax.tree.map(lambda x: jnp.sum(jnp.where(mask, x, 0.0)), per_image)


def _ranks(logits: jax.Array, label: jax.Array) -> jax.Array:
  """Counts the classes ranked before the label."""
  target = jnp.take_along_axis(logits, label[:, None], axis=1)
  # Ties rank by index, as in argmax, and a NaN is a miss.
  first = jnp.arange(logits.shape[1])[None, :] < label[:, None]
  before = (logits > target) | ((logits == target) & first)
  unordered = jnp.isnan(logits) | jnp.isnan(target)
  return jnp.sum(before | unordered, axis=1)
