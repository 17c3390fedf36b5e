"""Evaluation of a state on a data set, each image once."""

import collections
import contextlib
import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from nfnets_jax import paths, weights
from nfnets_jax.data import datasets, labels
from nfnets_jax.runtime import checkpoint, parallel, progress
from nfnets_jax.runtime import workdir as workdirs
from nfnets_jax.training import (
  build,
  check,
  init_from,
  metrics,
  programs,
  published,
  train_step,
)

_PROGRESS_SECONDS = 10.0

Outputs = dict[str, Any]


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
  return _average(list(_outputs(eval_step, state, batches)))


def _outputs(
  eval_step: Callable,
  state: train_step.TrainState,
  batches: Iterable[train_step.Batch],
) -> Iterator[Outputs]:
  """Yields the outputs of each batch, on the host."""
  in_flight: collections.deque = collections.deque()
  for batch in batches:
    in_flight.append(eval_step(state, parallel.shard(batch)))
    # Two batches in flight keep the devices busy and bound the memory.
    if len(in_flight) > 2:
      yield jax.device_get(in_flight.popleft())
  yield from jax.device_get(list(in_flight))


def _average(sums: list[Outputs]) -> dict[str, float]:
  if not sums:
    raise ValueError('there is nothing to evaluate: the split has no batches')
  # Python floats: float32 would lose digits of a long sum.
  totals = jax.tree.map(lambda *xs: sum(map(float, xs)), *sums)
  count = int(totals['eval']['count'])
  if not count:
    raise ValueError('there is nothing to evaluate: no image counts')
  results: dict[str, float] = {'eval_count': count}
  for prefix, total in totals.items():
    for name in ('loss', 'top_1', 'top_5'):
      results[f'{prefix}_{name}'] = total[name] / total['count']
    if not math.isfinite(total['loss']):
      raise FloatingPointError(f'{prefix}_loss is {total["loss"]}')
  return results


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The evaluation of a run or of weights on a test split.

  Attributes:
    results: as returned by `evaluate_checkpoint`.
    about: model, weights, step, data, split, image_size, crop, dtype, devices
      and the like; only strings, numbers and None.
    images: for 'eval' and, of a run, 'ema_eval': arrays of all images, in the
      order of the split, as documented in `eval_step`.
    class_names: names of the evaluated classes.
    published: accuracies of the released weights on this data set.
  """

  results: dict[str, float]
  about: dict[str, Any]
  images: dict[str, dict[str, np.ndarray]]
  class_names: tuple[str, ...]
  published: list[published.Accuracy]

  def calibration_error(self, prefix: str) -> float:
    """Returns the expected calibration error; see `metrics`."""
    images = self.images[prefix]
    return metrics.calibration_error(images['confidence'], images['hit'])


def evaluate_checkpoint(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path,
  allow_config_change: bool = False,
) -> dict[str, float]:
  """Evaluates a run's newest checkpoint, or `init_from`, on its test split.

  As `evaluate_in_detail`, whose `results` it returns.

  Returns:
    As `evaluate`, and `num_classes`. Weights of `init_from` are their own
    average.
  """
  return evaluate_in_detail(config, workdir, allow_config_change).results


def evaluate_in_detail(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path,
  allow_config_change: bool = False,
  label_sets: str | os.PathLike[str] | None = None,
) -> Evaluation:
  """Evaluates a run's newest checkpoint, or `init_from`, on its test split.

  Evaluation fields such as `data.eval_image_size` may differ from training.
  `init_from` needs no `workdir`, and nothing is written there. Images that
  belong to some of the net's classes are classified among these.

  Args:
    config: its `batch_size` and `micro_batches` are not used, and
      `eval_batch_size` is rounded up to a multiple of the devices.
    workdir: folder of the run.
    allow_config_change: whether class names may differ.
    label_sets: ReaL's `real.json`, for ImageNet's validation images: a
      prediction hits if it is any of an image's labels. Images without labels
      are skipped, and the loss is that of ImageNet's own label.

  Raises:
    FileNotFoundError: if there is no checkpoint.
    ValueError: if the config is invalid, or the net has not all classes of the
      data.
  """
  workdir = paths.expand_literal(workdir, '--workdir')
  config = _fit_to_devices(config, jax.device_count())
  check.check_config(config, jax.device_count())
  directory = workdir / 'checkpoints'
  if config.init_from is None and not directory.is_dir():
    raise FileNotFoundError(
      f'there is no run to evaluate in {workdir}; train first, or give '
      '--config.init_from=FILE'
    )
  if config.init_from is not None:
    weights.locate(config.init_from, config.model.name, 'config.init_from')
  sets = None if label_sets is None else labels.read_label_sets(label_sets)
  if config.data.prepare:
    build.load_data(config)
  test_set = build.load_split(config, config.data.test_split)
  config.eval_batch_size = min(
    config.eval_batch_size, _round_up(len(test_set), jax.device_count())
  )
  if config.init_from is None:
    state, num_classes = _restore(config, directory)
    data = workdirs.read_data(workdir)
    names = None if data is None else tuple(data['class_names'])
    source = workdir
  else:
    loaded = init_from.read_weights(config)
    state, num_classes = _state(loaded), loaded.num_classes
    names, source = loaded.class_names, config.init_from
    if directory.is_dir():
      progress.say(f'evaluates init_from={source}, not the run in {workdir}')
  label_map = _label_map(
    test_set, names, num_classes, source, allow_config_change
  )
  num_images, set_size = len(test_set), None
  if sets is not None:
    test_set = labels.with_label_sets(test_set, sets, label_map)
    set_size = len(test_set.source[0]['label_set'])
  average = config.init_from is None
  eval_step = programs.compile_eval_step(
    config,
    build.create_net(config, num_classes),
    state,
    label_sets=set_size,
    label_map=label_map,
    average=average,
    per_image=True,
  )
  began = time.monotonic()
  outputs = list(
    _watched(
      _outputs(eval_step, state, build.eval_batches(config, test_set)),
      num_images,
    )
  )
  seconds = time.monotonic() - began
  images = _gather(outputs)
  results = _average(outputs)
  if not average:
    for name in ('loss', 'top_1', 'top_5'):
      results[f'ema_eval_{name}'] = results[f'eval_{name}']
  set_name = None
  if num_classes == 1000:  # else not ImageNet's classes
    set_name = published.test_set(
      test_set.num_classes, num_images, sets is not None
    )
  about = {
    'model': config.model.name,
    'weights': str(source),
    'step': int(parallel.local_copy(state.step)) if average else None,
    'data': config.data.name,
    'split': test_set.split,
    'label_sets': None if label_sets is None else str(label_sets),
    'classes': test_set.num_classes,
    'classes_of_net': num_classes,
    'image_size': config.data.eval_image_size,
    'crop': config.data.eval_crop,
    'images': results['eval_count'],
    'skipped': num_images - int(results['eval_count']),
    'dtype': config.eval_dtype,
    'devices': jax.device_count(),
    'device': jax.devices()[0].device_kind,
    'images_per_second': results['eval_count'] / seconds,
  }
  foreign = not average and names is None  # as released or as in timm
  return Evaluation(
    {**results, 'num_classes': test_set.num_classes},
    about,
    images,
    test_set.class_names,
    published.accuracies(config.model.name, set_name) if foreign else [],
  )


def _round_up(number: int, divisor: int) -> int:
  return -(-number // divisor) * divisor


def _fit_to_devices(
  config: config_dict.ConfigDict, devices: int
) -> config_dict.ConfigDict:
  """Returns a copy whose batch sizes suit these devices, for evaluation."""
  config = config.copy_and_resolve_references()
  if config.eval_batch_size > 0:
    config.eval_batch_size = _round_up(config.eval_batch_size, devices)
  config.batch_size = devices
  config.micro_batches = None
  return config


def _restore(
  config: config_dict.ConfigDict, directory: pathlib.Path
) -> tuple[train_step.TrainState, int]:
  """Returns the newest checkpoint's state and number of classes."""
  checkpoints = checkpoint.Checkpointer(directory, config.keep_checkpoints)
  with contextlib.closing(checkpoints):
    # The classifier: gates of the same name are nested deeper.
    (num_classes,) = checkpoints.shape_of('Net/~/linear.b')
    net = build.create_net(config, num_classes)
    optimizer = build.create_optimizer(config, lambda step: 0.0)
    state, _ = checkpoints.restore(
      train_step.state_shapes(net, optimizer, config.data.image_size)
    )
  return state, num_classes


def _state(loaded: weights.Weights) -> train_step.TrainState:
  """Returns a replicated state of weights alone."""
  state = train_step.TrainState(
    step=np.int32(0),
    key=np.zeros(2, np.uint32),
    params=dict(loaded.params),
    model_state=dict(loaded.state),
    opt_state=(),
    ema_params={},
    ema_model_state={},
  )
  return parallel.replicate(state)


def _label_map(
  test_set: datasets.Dataset,
  names: tuple[str, ...] | None,
  num_classes: int,
  source: str | pathlib.Path,
  allow_change: bool,
) -> np.ndarray | None:
  """Returns the net's output for each label; None if they are the same."""
  count = test_set.num_classes
  # Nets of 1,000 unnamed classes are ImageNet's.
  unknown = names is None and num_classes != 1000
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


def _watched(outputs: Iterator[Outputs], total: int) -> Iterator[Outputs]:
  """Prints the progress now and then."""
  began = shown = time.monotonic()
  done = 0
  for output in outputs:
    yield output
    done += int(output['eval']['count'])
    now = time.monotonic()
    if now - shown >= _PROGRESS_SECONDS:
      shown = now
      progress.say(
        f'{done:,} of {total:,} images, {done / (now - began):,.1f} images/s'
      )


def _gather(outputs: list[Outputs]) -> dict[str, dict[str, np.ndarray]]:
  """Moves the arrays of images out of the outputs, without the padding."""
  parts = [output.pop('images') for output in outputs]
  if not parts:
    return {}
  whole = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
  return {
    name: {key: x[whole[name]['mask']] for key, x in whole[name].items()}
    for name in ('eval', 'ema_eval')
    if name in whole
  }
