"""The config of a run or of weights, to evaluate them without an experiment."""

import os
from typing import Any

from ml_collections import config_dict

from nfnets_jax import paths, weights
from nfnets_jax.models import variants
from nfnets_jax.runtime import workdir as workdirs
from nfnets_jax.training import config as defaults
from nfnets_jax.training import init_from
from nfnets_jax.weights import metadata


def config_of_run(
  workdir: str | os.PathLike[str],
) -> config_dict.ConfigDict:
  """Returns the locked config of a run, for its evaluation.

  Its `init_from`, where training began, is None.

  Raises:
    FileNotFoundError: if there is no run.
    ValueError: if its `config.json` is corrupt or of another version.
  """
  workdir = paths.expand_literal(workdir, 'workdir')
  stored = workdirs.read_config(workdir)
  if stored is None:
    raise FileNotFoundError(
      f'there is no run to evaluate in {workdir}; train first, or give '
      '--config.init_from=FILE'
    )
  config = defaults.get_config()
  try:
    config.model = defaults.model(stored['model']['name'])
    config.lock()
    _update(config, stored)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    # A KeyError quotes its message.
    reason = error.args[0] if error.args else error
    raise ValueError(
      f'{workdir}/config.json is corrupt, or of another version of nfnets_jax: '
      f'{reason}; give the experiment with --config'
    ) from error
  config.init_from = None
  return config


def config_of_weights(
  source: str, model: str | None = None
) -> config_dict.ConfigDict:
  """Returns a locked config that evaluates weights, on ImageNet by default.

  Model, image size and crop are those recorded with the weights, else the
  published ones: the test size of the variant and 'resize_crop_32'.

  Args:
    source: as in `config.init_from`.
    model: the variant, required for 'released'.

  Raises:
    ValueError: as in `weights.read`, or if the model is required.
    OSError: if the weights do not exist or cannot be read.
  """
  path = weights.fetch(source, model, 'config.init_from')
  if path.is_dir():
    loaded = init_from.load_average(path)
  else:
    loaded = weights.read(path, model)
  config = defaults.get_config()
  config.model = defaults.model(loaded.name)
  config.lock()
  _update(config.model, loaded.overrides)
  config.data.image_size = variants.get(loaded.name).train_size
  px, crop = metadata.evaluation_of(loaded)
  config.data.eval_image_size, config.data.eval_crop = px, crop
  config.data.test_split = None  # depends on the data set
  config.init_from = source
  return config


def _update(config: config_dict.ConfigDict, stored: dict[str, Any]) -> None:
  """Sets fields to values read from JSON."""
  for name, value in stored.items():
    if isinstance(value, dict):
      _update(config[name], value)
    else:
      config[name] = tuple(value) if isinstance(value, list) else value
