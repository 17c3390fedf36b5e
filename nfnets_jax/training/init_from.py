"""Initialises a run from existing weights."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from nfnets_jax import models, paths, weights
from nfnets_jax.data import imagenet
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
  workdir: paths.Path, config: config_dict.ConfigDict, num_classes: int
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


def initialize(
  config: config_dict.ConfigDict,
  state: train_step.TrainState,
  class_names: Sequence[str],
) -> train_step.TrainState:
  """Loads `config.init_from` into an initial state; see `merge`.

  `class_names` are those of the data.
  """
  loaded = read_weights(config)
  new_head, reason = choose_head(loaded, class_names, config.init_new_head)
  return merge(state, loaded, len(class_names), new_head, reason)


def choose_head(
  loaded: weights.Weights, class_names: Sequence[str], choice: bool | None
) -> tuple[bool, str]:
  """Returns whether the classifier is to be new, and why.

  With `choice` None, as `config.init_new_head`, it is new unless the weights
  are known to have the classes of the data. Weights that record no class names
  are taken to have those of ImageNet if there are 1000.

  Raises:
    ValueError: if `choice` is False and the numbers of classes differ.
  """
  theirs, ours = loaded.num_classes, len(class_names)
  if theirs != ours:
    if choice is False:
      raise ValueError(
        f'init_new_head=False keeps the classifier, which has {theirs} '
        f'classes; the data have {ours}'
      )
    return True, f'it had {theirs} classes, and the data have {ours}'
  if choice is not None:
    return choice, f'init_new_head is {choice}'
  names = loaded.class_names
  if names is None and theirs != 1000:
    return True, (
      'the weights record no class names; init_new_head=False keeps it'
    )
  ids_and_names = imagenet.classes()
  known = ids_and_names[0] if names is None else tuple(names)
  given = tuple(class_names)
  if known == given or (known in ids_and_names and given in ids_and_names):
    return (
      False,
      f'the {ours} classes are the same; init_new_head=True resets it',
    )
  changes = workdirs.class_changes(list(known), list(given))
  return True, f'the classes differ: {changes}; init_new_head=False keeps it'


def merge(
  state: train_step.TrainState,
  loaded: weights.Weights,
  num_classes: int,
  new_head: bool = False,
  reason: str = '',
) -> train_step.TrainState:
  """Loads weights into an initial state, and prints what is kept.

  The weights become the parameters and their averages. With `new_head`, for the
  `reason` to print, the classifier stays as initialised. Raises a ValueError
  that lists all differences in shape.
  """
  head = f'{table.ROOTS[variants.get(loaded.name).family]}/~/linear'
  params = dict(loaded.params)
  if new_head:
    params[head] = jax.device_get(state.params[head])
  expected = (state.params, state.model_state)
  problems = table.compare(
    _shapes(params) | _shapes(loaded.state, 'state: '),
    _shapes(expected[0]) | _shapes(expected[1], 'state: '),
  )
  table.check_empty(problems, 'this run')
  count = sum(x.size for v in loaded.params.values() for x in v.values())
  progress.say(
    f'initialised from {loaded.name} with {count:,} parameters; '
    f'{"new" if new_head else "kept"} classifier of {num_classes} classes'
    + f' ({reason})'
    * bool(reason)
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


def restore(
  config: config_dict.ConfigDict, workdir: paths.Path
) -> tuple[train_step.TrainState, int]:
  """Returns the state of a run's newest checkpoint and its number of classes.

  Raises a FileNotFoundError if there is no checkpoint, and a ValueError if all
  are corrupt or of another net.
  """
  checkpoints = checkpoint.Checkpointer(
    workdir / 'checkpoints', config.keep_checkpoints
  )
  with contextlib.closing(checkpoints):
    # The classifier: gates of the same name are nested deeper.
    (num_classes,) = checkpoints.shape_of('Net/~/linear.b')
    net = build.create_net(config, num_classes)
    state, _ = checkpoints.restore(build.state_shapes(config, net))
  return state, num_classes


def load_average(workdir: paths.PathLike) -> weights.Weights:
  """Returns the averaged weights of a run's newest checkpoint, on the host.

  They include the run's evaluation size, crop and, if recorded, class names.

  Raises:
    FileNotFoundError: if there is no run or no checkpoint.
    ValueError: if all checkpoints or the recorded data are corrupt.
  """
  if paths.in_bucket(workdir):
    workdir = paths.expand(workdir, 'workdir')
  else:
    workdir = paths.existing(workdir, 'workdir', 'folder')
  recognize.check_folder(workdir, 'workdir')
  config = config_dict.ConfigDict(workdirs.read_config(workdir))
  state, num_classes = restore(config, workdir)
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
