"""The state to evaluate, of a run or of weights, and its classes."""

import dataclasses
from typing import Any

import numpy as np
from ml_collections import config_dict

from nfnets_jax import paths, weights
from nfnets_jax.data import datasets, labels
from nfnets_jax.runtime import parallel, progress
from nfnets_jax.runtime import workdir as workdirs
from nfnets_jax.training import init_from, train_step

_IMAGENET_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class EvalState:
  """What is evaluated.

  Attributes:
    state: replicated; of weights, without averages and optimizer.
    num_classes: outputs of the net.
    class_names: None if unknown.
    source: the folder of the run, or `init_from`.
    is_run: whether there are averages to evaluate as well.
  """

  state: train_step.TrainState
  num_classes: int
  class_names: tuple[str, ...] | None
  source: str
  is_run: bool

  @property
  def step(self) -> int | None:
    """Number of updates made, None for weights."""
    return int(parallel.local_copy(self.state.step)) if self.is_run else None

  @property
  def is_foreign(self) -> bool:
    """Whether these may be the authors' weights: ImageNet's, not from here."""
    unnamed = self.class_names is None
    return not self.is_run and unnamed and self.num_classes == _IMAGENET_CLASSES


def locate(config: config_dict.ConfigDict, workdir: paths.Path) -> None:
  """Raises a FileNotFoundError or ValueError if there is nothing to load."""
  if config.init_from is not None:
    weights.locate(config.init_from, config.model.name, 'config.init_from')
  elif not (workdir / 'checkpoints').is_dir():
    raise FileNotFoundError(
      f'there is no run to evaluate in {workdir}; train first, or give '
      '--config.init_from=FILE'
    )


def load(config: config_dict.ConfigDict, workdir: paths.Path) -> EvalState:
  """Loads `config.init_from`, or the newest checkpoint of the run."""
  if config.init_from is None:
    state, num_classes = init_from.restore(config, workdir)
    data = workdirs.read_data(workdir)
    names = None if data is None else tuple(data['class_names'])
    return EvalState(state, num_classes, names, str(workdir), True)
  if (workdir / 'checkpoints').is_dir():
    progress.say(
      f'evaluates init_from={config.init_from}, not the run in {workdir}'
    )
  loaded = init_from.read_weights(config)
  fields: dict[str, Any] = {
    'step': np.int32(0),
    'key': np.zeros(2, np.uint32),
    'params': dict(loaded.params),
    'model_state': dict(loaded.state),
    'opt_state': (),
    'ema_params': {},
    'ema_model_state': {},
  }
  return EvalState(
    parallel.replicate(train_step.TrainState(**fields)),
    loaded.num_classes,
    loaded.class_names,
    config.init_from,
    False,
  )


def match_classes(
  loaded: EvalState, test_set: datasets.Dataset, allow_change: bool = False
) -> np.ndarray | None:
  """Returns the net's output for each label of a test set.

  Args:
    loaded: if it has no class names, 1,000 classes are taken for ImageNet's.
    test_set: some or all of the classes, in any order.
    allow_change: whether other class names are taken for the same classes.

  Returns:
    int `[K]`, or None if labels are outputs.

  Raises:
    ValueError: if the net lacks a class.
  """
  source, num_classes = loaded.source, loaded.num_classes
  names, count = loaded.class_names, test_set.num_classes
  # Nets of 1,000 unnamed classes are ImageNet's.
  unknown = names is None and num_classes != _IMAGENET_CLASSES
  if count > num_classes or (unknown and count != num_classes):
    raise ValueError(
      f'{source} holds weights for {num_classes} classes, and {test_set.name} '
      f'has {count}; train first'
    )
  if unknown or names == test_set.class_names:
    return None
  try:
    label_map = labels.label_map(test_set.class_names, names)
  except ValueError as error:
    if count != num_classes or (names is None and not allow_change):
      raise ValueError(f'{test_set.name} and {source}: {error}') from error
    workdirs.compare_data(
      source,
      {'class_names': list(names or ())},
      {'class_names': list(test_set.class_names)},
      allow_change,
    )
    return None
  if count < num_classes:
    progress.say(
      f'{test_set.name} has {count} of the {num_classes} classes of {source}; '
      'images are classified among these'
    )
  elif not np.array_equal(label_map, np.arange(count)):
    progress.say(
      f'the classes of {source} are in another order; matched by name'
    )
  else:
    return None
  return label_map
