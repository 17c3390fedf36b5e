"""A training step as `main` runs it, ready on the device."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import config_dict

from experiments.benchmarks import speed
from experiments.gpu import common
from nfnets_jax.models import variants
from nfnets_jax.runtime import parallel
from nfnets_jax.training import build
from nfnets_jax.training import train_step as steps

NUM_CLASSES = 1000


@dataclasses.dataclass
class Step:
  """A training step and what it takes.

  Attributes:
    run: mapped `(state, batch) → (state, metrics)`; consumes the state.
    state: before the first step, on the device.
    batch: on the device, so that no transfer is timed.
  """

  run: Any
  state: steps.TrainState
  batch: Any


def recipe(model: str, precision: str) -> config_dict.ConfigDict:
  """Returns `speed.recipe`; in a dry run of a tiny net of the same family."""
  if not common.dry_run():
    return speed.recipe(model, precision)
  if variants.get(model).family == 'nfnet':
    model = 'nfnet_tiny'
  config = speed.recipe(model, precision)
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
) -> Step:
  """Builds the training step of a config, on one device.

  Args:
    config: of `recipe`.
    batch: images.
    size: their side, in pixels.
    learning_rate: of every step.

  Returns:
    The step; it is compiled when it is first run.
  """
  net = build.create_net(config, NUM_CLASSES)
  schedule = optax.constant_schedule(learning_rate)
  optimizer = build.create_optimizer(config, schedule)
  state = speed._draw(steps.state_shapes(net, optimizer, size))
  pixels = np.random.default_rng(0).integers(
    256, size=(1, batch, size, size, 3), dtype=np.uint8
  )
  labels = np.arange(batch, dtype=np.int32)[None] % NUM_CLASSES
  run = parallel.parallel_train_step(
    functools.partial(
      build.create_train_step(config, net, NUM_CLASSES, lambda _: schedule),
      hyperparams={},
    )
  )
  shares = {
    'image': pixels,
    'label': labels,
    'mix_label': labels,
    'ratio': np.ones(labels.shape, np.float32),
  }
  on_device = jax.device_put(shares, jax.local_devices()[0])
  return Step(run, parallel.replicate(state), on_device)
