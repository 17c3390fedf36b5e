"""Compile-time estimates of the memory and speed of a run's steps.

The figures come from the target's compiler, or follow from them and the
device's peak rates; nothing runs. The steps are those of the training loop.
"""

import importlib.metadata
import sys
from typing import Any

import jax
from ml_collections import config_dict

from nfnets_jax import topologies
from nfnets_jax.data import imagenet
from nfnets_jax.training import (
  build,
  check,
  figures,
  fit,
  programs,
  sam,
)
from nfnets_jax.training import config as configs

# ImageNet classes and training images, used if the data set is missing.
_IMAGENET = (1000, imagenet.SPLITS['train'])


def measure(
  config: config_dict.ConfigDict,
  topology: topologies.Topology,
  memory: int | None = None,
  evaluation: bool = True,
  data: tuple[int, int] | None = None,
) -> tuple[dict[str, Any], str | None]:
  """Compiles the steps of a config and returns their estimates.

  Args:
    config: config of a run.
    topology: from `topologies.get`.
    memory: usable bytes per device; the topology's if None.
    evaluation: whether to compile the evaluation step too.
    data: number of classes and training examples; from the data set if None.

  Returns:
    JSON-serialisable figures, and the HLO text of the training step, None if it
    does not fit. If a step does not fit, `fits` is false, `reason` explains it
    and, for training, `remedy` has the `micro_batches` and `remat` that fit.

  Raises:
    ValueError: if the config is invalid or the device's memory is unknown.
  """
  memory = topology.memory if memory is None else memory
  if memory is None:
    raise ValueError(
      f'the memory of {topology.name} devices is unknown; give --memory'
    )
  count = len(topology.devices)
  check.check_config(config, count)
  num_classes, examples = data or _count_data(config)
  config = configs.derive(config, examples, count)
  check.check_batch(config, count)
  epoch_steps = examples / config.batch_size
  result = _describe(config, topology, memory)
  try:
    fitted = fit_training(config, topology, memory, num_classes, epoch_steps)
  except fit.TooLargeError as error:
    remedy = _remedy(config, topology, memory, num_classes, epoch_steps, error)
    result |= {'fits': False, 'reason': error.reason, 'remedy': remedy}
    return result | {'micro_batches': config.micro_batches}, None
  text = fitted.compiled.as_text() or ''
  training = _figures(fitted, text, topology, config, evaluation=False)
  result |= {
    'fits': True,
    'micro_batches': fitted.parts,
    'refused': fitted.refused,
    'training': training,
  }
  if training['seconds']:
    speed = config.batch_size / training['seconds']
    days = config.epochs * examples / speed / 86400
    result |= {'images_per_second': speed, 'days': days}
    result['epochs'] = config.epochs
  if evaluation:
    result |= _measure_evaluation(config, topology, memory, num_classes)
  return result, text


def _measure_evaluation(
  config: config_dict.ConfigDict,
  topology: topologies.Topology,
  memory: int,
  num_classes: int,
) -> dict[str, Any]:
  try:
    fitted = fit_evaluation(config, topology, memory, num_classes)
  except fit.TooLargeError as error:
    return {'fits': False, 'reason': str(error)}
  text = fitted.compiled.as_text() or ''
  return {
    'evaluation': _figures(fitted, text, topology, config, evaluation=True)
  }


def _describe(
  config: config_dict.ConfigDict, topology: topologies.Topology, memory: int
) -> dict[str, Any]:
  """Returns what is compiled, and for what."""
  compiler = f'jax {jax.__version__}'
  if topology.platform == 'tpu' and topology.name != 'local':
    compiler += f', libtpu {importlib.metadata.version("libtpu")}'
  count = len(topology.devices)
  return {
    'model': config.model.name,
    'topology': topology.name,
    'platform': topology.platform,
    'devices': count,
    'batch_size': config.batch_size,
    'per_device_batch': config.batch_size // count,
    'image_size': config.data.image_size,
    'compute_dtype': config.compute_dtype,
    'eval_dtype': config.eval_dtype,
    'remat': config.remat,
    'device_memory': memory,
    'usable_memory': round(fit.USABLE * memory),
    'compiler': compiler,
  }


def _count_data(config: config_dict.ConfigDict) -> tuple[int, int]:
  """Returns the numbers of classes and of training examples."""
  try:
    if config.data.prepare:
      build.load_data(config)
    train_set = build.load_split(config, config.data.train_split)
  except FileNotFoundError:
    if config.data.name != 'imagenet2012' or config.data.classes is not None:
      raise
    _log(f'{config.data.name} is not prepared: using its published size')
    return _IMAGENET
  return train_set.num_classes, len(train_set)


def fit_training(
  config: config_dict.ConfigDict,
  topology: topologies.Topology,
  memory: int | None,
  num_classes: int,
  epoch_steps: float,
  counts: list[int] | None = None,
  before: fit.TooLargeError | None = None,
) -> fit.Fitting:
  """Compiles the training step with the fewest micro-batches that fit.

  `memory` is in bytes per device; None is the compiler's limit. `counts` are
  the numbers to try, by default the config's, or all. `before` is the error of
  the same step in fewer micro-batches. Raises a `fit.TooLargeError` if none
  fits.
  """
  count = len(topology.devices)
  net = build.create_net(config, num_classes)
  state = build.state_shapes(config, net)
  processes = {device.process_index for device in topology.devices}
  batch = programs.batch_shapes(config, count, len(processes) > 1)
  if counts is None and config.micro_batches is not None:
    counts = [config.micro_batches]
  elif counts is None:
    counts = fit.valid_micro_batches(config.batch_size // count)

  def lower(parts: int) -> jax.stages.Lowered:
    _log(
      f'compiling the training step in {parts} part(s) for {topology.name}'
      + (f', remat {config.remat}' if config.remat else '')
    )
    return programs.lower_train_step(
      config,
      net,
      state,
      batch,
      num_classes,
      epoch_steps,
      parts,
      topology.devices,
    )

  return fit.compile_fewest(
    lower,
    counts,
    memory,
    beside=fit.bytes_beside(batch),
    options=topology.options,
    before=before,
  )


def fit_evaluation(
  config: config_dict.ConfigDict,
  topology: topologies.Topology,
  memory: int | None,
  num_classes: int,
) -> fit.Fitting:
  """Compiles the evaluation step like `fit_training`."""
  count = len(topology.devices)
  net = build.create_net(config, num_classes)
  state = build.state_shapes(config, net)
  batch = programs.eval_batch_shapes(config, count)
  _log(f'compiling the evaluation step for {topology.name}')
  return fit.compile_fewest(
    lambda parts: programs.lower_eval_step(
      config, net, state, batch, parts, topology.devices
    ),
    fit.valid_micro_batches(config.eval_batch_size // count),
    memory,
    beside=fit.bytes_beside(batch),
    options=topology.options,
    remedy=fit.EVALUATION_REMEDY,
  )


def _remedy(
  config: config_dict.ConfigDict,
  topology: topologies.Topology,
  memory: int,
  num_classes: int,
  epoch_steps: float,
  before: fit.TooLargeError,
) -> dict[str, Any] | None:
  """Finds the fewest micro-batches that fit, preferring the config's remat."""
  device_batch = config.batch_size // len(topology.devices)
  valid = fit.valid_micro_batches(device_batch)
  tried = config.micro_batches or device_batch
  for remat in dict.fromkeys([config.remat, 'block']):
    same = remat == config.remat
    counts = [x for x in valid if x > tried] if same else valid
    if not counts:
      continue
    candidate = config.copy_and_resolve_references()
    candidate.remat = remat
    try:
      best = fit_training(
        candidate,
        topology,
        memory,
        num_classes,
        epoch_steps,
        counts,
        before if same else None,
      )
    except fit.TooLargeError:
      continue
    return {'micro_batches': best.parts, 'remat': remat, 'bytes': best.total}
  return None


def _figures(
  fitted: fit.Fitting,
  text: str,
  topology: topologies.Topology,
  config: config_dict.ConfigDict,
  evaluation: bool,
) -> dict[str, Any]:
  """Returns `figures.step_figures` of a step of the config."""
  batch = config.eval_batch_size if evaluation else config.batch_size
  per_device = batch // len(topology.devices)
  kind = topology.kind
  return figures.step_figures(
    fitted,
    text,
    kind,
    peak=_peak(kind, config, evaluation) if kind else None,
    count_flops=lambda: _flops(config, per_device, fitted.parts, evaluation),
  )


def _peak(
  kind: topologies.Kind, config: config_dict.ConfigDict, evaluation: bool
) -> float:
  """Returns the peak FLOP/s for a step's matrix products."""
  dtype = config.eval_dtype if evaluation else config.compute_dtype
  if dtype == 'bfloat16':
    return kind.flops
  return kind.exact_flops if evaluation else kind.float32_flops


def _flops(
  config: config_dict.ConfigDict, per_device: int, parts: int, evaluation: bool
) -> float:
  """Counts FLOPs where the compiler does not."""
  size = config.data.eval_image_size if evaluation else config.data.image_size
  overrides = {k: v for k, v in config.model.items() if k != 'name'}
  macs = figures.count_macs(config.model.name, overrides, size)
  if evaluation:
    return 4.0 * per_device * macs  # two forward passes
  # Forward, recomputed forward with remat, and twice that backward.
  passes = 3 if config.remat is None else 4
  images = per_device
  if config.optimizer.sam_rho is not None:
    fields = config.optimizer
    devices = 1 if fields.sam_per_device else config.batch_size // per_device
    ascent = sam.plan(per_device, devices, fields.sam_fraction, parts)
    images += ascent.rows.shape[1]
  return 2.0 * passes * images * macs


def _log(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
