"""Training steps with fixed hyperparameters, and batches for them."""

import functools
from collections.abc import Callable

import haiku as hk
import numpy as np
import optax
from ml_collections import config_dict

from nfnets_jax.runtime import parallel
from nfnets_jax.training import build


def constant_step(
  config: config_dict.ConfigDict,
  net: hk.TransformedWithState,
  optimizer: optax.GradientTransformation,
  *,
  num_classes: int = 10,
  micro_batches: int = 1,
  axis_name: str = parallel.AXIS,
) -> Callable:
  """Returns `step(state, batch)` of a config, with another optimizer."""
  step = build.create_train_step(
    config,
    net,
    num_classes,
    lambda _: optax.constant_schedule(0.1),
    micro_batches,
  )
  return functools.partial(
    step,
    hyperparams={},
    create_optimizer=lambda _: optimizer,
    axis_name=axis_name,
  )


def random_batch(size: int, seed: int = 0) -> dict[str, np.ndarray]:
  """Draws mixed images of eight pixels of ten classes."""
  rng = np.random.default_rng(seed)
  return {
    'image': rng.integers(256, size=(size, 8, 8, 3), dtype=np.uint8),
    'label': rng.integers(10, size=size, dtype=np.int32),
    'mix_label': rng.integers(10, size=size, dtype=np.int32),
    'ratio': rng.random(size, np.float32),
  }
