"""Evaluation of a state on a data set, each image once."""

import collections
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from nfnets_jax import paths
from nfnets_jax.data import folder, labels
from nfnets_jax.runtime import parallel, progress
from nfnets_jax.training import (
  build,
  check,
  eval_state,
  metrics,
  programs,
  published,
  train_step,
)

_PROGRESS_SECONDS = 10.0

# TFDS declares 1,000 classes for these, and they have images of 200.
_SPARSE = ('imagenet_a', 'imagenet_r')

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
  workdir: paths.PathLike,
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
  workdir: paths.PathLike,
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
  eval_state.locate(config, workdir)
  sets = None if label_sets is None else labels.read_label_sets(label_sets)
  if config.init_from is not None and config.data.test_split is None:
    config.data.test_split = _split_for_weights(config)
  if config.data.prepare:
    build.load_data(config)
  test_set = build.load_split(config, config.data.test_split)
  if test_set.note:
    progress.say(test_set.note)
  if test_set.name.partition('/')[0] in _SPARSE and config.data.classes is None:
    progress.say(
      f'{test_set.name} has images of 200 classes; published figures are of '
      'predictions among these, as with --config.data.classes=present'
    )
  config.eval_batch_size = min(
    config.eval_batch_size, _round_up(len(test_set), jax.device_count())
  )
  loaded = eval_state.load(config, workdir)
  label_map = eval_state.match_classes(loaded, test_set, allow_config_change)
  num_images, set_size = len(test_set), None
  if sets is not None:
    test_set = labels.with_label_sets(test_set, sets, label_map)
    set_size = len(test_set.source[0]['label_set'])
  if loaded.is_run:
    programs.keep_compiled(config, workdir)
  eval_step = programs.compile_eval_step(
    config,
    build.create_net(config, loaded.num_classes),
    loaded.state,
    label_sets=set_size,
    label_map=label_map,
    average=loaded.is_run,
    per_image=True,
  )
  began = time.monotonic()
  batches = build.eval_batches(config, test_set)
  outputs = list(
    _watched(_outputs(eval_step, loaded.state, batches), num_images)
  )
  seconds = time.monotonic() - began
  images = _gather(outputs)
  results = _average(outputs)
  if not loaded.is_run:
    for name in ('loss', 'top_1', 'top_5'):
      results[f'ema_eval_{name}'] = results[f'eval_{name}']
  about = {
    'model': config.model.name,
    'weights': loaded.source,
    'step': loaded.step,
    'data': test_set.name,
    'data_dir': config.data.data_dir,
    'split': test_set.split,
    'label_sets': None if label_sets is None else str(label_sets),
    'classes': test_set.num_classes,
    'classes_of_net': loaded.num_classes,
    'image_size': config.data.eval_image_size,
    'crop': config.data.eval_crop,
    'images': results['eval_count'],
    'skipped': num_images - int(results['eval_count']),
    'dtype': config.eval_dtype,
    'devices': jax.device_count(),
    'device': jax.devices()[0].device_kind,
    'images_per_second': results['eval_count'] / seconds,
  }
  figures = []
  if loaded.is_foreign and test_set.name != 'fake':
    figures = published.accuracies(
      config.model.name,
      published.identify(test_set.num_classes, num_images, sets is not None),
    )
  return Evaluation(
    {**results, 'num_classes': test_set.num_classes},
    about,
    images,
    test_set.class_names,
    figures,
  )


def _split_for_weights(config: config_dict.ConfigDict) -> str | None:
  """Returns the split to evaluate weights on that were not trained here."""
  name, data_dir = config.data.name, config.data.data_dir
  if name != 'folder':
    return 'validation'
  if data_dir is None:
    return None  # loading names what is missing
  if (split := folder.find_test_split(data_dir)) is not None:
    return split
  progress.say(
    f'{data_dir} has no test split: all its images are evaluated; those that '
    'training holds out are --config.data.test_split=test'
  )
  return 'all'


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
