"""Evaluation of a state on a data set, each image once."""

import collections
import contextlib
import math
import pathlib
from collections.abc import Callable, Iterable

import jax
from ml_collections import config_dict

from nfnets_jax import paths, weights
from nfnets_jax.runtime import checkpoint, parallel
from nfnets_jax.runtime import workdir as workdirs
from nfnets_jax.training import build, check, init_from, programs, train_step


def evaluate(
  eval_step: Callable,
  state: train_step.TrainState,
  batches: Iterable[train_step.Batch],
) -> dict[str, float]:
  """Averages the loss and the hits over all images.

  Args:
    eval_step: compiled evaluation step over all devices.
    state: replicated; both current and averaged parameters are evaluated.
    batches: this process's batches, with `image`, `label` and `mask`.

  Returns:
    `eval_loss` in nats, `eval_top_1` and `eval_top_5` as fractions, the same
    with the prefix `ema_`, and `eval_count`, the number of images.

  Raises:
    ValueError: if there are no batches.
    FloatingPointError: if a loss is not finite.
  """
  in_flight: collections.deque = collections.deque()
  sums = []
  for batch in batches:
    in_flight.append(eval_step(state, parallel.shard(batch)))
    # Two batches in flight keep the devices busy and bound the memory.
    if len(in_flight) > 2:
      sums.append(jax.device_get(in_flight.popleft()))
  sums.extend(jax.device_get(list(in_flight)))
  if not sums:
    raise ValueError('there is nothing to evaluate: the split has no batches')
  # Python floats: float32 would lose digits of a long sum.
  totals = jax.tree.map(lambda *xs: sum(map(float, xs)), *sums)
  results: dict[str, float] = {'eval_count': int(totals['eval']['count'])}
  for prefix, total in totals.items():
    for name in ('loss', 'top_1', 'top_5'):
      results[f'{prefix}_{name}'] = total[name] / total['count']
    if not math.isfinite(total['loss']):
      raise FloatingPointError(f'{prefix}_loss is {total["loss"]}')
  return results


def evaluate_checkpoint(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path,
  allow_config_change: bool = False,
) -> dict[str, float]:
  """Evaluates a run's newest checkpoint, or `init_from`, on its test split.

  Evaluation fields such as `data.eval_image_size` may differ from training, and
  class names with `allow_config_change`. `init_from` needs no `workdir`.

  Returns:
    As `evaluate`, and `num_classes`.

  Raises:
    FileNotFoundError: if there is no checkpoint.
    ValueError: if the config is invalid, or the classes differ from training.
  """
  workdir = paths.expand_literal(workdir, '--workdir')
  check.check_config(config, jax.device_count())
  directory = workdir / 'checkpoints'
  if config.init_from is None and not directory.is_dir():
    raise FileNotFoundError(
      f'there is no run to evaluate in {workdir}; train first, or give '
      '--config.init_from=FILE'
    )
  if config.init_from is not None:
    weights.locate(config.init_from, config.model.name, 'config.init_from')
  if config.data.prepare:
    build.load_data(config)
  test_set = build.load_split(config, config.data.test_split)
  names = {'class_names': list(test_set.class_names)}
  if config.init_from is None:
    workdirs.check_data(workdir, names, allow_config_change)
  net = build.create_net(config, test_set.num_classes)
  optimizer = build.create_optimizer(config, lambda step: 0.0)
  size = config.data.image_size
  if config.init_from is not None:
    loaded = init_from.read_weights(config)
    if loaded.num_classes != test_set.num_classes:
      raise ValueError(
        f'init_from holds weights for {loaded.num_classes} classes, and '
        f'{config.data.name} has {test_set.num_classes}; train first'
      )
    if loaded.class_names is not None:
      workdirs.compare_data(
        config.init_from,
        {'class_names': list(loaded.class_names)},
        names,
        allow_config_change,
      )
    state = train_step.init_state(net, optimizer, config.seed, size)
    state = init_from.merge(state, loaded, test_set.num_classes)
    state = parallel.replicate(state)
  else:
    shapes = train_step.state_shapes(net, optimizer, size)  # no initialisation
    checkpoints = checkpoint.Checkpointer(directory, config.keep_checkpoints)
    with contextlib.closing(checkpoints):
      state, _ = checkpoints.restore(shapes)
  eval_step = programs.compile_eval_step(config, net, state)
  results = evaluate(eval_step, state, build.eval_batches(config, test_set))
  return {**results, 'num_classes': test_set.num_classes}
