"""Builds the parts of a run from its config: data, net, optimizer, steps."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import haiku as hk
import jax
import numpy as np
import optax
from ml_collections import config_dict

from nfnets_jax import models
from nfnets_jax.data import datasets, folder, mixing, prepare, transforms
from nfnets_jax.data import loader as loaders
from nfnets_jax.models import variants
from nfnets_jax.runtime import parallel, processes, progress
from nfnets_jax.runtime import workdir as workdirs
from nfnets_jax.training import (
  eval_step,
  losses,
  optimizer,
  schedules,
  train_step,
)


def load_data(
  config: config_dict.ConfigDict,
) -> tuple[datasets.Dataset, datasets.Dataset]:
  """Opens the training and test splits, preparing the data set if asked to.

  A note of the data set, as on a split that is held out, is printed.
  """
  name, data_dir = config.data.name, config.data.data_dir
  if config.data.prepare:
    if jax.process_index() == 0:
      prepare.prepare(name, data_dir)
    processes.all_agree(True)  # wait for process 0
  train_set = load_split(config, config.data.train_split)
  test_set = load_split(config, config.data.test_split)
  if test_set.note:
    progress.say(test_set.note)
  return train_set, test_set


def load_split(
  config: config_dict.ConfigDict, split: str | None
) -> datasets.Dataset:
  """Opens a split, with the classes and caching of the config.

  None is a folder's own test split, or one held out if it has none.
  """
  name, data_dir = config.data.name, config.data.data_dir
  test_split = config.data.test_split
  if test_split is None and name == 'folder' and data_dir is not None:
    test_split = folder.find_test_split(data_dir) or 'test'
  split = split or test_split
  if split is None and (name != 'folder' or data_dir is not None):
    raise ValueError(
      f'data.test_split is None; name a split of {name}, such as test'
    )
  dataset = datasets.load(name, split or 'train', data_dir, test_split)
  if config.data.classes is not None:
    dataset = datasets.select_classes(dataset, config.data.classes)
  return datasets.keep_in_memory(dataset) if config.data.in_memory else dataset


def create_transform(
  config: config_dict.ConfigDict,
) -> transforms.TrainTransform:
  """Returns the config's training transform."""
  data, augment = config.data, config.augment
  return transforms.train_transform(
    data.image_size,
    data.crop,
    data.flip,
    augment.mixup_alpha,
    augment.cutmix,
    augment.rand_augment,
  )


def mixes(config: config_dict.ConfigDict) -> bool:
  """Returns whether training images are mixed in pairs."""
  return mixing.is_on(config.augment.mixup_alpha, config.augment.cutmix)


def _loader_options(config: config_dict.ConfigDict) -> dict[str, Any]:
  """Returns the options common to all loaders of this process."""
  return {
    'process_index': jax.process_index(),
    'process_count': jax.process_count(),
    'num_workers': config.data.num_workers,
    'worker_type': config.data.worker_type,
    'skip_corrupt': config.data.skip_corrupt,
  }


def train_batches(
  config: config_dict.ConfigDict, train_set: datasets.Dataset
) -> loaders.Batches:
  """Returns this process's endless stream of training batches."""
  return loaders.train_batches(
    train_set,
    batch_size=config.batch_size,
    transform=create_transform(config),
    partners=mixes(config),
    seed=config.seed,
    **_loader_options(config),
  )


def eval_batches(
  config: config_dict.ConfigDict, test_set: datasets.Dataset
) -> Iterable[train_step.Batch]:
  """Returns this process's batches of one pass over the test split."""
  return loaders.eval_batches(
    test_set,
    batch_size=config.eval_batch_size,
    transform=transforms.eval_transform(
      config.data.eval_image_size, config.data.eval_crop
    ),
    **_loader_options(config),
  )


def describe_data(
  train_set: datasets.Dataset, test_set: datasets.Dataset
) -> dict[str, Any]:
  """Returns the contents of `data.json`: name, splits, counts and classes.

  Raises a ValueError if the two splits have different classes.
  """
  names = list(train_set.class_names)
  if difference := workdirs.class_changes(names, list(test_set.class_names)):
    raise ValueError(
      f'{train_set.split} and {test_set.split} of {train_set.name} have '
      f'different classes: {difference}'
    )
  return {
    'name': train_set.name,
    'splits': {
      'train': {'split': train_set.split, 'count': len(train_set)},
      'test': {'split': test_set.split, 'count': len(test_set)}
      | ({'note': test_set.note} if test_set.note else {}),
    },
    'class_names': names,
  }


def create_net(
  config: config_dict.ConfigDict, num_classes: int
) -> hk.TransformedWithState:
  """Transforms the config's network.

  Returns:
    `init` and `apply` of `(images, is_training)`, and optionally of
    `image_index`, int32 `[B]`, indices in the global batch, and `standardized`,
    whether the parameters come from `models.fold`.

  Raises:
    ValueError: if the fields are those of a variant other than `model.name`, as
      when only the name is overridden.
  """
  overrides = {k: v for k, v in config.model.items() if k != 'name'}
  for name in variants.VARIANTS:
    if name != config.model.name and models.arguments(name) == overrides:
      raise ValueError(
        f'config.model is called {config.model.name}, but its fields are those '
        f'of {name}; choose the variant in the argument of the config file'
      )

  def forward(
    images: jax.Array,
    is_training: bool,
    image_index: jax.Array | None = None,
    standardized: bool = False,
  ) -> dict[str, jax.Array]:
    net = models.create(
      config.model.name,
      num_classes,
      remat=config.remat,
      standardized=standardized,
      **overrides,
    )
    return net(images, is_training, image_index)

  return hk.transform_with_state(forward)


def initial_hyperparams(
  config: config_dict.ConfigDict,
) -> train_step.Hyperparams:
  """Returns the learning rate and clipping thresholds, inputs of the step."""
  names = ('learning_rate_per_256', 'clipping', 'max_norm')
  fields = {name: config.optimizer.get(name) for name in names}
  return {name: np.float32(x) for name, x in fields.items() if x is not None}


def create_schedule(
  config: config_dict.ConfigDict,
  epoch_steps: float,
  hyperparams: train_step.Hyperparams | None = None,
) -> schedules.Schedule:
  """Builds the learning rate schedule; see `schedules.create_schedule`.

  `epoch_steps` may be fractional. `hyperparams` override those of the config
  and may be traced.
  """
  fields = {**config.optimizer, **(hyperparams or {})}
  return schedules.create_schedule(
    fields['schedule'],
    fields['learning_rate_per_256'] * config.batch_size / 256,
    fields['warmup_epochs'] * epoch_steps,
    schedules.count_steps(config.epochs, epoch_steps),
    end=fields['end_learning_rate'],
    decay_rate=fields['decay_rate'],
    decay_steps=fields['decay_epochs'] * epoch_steps,
  )


def create_optimizer(
  config: config_dict.ConfigDict,
  schedule: schedules.Schedule,
  hyperparams: train_step.Hyperparams | None = None,
) -> optax.GradientTransformation:
  """Builds the optimizer; see `optimizer.create_optimizer`.

  `hyperparams` override those of the config and may be traced.
  """
  fields = {**config.optimizer, **(hyperparams or {})}
  return optimizer.create_optimizer(
    fields['name'],
    schedule,
    momentum=fields['momentum'],
    weight_decay=fields['weight_decay'],
    decayed=fields['decayed'],
    clip=fields['clip'],
    clipping=fields['clipping'],
    clip_eps=fields['clip_eps'],
    unclipped=fields['unclipped'],
    max_norm=fields['max_norm'],
    learning_rate_groups=fields['learning_rate_groups'],
    skip_nonfinite=fields['skip_nonfinite'],
    depth=config.model.depth,
  )


def state_shapes(
  config: config_dict.ConfigDict, net: hk.TransformedWithState
) -> train_step.TrainState:
  """Returns the shapes and dtypes of the config's train state."""
  optimizer = create_optimizer(config, lambda step: 0.0)
  return train_step.state_shapes(net, optimizer, config.data.image_size)


def create_train_step(
  config: config_dict.ConfigDict,
  net: hk.TransformedWithState,
  num_classes: int,
  create_schedule: Callable[..., schedules.Schedule],
  micro_batches: int = 1,
) -> Callable[..., tuple[train_step.TrainState, train_step.Metrics]]:
  """Returns `train_step.train_step` with the arguments of the config.

  `create_schedule` maps hyperparameters to a schedule. To be mapped over
  `parallel.AXIS`: `step(state, batch, hyperparams) → (state, metrics)`.
  """
  return functools.partial(
    train_step.train_step,
    gradient=functools.partial(
      losses.loss_gradient,
      net=net,
      num_classes=num_classes,
      label_smoothing=config.label_smoothing,
      compute_dtype=config.compute_dtype,
    ),
    create_schedule=create_schedule,
    create_optimizer=lambda values: create_optimizer(
      config, create_schedule(values), values
    ),
    ema_decay=config.ema_decay,
    micro_batches=micro_batches,
    sam_rho=config.optimizer.sam_rho,
    sam_fraction=config.optimizer.sam_fraction,
    sam_per_device=config.optimizer.sam_per_device,
    axis_name=parallel.AXIS,
  )


def create_eval_step(
  config: config_dict.ConfigDict,
  net: hk.TransformedWithState,
  micro_batches: int = 1,
) -> Callable[..., dict[str, train_step.Metrics]]:
  """Returns `eval_step.eval_step` with the arguments of the config.

  To map over `parallel.AXIS`: `step(state, batch) → sums`.
  """
  return functools.partial(
    eval_step.eval_step,
    net=net,
    micro_batches=micro_batches,
    compute_dtype=config.eval_dtype,
    axis_name=parallel.AXIS,
  )
