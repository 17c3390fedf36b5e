"""Training steps with constants in the place of hyperparameters."""

import functools
from collections.abc import Callable

import haiku as hk
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
  """Returns `step(state, batch)` of a config, but with this optimizer."""
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
