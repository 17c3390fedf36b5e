"""One evaluation step as a pure function."""

import functools
from collections.abc import Sequence
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
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
  label_map: Sequence[int] | None = None,
  average: bool = True,
  per_image: bool = False,
  axis_name: str,
) -> dict[str, Any]:
  """Sums losses and hits over a batch; to be mapped over the devices.

  Args:
    state: both the current and the averaged parameters are evaluated.
    batch: per-device `image` uint8 `[B, H, W, 3]`, `label` int32 `[B]` and
      `mask` `[B]`, 0 or false for padding. With `label_set` int32 `[B, S]`,
      padded with -1, a prediction hits if it is any of these labels.
    net: takes `(images, is_training)`.
    micro_batches: number of sequential micro-batches; must divide B.
    compute_dtype: independent of training: in bfloat16, ties among 1000 logits
      decide ranks.
    label_map: output of the net for each label; None is the identity. Other
      outputs are ignored.
    average: whether to evaluate the averaged parameters as well.
    per_image: whether to return `images`.
    axis_name: mapped axis of the devices.

  Returns:
    `{'eval': sums, 'ema_eval': sums}` over all devices: `loss` (nats, no
    smoothing), `top_1` and `top_5` hits, and the `count` of images. `images`
    maps the same names to arrays of the global batch, in its order: the labels
    `predicted` `[N, min(5, K)]`, best first, the `confidence` of the first, a
    softmax probability, `hit`, `label` and `mask`, all `[N]`.
  """
  models = {'eval': (standardization.fold(state.params), state.model_state)}
  if average:
    models['ema_eval'] = (
      standardization.fold(state.ema_params),
      state.ema_model_state,
    )

  def evaluate_part(part: Batch) -> tuple[dict[str, Metrics], dict[str, Any]]:
    sums, images = {}, {}
    for name, model in models.items():
      logits = _logits(net, *model, part['image'], compute_dtype)
      if label_map is not None:
        logits = logits[:, np.asarray(label_map)]
      rank = _best_rank(logits, part)
      sums[name] = _sums(logits, rank, part)
      if per_image:
        images[name] = _predictions(logits, rank, part)
    return sums, images

  if micro_batches == 1:
    sums, images = evaluate_part(batch)
  else:
    parts = jax.tree.map(
      lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch
    )
    sums, images = jax.lax.map(evaluate_part, parts)
    sums = jax.tree.map(functools.partial(jnp.sum, axis=0), sums)
    images = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), images)
  sums = jax.lax.psum(sums, axis_name)
  if not per_image:
    return sums
  return {**sums, 'images': jax.lax.all_gather(images, axis_name, tiled=True)}


def _logits(
  net: hk.TransformedWithState,
  params: hk.MutableParams,
  model_state: hk.MutableState,
  images: jax.Array,
  compute_dtype: str,
) -> jax.Array:
  policy = create_policy(compute_dtype)
  # The default is bfloat16 products on TPU and TF32 on GPU.
  precision = 'float32' if compute_dtype == 'float32' else None
  with jax.default_matmul_precision(precision):
    outputs, _ = net.apply(
      params,
      model_state,
      None,
      policy.cast_to_compute(normalize(images)),
      is_training=False,
      standardized=True,
    )
  return policy.cast_to_output(outputs['logits'])


def _sums(logits: jax.Array, rank: jax.Array, batch: Batch) -> Metrics:
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


def _predictions(
  logits: jax.Array, rank: jax.Array, batch: Batch
) -> dict[str, jax.Array]:
  best, predicted = jax.lax.top_k(logits, min(5, logits.shape[1]))
  return {
    'predicted': predicted,
    'confidence': jnp.exp(best[:, 0] - jax.nn.logsumexp(logits, axis=1)),
    'hit': rank < 1,
    'label': batch['label'],
    'mask': batch['mask'] > 0,
  }


def _best_rank(logits: jax.Array, batch: Batch) -> jax.Array:
  """Returns the rank of the label, or the best one of the label set."""
  if 'label_set' not in batch:
    return _ranks(logits, batch['label'])
  labels = batch['label_set']
  ranks = jax.vmap(_ranks, in_axes=(None, 1), out_axes=1)(logits, labels)
  # -1 is padding.
  return jnp.min(jnp.where(labels < 0, logits.shape[1], ranks), axis=1)


def _ranks(logits: jax.Array, label: jax.Array) -> jax.Array:
  """Counts the classes ranked before the label."""
  target = jnp.take_along_axis(logits, label[:, None], axis=1)
  # Ties rank by index, as in argmax, and a NaN is a miss.
  first = jnp.arange(logits.shape[1])[None, :] < label[:, None]
  before = (logits > target) | ((logits == target) & first)
  unordered = jnp.isnan(logits) | jnp.isnan(target)
  return jnp.sum(before | unordered, axis=1)
