"""A training step on one device, with random state and images."""

import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import config_dict

from nfnets_jax.runtime import parallel
from nfnets_jax.training import build
from nfnets_jax.training import train_step as steps

NUM_CLASSES = 1000


class Step(NamedTuple):
  """A training step and its first inputs, on the host.

  Attributes:
    run: `(state, batch) → (state, metrics)` by pmap, which donates the state.
    state: the training state.
    batch: arrays `[1, per-device batch, ...]`.
  """

  run: Any
  state: steps.TrainState
  batch: steps.Batch


def create(
  config: config_dict.ConfigDict,
  batch: int,
  size: int,
  learning_rate: float = 1e-6,
) -> Step:
  """Builds the training step of a config for images of `size` pixels."""
  net = build.create_net(config, NUM_CLASSES)
  schedule = optax.constant_schedule(learning_rate)
  optimizer = build.create_optimizer(config, schedule)
  run = build.create_train_step(config, net, NUM_CLASSES, lambda _: schedule)
  pixels = np.random.default_rng(0).integers(
    256, size=(1, batch, size, size, 3), dtype=np.uint8
  )
  labels = np.arange(batch, dtype=np.int32)[None] % NUM_CLASSES
  arrays = {
    'image': pixels,
    'label': labels,
    'mix_label': labels,
    'ratio': np.ones(labels.shape, np.float32),
  }
  return Step(
    parallel.parallel_train_step(functools.partial(run, hyperparams={})),
    _draw(steps.state_shapes(net, optimizer, size)),
    arrays,
  )


def _draw(shapes: steps.TrainState) -> steps.TrainState:
  """Draws a state in which no residual branch is zero.

  The net's own initialisation takes a minute to compile for F2, as long as its
  gradient.
  """
  rng = np.random.default_rng(0)

  def parameter(x: jax.ShapeDtypeStruct) -> np.ndarray:
    fan_in = math.prod(x.shape[:-1])
    if fan_in == 1:  # gains and biases
      return np.ones(x.shape, x.dtype)
    weights = rng.standard_normal(x.shape, np.float32)
    return weights * np.float32(fan_in**-0.5)

  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  params = jax.tree.map(parameter, shapes.params)
  # Moving variances must not be zero.
  ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes.model_state)
  return zeros._replace(
    params=params, model_state=ones, ema_params=params, ema_model_state=ones
  )
