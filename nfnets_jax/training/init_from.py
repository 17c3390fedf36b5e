"""Initialises a run from existing weights."""

import contextlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from nfnets_jax import models, paths, weights
from nfnets_jax.models import variants
from nfnets_jax.runtime import checkpoint, parallel, progress
from nfnets_jax.runtime import workdir as workdirs
from nfnets_jax.training import build, train_step
from nfnets_jax.weights import recognize, table


def check_model(loaded: weights.Weights, model: config_dict.ConfigDict) -> None:
  """Raises a ValueError unless weights are of the config's network."""
  if loaded.name != model.name:
    raise ValueError(
      f'init_from holds weights of {loaded.name}, and the config is for '
      f'{model.name}'
    )
  stored = {**models.arguments(loaded.name), **loaded.overrides}
  problems = [
    f'model.{field} is {_plain(model[field])!r}, and theirs {_plain(value)!r}'
    for field, value in stored.items()
    if field not in table.REGULARISATION
    and _plain(model[field]) != _plain(value)
  ]
  if problems:
    raise ValueError(
      f'init_from holds weights of another {loaded.name}:\n  '
      + '\n  '.join(problems)
    )


def _plain(value: Any) -> Any:
  return tuple(value) if isinstance(value, list | tuple) else value


def recorded_facts(
  workdir: pathlib.Path, config: config_dict.ConfigDict, num_classes: int
) -> dict[str, Any]:
  """Returns `image_size`, `crop` and `class_names` recorded in a run.

  Old runs lack `data.json`; their `class_names` are None. Raises a ValueError
  if it is corrupt or does not have `num_classes` names.
  """
  data = workdirs.read_data(workdir)
  names = None if data is None else data['class_names']
  if names is not None and len(names) != num_classes:
    raise ValueError(
      f'{workdir}/data.json names {len(names)} classes, and the checkpoint has '
      f'{num_classes}; they are not of the same run'
    )
  return {
    'image_size': config.data.get('eval_image_size'),
    'crop': config.data.get('eval_crop'),
    'class_names': None if names is None else tuple(names),
  }


def merge(
  state: train_step.TrainState,
  loaded: weights.Weights,
  num_classes: int,
  new_head: bool = False,
) -> train_step.TrainState:
  """Loads weights into an initial state and prints what is new.

  The weights become the parameters and their averages. The classifier stays as
  initialised if its number of classes differs, or with `new_head`. Raises a
  ValueError that lists any other difference.
  """
  head = f'{table.ROOTS[variants.get(loaded.name).family]}/~/linear'
  new_head = new_head or loaded.num_classes != num_classes
  params = dict(loaded.params)
  if new_head:
    params[head] = jax.device_get(state.params[head])
  expected = (state.params, state.model_state)
  problems = table.compare(
    _shapes(params) | _shapes(loaded.state, 'state: '),
    _shapes(expected[0]) | _shapes(expected[1], 'state: '),
  )
  table.check_empty(problems, 'this run')
  progress.say(
    f'starts from {loaded.name} with '
    f'{sum(x.size for v in loaded.params.values() for x in v.values()):,} '
    'parameters'
    + (
      f'; new: {head}, for {num_classes} classes instead of '
      f'{loaded.num_classes}'
      if loaded.num_classes != num_classes
      else f'; new: {head}, for {num_classes} classes'
      if new_head
      else f'; kept: {head}, of {num_classes} classes as well '
      '(init_new_head=True makes it new)'
    )
  )
  params, model_state = jax.tree.map(jnp.asarray, (params, dict(loaded.state)))
  copy = jax.tree.map(jnp.copy, (params, model_state))
  return state._replace(
    params=params,
    model_state=model_state,
    ema_params=copy[0],
    ema_model_state=copy[1],
  )


def _shapes(
  tree: Mapping[str, Mapping[str, Any]], prefix: str = ''
) -> dict[str, tuple[int, ...]]:
  return {
    f'{prefix}{module} {leaf}': tuple(np.shape(x))
    for module, leaves in tree.items()
    for leaf, x in leaves.items()
  }


def read_weights(config: config_dict.ConfigDict) -> weights.Weights:
  """Returns the weights that `config.init_from` names.

  A ValueError means corrupt or of another network, an OSError unreadable.
  """
  source, name = config.init_from, config.model.name
  path = weights.fetch(source, name, 'init_from')
  if source == 'released':
    loaded = weights.read(path, name)
  elif path.is_dir():
    loaded = load_average(path)
  else:
    arguments = models.arguments(name)
    overrides = {
      field: value
      for field, value in config.model.items()
      if field != 'name' and value != arguments[field]
    }
    loaded = weights.read(path, name, **overrides)
  check_model(loaded, config.model)
  return loaded


def load_average(workdir: str | pathlib.Path) -> weights.Weights:
  """Returns the averaged weights of a run's newest checkpoint, on the host.

  They include the run's evaluation size, crop and, if recorded, class names.

  Raises:
    FileNotFoundError: if there is no run or no checkpoint.
    ValueError: if all checkpoints or the recorded data are corrupt.
  """
  workdir = paths.existing(workdir, 'workdir', 'folder')
  recognize.check_folder(workdir, 'workdir')
  text = (workdir / 'config.json').read_text()
  config = config_dict.ConfigDict(json.loads(text))
  checkpoints = checkpoint.Checkpointer(
    workdir / 'checkpoints', config.keep_checkpoints
  )
  with contextlib.closing(checkpoints):
    # The classifier: gates of the same name are nested deeper.
    (num_classes,) = checkpoints.shape_of('Net/~/linear.b')
    net = build.create_net(config, num_classes)
    optimizer = build.create_optimizer(config, lambda step: 0.0)
    state, _ = checkpoints.restore(
      train_step.state_shapes(net, optimizer, config.data.image_size)
    )
  params, model_state = jax.device_get(
    jax.tree.map(parallel.local_copy, (state.ema_params, state.ema_model_state))
  )
  default = models.arguments(config.model.name)
  args = {k: v for k, v in config.model.to_dict().items() if k != 'name'}
  args = {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}
  overrides = {k: v for k, v in args.items() if v != default[k]}
  return weights.Weights(
    config.model.name,
    params,
    model_state,
    overrides,
    **recorded_facts(workdir, config, num_classes),
  )
