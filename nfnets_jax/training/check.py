"""Checks a config before data are read and parameters drawn."""

from ml_collections import config_dict

from nfnets_jax import paths
from nfnets_jax.data import loader as loaders
from nfnets_jax.data import transforms
from nfnets_jax.runtime import parallel
from nfnets_jax.training import build, fit, sam, train_step


def check_config(config: config_dict.ConfigDict, devices: int) -> None:
  """Raises a ValueError for invalid fields, before any data are read."""
  build.create_optimizer(config, lambda step: 0.0)
  data = config.data
  if not 0 <= config.seed < 2**32:
    raise ValueError(f'seed {config.seed} is not in [0, 2^32)')
  for name in ('image_size', 'eval_image_size'):
    if data[name] < 1:
      raise ValueError(f'data.{name} must be at least 1, got {data[name]}')
  loaders.check_workers(data.num_workers, data.worker_type)
  if config.optimizer.sam_rho is not None:
    sam.check_fraction(config.optimizer.sam_fraction)
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
  for name in ('batch_size', 'eval_batch_size'):
    if config[name] < 1 or config[name] % devices:
      raise ValueError(
        f'{name} {config[name]} is not divisible by {devices} devices; use a '
        f'positive multiple of {devices}'
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
  share = config.batch_size // devices
  count = config.micro_batches
  valid = fit.valid_micro_batches(share)
  if count is not None and count not in valid:
    below = [x for x in valid if x < count][-1:]
    nearest = below + [x for x in valid if x > count][:1]
    raise ValueError(
      f'micro_batches {count} does not split the {share} images of each of '
      f'{devices} devices into equal parts; use '
      f'{" or ".join(map(str, nearest))}'
    )
