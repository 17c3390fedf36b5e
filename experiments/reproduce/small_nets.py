"""The nets of the claims at `small`, and their rehearsal.

CIFAR-10 at 16 × 16 pixels. ResNets have 20 layers and 61 thousand parameters,
NFNets an eighth of F0's widths and 0.42 million.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from experiments.reproduce import scales

SEEDS = (0, 1, 2)
CLIPPINGS = (0.01, 0.04, 0.16)  # of the paper's list
_, HELD_OUT = scales.SPLITS['small']
_EVALUATIONS = 5  # in a run
# For NFNets: so few images that a net without regularisation overfits.
_IMAGES, _EPOCHS = 640, 108.0


def set_length(config: config_dict.ConfigDict, epochs: float) -> None:
  """Sets a run's epochs; it is evaluated five times and saved at its end."""
  config.epochs = config.checkpoint_every_epochs = epochs
  config.eval_every_epochs = epochs / _EVALUATIONS


def shrink(config: config_dict.ConfigDict) -> None:
  """Turns a run into its rehearsal: one block a stage, 64 images, one epoch."""
  config.model.depth = (1,) * len(config.model.depth)
  config.batch_size = min(config.batch_size, 16)
  config.eval_batch_size = 64
  config.data.train_split = 'train[:64]'
  config.data.test_split = 'test[:64]'
  config.optimizer.warmup_epochs = 0.5
  set_length(config, 1.0)


def resnet(
  net: str,
  batch: int,
  seed: int,
  epochs: float,
  changes: Mapping[str, Any] | None = None,
) -> config_dict.ConfigDict:
  """Returns the config of 'NF', 'NF + AGC' or 'BN'; see `scales.resnet`."""
  config = scales.resnet(net, 'small', batch, seed)
  set_length(config, epochs)
  config.update_from_flattened_dict(dict(changes or {}))
  return config


def nfnet(
  config: config_dict.ConfigDict, seed: int, clipping: float
) -> config_dict.ConfigDict:
  """Shrinks an NFNet for ImageNet, without dropout and stochastic depth."""
  scales.adapt_nfnet(config, 'small', seed)
  config.data.train_split = f'train[:{_IMAGES}]'
  config.model.drop_rate = config.model.stochdepth_rate = 0.0
  config.optimizer.clipping = clipping
  set_length(config, _EPOCHS)
  return config
