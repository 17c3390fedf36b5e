"""One training step as a pure function.

It runs on a per-device batch and knows the other devices only by the axis name
to average over. Images arrive augmented and are only normalised here. Dropout
and stochastic depth draw from the run's key, the step and the image's index in
the global batch, so a run does not depend on the number of devices or
micro-batches, with two exceptions:
  * Batch normalisation uses the statistics of one micro-batch on one device, or
    on all devices if the net is configured so. Each micro-batch updates the
    moving statistics, which are averaged over devices at the end of the step.
  * With `sam_per_device`, sharpness-aware minimisation ascends on each device
    with its own images, so the result depends on the number of devices.

Differences:
  * The released code casts parameters to bfloat16 before the forward pass; here
    layers standardise them in float32 and then cast.
  * The released code keeps a state per device and saves the first; here all
    devices hold the mean, so a run can resume on another number of devices.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import optax

from nfnets_jax import models
from nfnets_jax.training import ema, sam
from nfnets_jax.training import optimizer as optimizers
from nfnets_jax.training.schedules import Schedule

# `image` uint8 `[B, H, W, 3]`, `label` and `mix_label` int32 `[B]`, `ratio`
# float32 `[B]`, the weight of `label`; optionally some of `_COUNTERS`. The step
# adds `index` int32 `[B]`, in the global batch, and for SAM's ascent `weight`
# float32 `[B]`, of the example's loss.
Batch = dict[str, chex.Array]
Metrics = dict[str, jax.Array]
# Learning rate and clipping thresholds, float32 scalars.
Hyperparams = dict[str, chex.Numeric]

# Arrays of a batch to sum and report: corrupt examples skipped before each
# example, and processes that ask to stop.
_COUNTERS = ('skipped', 'stop')


class TrainState(NamedTuple):
  """All mutable state of training, identical on every device.

  Attributes:
    step: number of updates made, int32 scalar.
    key: data of the run's random key, uint32; constant.
    params: network parameters, float32.
    model_state: Haiku state of the network, empty for normaliser-free nets.
    opt_state: optimizer state.
    ema_params: moving average of `params`.
    ema_model_state: moving average of `model_state`.
  """

  step: jax.Array
  key: jax.Array
  params: hk.MutableParams
  model_state: hk.MutableState
  opt_state: optax.OptState
  ema_params: hk.MutableParams
  ema_model_state: hk.MutableState


def train_step(
  state: TrainState,
  batch: Batch,
  hyperparams: Hyperparams,
  *,
  gradient: Callable,
  create_optimizer: Callable[..., optax.GradientTransformation],
  create_schedule: Callable[..., Schedule],
  ema_decay: float,
  micro_batches: int = 1,
  sam_rho: float | None,
  sam_fraction: float,
  sam_per_device: bool = False,
  axis_name: str,
) -> tuple[TrainState, Metrics]:
  """Makes one update; to be mapped over the devices.

  Args:
    state: before the update.
    batch: the per-device batch; `micro_batches` must divide it.
    hyperparams: traced inputs, so that one program serves all values.
    gradient: `losses.loss_gradient` with its keywords bound.
    create_optimizer: `hyperparams` → transformation of gradient to update.
    create_schedule: `hyperparams` → learning rate schedule, for reporting only.
    ema_decay: upper bound of the moving average's decay.
    micro_batches: number of sequential micro-batches, to save memory.
    sam_rho: ρ of sharpness-aware minimisation; None is off.
    sam_fraction: fraction of the batch for the ascent step.
    sam_per_device: whether each device ascends alone; see `sam`.
    axis_name: mapped axis of the devices.

  Returns:
    The new state, and float32 means over the whole batch: `loss`, `top_1` (of
    the likelier label of mixed images); `grad_norm` before clipping,
    `learning_rate`, `optimizer.update_metrics`, and sums of `_COUNTERS`.
  """
  batch, counters = _split_counters(batch)
  batch = _add_index(batch, axis_name)
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
  mean_gradient = functools.partial(accumulate, gradient, key=key)
  params, model_state = state.params, state.model_state
  if sam_rho is not None:
    axis = None if sam_per_device else axis_name
    part = sam.ascent_batch(batch, sam_fraction, micro_batches, axis)
    ascent, *_ = mean_gradient(params, model_state, *part)
    ascent = ascent if axis is None else jax.lax.pmean(ascent, axis)
    params = sam.ascend(params, ascent, sam_rho)
  grads, metrics, model_state = mean_gradient(
    params, model_state, batch, micro_batches
  )
  # Average over the whole batch before AGC.
  grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
  model_state = _mean_state(model_state, axis_name)
  new = apply_gradients(state, grads, create_optimizer(hyperparams), ema_decay)
  new = _update_model_state(new, model_state, state.step, ema_decay)
  metrics |= jax.lax.psum(jax.tree.map(jnp.sum, counters), axis_name)
  metrics |= optimizers.update_metrics(new.opt_state)
  rate = create_schedule(hyperparams)(state.step)
  metrics['learning_rate'] = jnp.asarray(rate, jnp.float32)
  metrics['grad_norm'] = optimizers.global_norm(grads)
  return new, metrics


def accumulate(
  gradient: Callable,
  params: hk.MutableParams,
  model_state: hk.MutableState,
  batch: Batch,
  micro_batches: int,
  *,
  key: jax.Array,
) -> tuple[hk.MutableParams, Metrics, hk.MutableState]:
  """Returns the mean gradient, mean metrics and last state of micro-batches.

  `model_state` passes from one to the next; without batch normalisation, the
  result is that of the whole batch up to rounding. Raises a ValueError if
  `micro_batches` does not divide the batch.
  """
  if micro_batches == 1:
    return gradient(params, model_state, key, batch)
  size, rest = divmod(batch['image'].shape[0], micro_batches)
  if rest:
    raise ValueError(
      f'{micro_batches} micro-batches do not divide a per-device batch of '
      f'{batch["image"].shape[0]} images'
    )
  parts = jax.tree.map(
    lambda x: x.reshape(micro_batches, size, *x.shape[1:]), batch
  )

  def add(carry, part):
    sums, model_state = carry
    *terms, model_state = gradient(
      standardized, model_state, key, part, standardized=True
    )
    return (jax.tree.map(jnp.add, sums, tuple(terms)), model_state), None

  # Standardise weights, and differentiate through it, only once.
  standardized, pull_back = jax.vjp(models.fold, params)
  metrics = {'loss': jnp.zeros(()), 'top_1': jnp.zeros(())}
  zeros = (jax.tree.map(jnp.zeros_like, standardized), metrics)
  (sums, model_state), _ = jax.lax.scan(add, (zeros, model_state), parts)
  grads, metrics = jax.tree.map(lambda x: x / micro_batches, sums)
  return *pull_back(grads), metrics, model_state


def apply_gradients(
  state: TrainState,
  grads: hk.MutableParams,
  optimizer: optax.GradientTransformation,
  ema_decay: float,
) -> TrainState:
  """Makes one update from the float32 gradient of the whole batch."""
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  return state._replace(
    step=state.step + 1,
    params=params,
    opt_state=opt_state,
    ema_params=ema.update(state.ema_params, params, state.step, ema_decay),
  )


def _update_model_state(
  new: TrainState,
  model_state: hk.MutableState,
  step: jax.Array,
  ema_decay: float,
) -> TrainState:
  """Updates the net's state and its average, unless the step is skipped."""
  finite = optax.tree.get(new.opt_state, 'last_finite')
  if finite is not None:
    keep = functools.partial(jnp.where, finite)
    model_state = jax.tree.map(keep, model_state, new.model_state)
  average = ema.update(new.ema_model_state, model_state, step, ema_decay)
  return new._replace(model_state=model_state, ema_model_state=average)


# Compute dtypes; float16 would need loss scaling.
DTYPES = ('float32', 'bfloat16')


def create_policy(compute_dtype: str) -> jmp.Policy:
  """Returns a policy with float32 parameters and outputs."""
  return jmp.get_policy(
    f'params=float32,compute={compute_dtype},output=float32'
  )


def init_state(
  net: hk.TransformedWithState,
  optimizer: optax.GradientTransformation,
  seed: int,
  image_size: int,
) -> TrainState:
  """Initialises the train state.

  `seed` is also that of dropout and stochastic depth.
  """
  # Runs once, so compile fast: 10 seconds, not minutes, for F0 on two cores.
  options = {'xla_backend_optimization_level': 0}
  init = jax.jit(
    _create_init(net, optimizer, image_size), compiler_options=options
  )
  # The key is an input, so that one program serves all seeds.
  return init(jax.random.key(seed))


def state_shapes(
  net: hk.TransformedWithState,
  optimizer: optax.GradientTransformation,
  image_size: int,
) -> TrainState:
  """Returns the shapes and dtypes of `init_state`'s result."""
  init = _create_init(net, optimizer, image_size)
  return jax.eval_shape(init, jax.random.key(0))


def _create_init(
  net: hk.TransformedWithState,
  optimizer: optax.GradientTransformation,
  image_size: int,
) -> Callable[[jax.Array], TrainState]:
  def init(key: jax.Array) -> TrainState:
    init_key, run_key = jax.random.split(key)
    images = jnp.zeros((1, image_size, image_size, 3))
    params, model_state = net.init(init_key, images, is_training=True)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      key=jax.random.key_data(run_key),
      params=params,
      model_state=model_state,
      opt_state=optimizer.init(params),
      ema_params=jax.tree.map(jnp.copy, params),
      ema_model_state=jax.tree.map(jnp.copy, model_state),
    )

  return init


def _split_counters(batch: Batch) -> tuple[Batch, Batch]:
  counters = {name: batch[name] for name in _COUNTERS if name in batch}
  return {k: x for k, x in batch.items() if k not in counters}, counters


def _add_index(batch: Batch, axis_name: str) -> Batch:
  size = batch['image'].shape[0]
  first = jax.lax.axis_index(axis_name) * size
  return batch | {'index': first + jnp.arange(size, dtype=jnp.int32)}


def _mean_state(state: hk.MutableState, axis_name: str) -> hk.MutableState:
  """Averages a net's state over devices; integer counters are equal on all."""

  def mean(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
      return jax.lax.pmean(x, axis_name)
    return jax.lax.pmax(x, axis_name)

  return jax.tree.map(mean, state)
