"""Lowers and compiles the steps of a config for any devices.

Used by the training loop and by `nfnets_jax.compile`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import config_dict

from nfnets_jax import devices as platforms
from nfnets_jax import paths
from nfnets_jax.runtime import nans, parallel, processes, progress
from nfnets_jax.training import build, fit, train_step


def lower_train_step(
  config: config_dict.ConfigDict,
  net: hk.TransformedWithState,
  state: train_step.TrainState,
  batch: train_step.Batch,
  num_classes: int,
  epoch_steps: float,
  micro_batches: int,
  devices: Sequence[jax.Device] | None = None,
) -> jax.stages.Lowered:
  """Lowers the training step for `devices`, by default the attached ones.

  `state` is replicated or shapes; `batch` comes from `batch_shapes`.
  """
  step = _train_step(config, net, num_classes, epoch_steps, micro_batches)
  inputs = build.initial_hyperparams(config)
  return parallel.lower_train_step(step, state, batch, inputs, devices=devices)


def _train_step(
  config: config_dict.ConfigDict,
  net: hk.TransformedWithState,
  num_classes: int,
  epoch_steps: float,
  micro_batches: int,
) -> Callable:
  return build.create_train_step(
    config,
    net,
    num_classes,
    lambda values: build.create_schedule(config, epoch_steps, values),
    micro_batches,
  )


def lower_eval_step(
  config: config_dict.ConfigDict,
  net: hk.TransformedWithState,
  state: train_step.TrainState,
  batch: train_step.Batch,
  micro_batches: int,
  devices: Sequence[jax.Device] | None = None,
  **options: Any,
) -> jax.stages.Lowered:
  """Lowers the evaluation step, with `options`; see `lower_train_step`."""
  step = functools.partial(
    build.create_eval_step(config, net, micro_batches), **options
  )
  return parallel.lower_eval_step(step, state, batch, devices=devices)


def batch_shapes(
  config: config_dict.ConfigDict, devices: int, several: bool = False
) -> train_step.Batch:
  """Returns the shapes and dtypes of a training batch, split over devices.

  All arrays are `[devices, per-device batch, ...]`, with `devices` over all
  processes. If there are `several` processes, they add `stop`.
  """
  per_device = config.batch_size // devices
  shapes = {
    **_image_shapes(devices, per_device, config.data.image_size),
    'mix_label': jax.ShapeDtypeStruct((devices, per_device), jnp.int32),
    'ratio': jax.ShapeDtypeStruct((devices, per_device), jnp.float32),
  }
  if config.data.skip_corrupt:
    shapes['skipped'] = jax.ShapeDtypeStruct((devices, per_device), jnp.int32)
  if several:
    shapes['stop'] = jax.ShapeDtypeStruct((devices, 1), jnp.int32)
  return shapes


def eval_batch_shapes(
  config: config_dict.ConfigDict, devices: int
) -> train_step.Batch:
  """Returns the shapes of an evaluation batch; see `batch_shapes`."""
  per_device = config.eval_batch_size // devices
  return {
    **_image_shapes(devices, per_device, config.data.eval_image_size),
    'mask': jax.ShapeDtypeStruct((devices, per_device), jnp.float32),
  }


def _image_shapes(devices: int, per_device: int, size: int) -> train_step.Batch:
  image = (devices, per_device, size, size, 3)
  return {
    'image': jax.ShapeDtypeStruct(image, jnp.uint8),
    'label': jax.ShapeDtypeStruct((devices, per_device), jnp.int32),
  }


def compile_train_step(
  config: config_dict.ConfigDict,
  net: hk.TransformedWithState,
  state: train_step.TrainState,
  num_classes: int,
  epoch_steps: float,
) -> parallel.Program:
  """Compiles `step(state, batch)` with the fewest micro-batches that fit.

  `config.micro_batches`, if not None, is used without a memory check. All
  processes choose the same number.

  Raises:
    fit.TooLargeError: if no number fits.
    ValueError: if the memory of a device is unknown.
  """
  batch = _local_part(
    batch_shapes(config, jax.device_count(), jax.process_count() > 1)
  )
  per_device = config.batch_size // jax.device_count()
  chosen = config.micro_batches is None
  memory = platforms.memory() if chosen else None
  counts = (
    fit.valid_micro_batches(per_device) if chosen else [config.micro_batches]
  )
  fits = fit.compile_fewest(
    lambda count: lower_train_step(
      config, net, state, batch, num_classes, epoch_steps, count
    ),
    counts,
    memory=memory,
    beside=fit.bytes_beside(batch),
    agree=processes.all_agree,
  )
  if memory is not None:
    progress.say(
      f'micro-batches: {fits.parts} of {per_device // fits.parts} images on '
      f'each device, {fits.total / fit.GIB:.2f} of {memory / fit.GIB:.2f} GiB'
    )
  if state.model_state and fits.parts > 1:
    progress.say(
      f'batch normalisation uses statistics of {per_device // fits.parts} '
      f'images; set micro_batches={fits.parts} to get the same elsewhere'
    )
  step = _train_step(config, net, num_classes, epoch_steps, fits.parts)
  return nans.program(fits.compiled, step, build.initial_hyperparams(config))


def compile_eval_step(
  config: config_dict.ConfigDict,
  net: hk.TransformedWithState,
  state: train_step.TrainState,
  label_sets: int | None = None,
  **options: Any,
) -> parallel.Program:
  """Compiles the evaluation step with the fewest micro-batches that fit.

  If device memory is unknown, the first that compiles is used.

  Args:
    config: of the run.
    net: the network.
    state: replicated.
    label_sets: size of `label_set` in the batch; None if there is none.
    **options: of `eval_step.eval_step`.

  Raises:
    fit.TooLargeError: if no number fits.
  """
  batch = eval_batch_shapes(config, jax.device_count())
  if label_sets is not None:
    shape = (*batch['label'].shape, label_sets)
    batch['label_set'] = jax.ShapeDtypeStruct(shape, jnp.int32)
  batch = _local_part(batch)
  fits = fit.compile_fewest(
    lambda parts: lower_eval_step(config, net, state, batch, parts, **options),
    fit.valid_micro_batches(config.eval_batch_size // jax.device_count()),
    memory=platforms.known_memory(),
    beside=fit.bytes_beside(batch),
    agree=processes.all_agree,
    remedy=fit.EVALUATION_REMEDY,
  )
  step = build.create_eval_step(config, net, fits.parts)
  return nans.program(fits.compiled, functools.partial(step, **options))


def _local_part(batch: train_step.Batch) -> train_step.Batch:
  """Returns the shapes of this process's part of a global batch."""
  local = jax.local_device_count()
  return jax.tree.map(lambda x: x.update(shape=(local, *x.shape[1:])), batch)


def keep_compiled(config: config_dict.ConfigDict, workdir: paths.Path) -> None:
  """Enables jax's persistent compilation cache, so that resuming is fast.

  A folder already set in jax, as by JAX_COMPILATION_CACHE_DIR, takes
  precedence. A relative folder in the config is relative to `workdir`. Both may
  be in a bucket.
  """
  name = 'jax_compilation_cache_dir'
  if config.compilation_cache and not getattr(jax.config, name):
    cache = paths.expand_literal(
      config.compilation_cache, 'config.compilation_cache'
    )
    is_full = paths.in_bucket(cache) or cache.is_absolute()
    folder = cache if is_full else paths.absolute(workdir) / cache
    jax.config.update(name, str(folder))
    # jax decides at the first compilation whether to use a cache.
    compilation_cache.reset_cache()
  if paths.in_bucket(getattr(jax.config, name) or ''):
    # XLA's own caches are local folders.
    jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')
