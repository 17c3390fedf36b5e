"""Training steps on the device; tiny in a dry run."""

import jax
from ml_collections import config_dict

from experiments.benchmarks import programs
from experiments.benchmarks import step as steps
from experiments.gpu import common
from nfnets_jax.models import variants
from nfnets_jax.runtime import parallel


def recipe(model: str, precision: str) -> config_dict.ConfigDict:
  """Returns `programs.recipe`, in a dry run of a tiny net of the family."""
  if not common.dry_run():
    return programs.recipe(model, precision)
  if variants.get(model).family == 'nfnet':
    model = 'nfnet_tiny'
  config = programs.recipe(model, precision)
  stages = len(config.model.depth)
  config.model.depth = (1,) * stages
  config.model.width = (32,) * stages
  if model == 'nfnet_tiny':
    config.model.group_width = (16,) * stages
    config.model.stem_width = (8, 16)
  else:
    config.model.stem_width = 16
  return config


def create(
  config: config_dict.ConfigDict,
  batch: int,
  size: int,
  learning_rate: float = 1e-6,
) -> steps.Step:
  """Builds a step with its inputs on the device, so no transfer is timed."""
  step = steps.create(config, batch, size, learning_rate)
  return step._replace(
    state=parallel.replicate(step.state),
    batch=jax.device_put(step.batch, jax.local_devices()[0]),
  )
