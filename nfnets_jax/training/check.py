"""Checks a config before data are read and parameters drawn."""

import functools
import math
import operator

from ml_collections import config_dict

from nfnets_jax import paths
from nfnets_jax.data import loader as loaders
from nfnets_jax.data import transforms
from nfnets_jax.runtime import parallel
from nfnets_jax.training import build, fit, sam, train_step

# Fields by the range of their numbers; those that may be None can be.
_RANGES = {
  'a finite number above 0': (
    lambda x: 0 < x < math.inf,
    (
      'epochs',
      'log_every_steps',
      'eval_every_epochs',
      'checkpoint_every_epochs',
      'max_loss',
      'optimizer.max_norm',
    ),
  ),
  'a finite number of at least 0': (
    lambda x: 0 <= x < math.inf,
    (
      'optimizer.learning_rate_per_256',
      'optimizer.end_learning_rate',
      'optimizer.weight_decay',
      'optimizer.skip_nonfinite',
    ),
  ),
  'a number in [0, 1)': (
    lambda x: 0 <= x < 1,
    ('label_smoothing', 'ema_decay', 'optimizer.momentum'),
  ),
}


def check_config(config: config_dict.ConfigDict, devices: int) -> None:
  """Raises a ValueError for invalid fields, before any data are read.

  Derived fields (`config.DERIVED`) may be None.
  """
  _check_ranges(config)
  build.create_optimizer(config, lambda step: 0.0)
  data = config.data
  if not 0 <= config.seed < 2**32:
    raise ValueError(f'seed {config.seed} is not in [0, 2^32)')
  for name in ('image_size', 'eval_image_size'):
    if data[name] < 1:
      raise ValueError(f'data.{name} must be at least 1, got {data[name]}')
  loaders.check_workers(data.num_workers, data.worker_type)
  sam.check(config.optimizer.sam_rho, config.optimizer.sam_fraction)
  build.create_transform(config)
  transforms.eval_transform(data.eval_image_size, data.eval_crop)
  if config.compilation_cache:
    paths.expand_literal(config.compilation_cache, 'config.compilation_cache')
  for name in ('compute_dtype', 'eval_dtype'):
    if config[name] not in train_step.DTYPES:
      raise ValueError(
        f'{name} is {config[name]!r}; choose one of '
        + ', '.join(train_step.DTYPES)
      )
  if config.keep_checkpoints < 1:
    raise ValueError(
      f'keep_checkpoints must be at least 1, got {config.keep_checkpoints}'
    )
  axis = config.model.get('cross_replica_axis')
  if axis not in (None, parallel.AXIS):
    raise ValueError(
      f'model.cross_replica_axis is {axis!r}; the devices are {parallel.AXIS!r}'
    )
  _check_divisible('eval_batch_size', config.eval_batch_size, devices)
  if config.batch_size is not None:
    check_batch(config, devices)


def _check_ranges(config: config_dict.ConfigDict) -> None:
  for text, (holds, names) in _RANGES.items():
    for name in names:
      value = functools.reduce(operator.getitem, name.split('.'), config)
      if value is not None and not holds(value):
        raise ValueError(f'{name} is {value}; give {text}')


def check_batch(
  config: config_dict.ConfigDict, devices: int, num_images: int | None = None
) -> None:
  """Raises a ValueError for a batch size or number of micro-batches.

  Devices and micro-batches must divide the batch, and it must not be larger
  than the `num_images` of training, if given.
  """
  if num_images is not None and config.batch_size > num_images:
    most = num_images // devices * devices
    remedy = (
      f'use at most {most}' if most else f'use fewer than {devices} devices'
    )
    raise ValueError(
      f'batch_size {config.batch_size} is larger than the {num_images:,} '
      f'training images; {remedy}'
    )
  _check_divisible('batch_size', config.batch_size, devices)
  per_device, count = config.batch_size // devices, config.micro_batches
  valid = fit.valid_micro_batches(per_device)
  if count is not None and count not in valid:
    below = [x for x in valid if x < count][-1:]
    nearest = below + [x for x in valid if x > count][:1]
    raise ValueError(
      f'micro_batches {count} does not divide the {per_device} images of each '
      f'of {devices} devices; use {" or ".join(map(str, nearest))}'
    )


def _check_divisible(name: str, size: int, devices: int) -> None:
  if size < 1 or size % devices:
    raise ValueError(
      f'{name} {size} is not divisible by {devices} devices; use a positive '
      f'multiple of {devices}'
    )
