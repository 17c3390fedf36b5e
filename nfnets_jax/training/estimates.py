"""Compile-time estimates of the memory and speed of a run's steps.

The figures come from the target's compiler, or follow from them and the
device's peak rates; nothing runs. The steps are those of the training loop.
"""

import importlib.metadata
import sys
from collections.abc import Mapping
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from ml_collections import config_dict

from nfnets_jax import hlo, models, topologies
from nfnets_jax.training import build, check, fit, programs, sam, train_step

# ImageNet classes and training images, used if the data set is missing.
_IMAGENET = (1000, 1_281_167)


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
      f'a device of {topology.name} does not say how much memory it has; give '
      '--memory'
    )
  count = len(topology.devices)
  check.check_config(config, count)
  num_classes, examples = data or _facts(config)
  share = config.batch_size // count
  result: dict[str, Any] = {
    'model': config.model.name,
    'topology': topology.name,
    'platform': topology.platform,
    'devices': count,
    'batch_size': config.batch_size,
    'share': share,
    'image_size': config.data.image_size,
    'compute_dtype': config.compute_dtype,
    'eval_dtype': config.eval_dtype,
    'remat': config.remat,
    'device_memory': memory,
    'usable_memory': round(fit.USABLE * memory),
    'compiler': _compiler(topology),
  }
  epoch_steps = examples / config.batch_size
  try:
    fitted = fit_training(config, topology, memory, num_classes, epoch_steps)
  except fit.TooLargeError as error:
    remedy = _remedy(config, topology, memory, num_classes, epoch_steps, error)
    return result | {
      'fits': False,
      'reason': error.reason,
      'remedy': remedy,
      'micro_batches': config.micro_batches,
    }, None
  text = fitted.compiled.as_text() or ''
  figures = _figures(fitted, text, topology, config, share)
  result |= {
    'fits': True,
    'micro_batches': fitted.parts,
    'refused': fitted.refused,
    'training': figures,
  }
  if figures['seconds']:
    speed = config.batch_size / figures['seconds']
    result |= {
      'images_per_second': speed,
      'days': config.epochs * examples / speed / 86400,
      'epochs': config.epochs,
    }
  if evaluation:
    try:
      evaluated = fit_evaluation(config, topology, memory, num_classes)
    except fit.TooLargeError as error:
      return result | {'fits': False, 'reason': str(error)}, text
    result['evaluation'] = _figures(
      evaluated,
      evaluated.compiled.as_text() or '',
      topology,
      config,
      config.eval_batch_size // count,
      evaluation=True,
    )
  return result, text


def _compiler(topology: topologies.Topology) -> str:
  text = f'jax {jax.__version__}'
  if topology.platform == 'tpu' and topology.name != 'local':
    text += f', libtpu {importlib.metadata.version("libtpu")}'
  return text


def _facts(config: config_dict.ConfigDict) -> tuple[int, int]:
  try:
    train_set, _ = build.load_data(config)
  except FileNotFoundError:
    if config.data.name != 'imagenet2012' or config.data.classes is not None:
      raise
    _say(f'{config.data.name} is not here: taken as it was published')
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
  optimizer = build.create_optimizer(config, lambda step: 0.0)
  state = train_step.state_shapes(net, optimizer, config.data.image_size)
  batch = programs.batch_shapes(config, count, _several(topology))
  if counts is None and config.micro_batches is not None:
    counts = [config.micro_batches]
  elif counts is None:
    counts = fit.valid_micro_batches(config.batch_size // count)

  def lower(parts: int) -> jax.stages.Lowered:
    _say(
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
  optimizer = build.create_optimizer(config, lambda step: 0.0)
  state = train_step.state_shapes(net, optimizer, config.data.image_size)
  batch = programs.eval_batch_shapes(config, count)
  _say(f'compiling the evaluation step for {topology.name}')
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


def _several(topology: topologies.Topology) -> bool:
  return len({device.process_index for device in topology.devices}) > 1


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
    counts = valid if remat != config.remat else [x for x in valid if x > tried]
    candidate = config.copy_and_resolve_references()
    candidate.remat = remat
    if not counts:
      continue
    try:
      best = fit_training(
        candidate,
        topology,
        memory,
        num_classes,
        epoch_steps,
        counts,
        before if remat == config.remat else None,
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
  share: int,
  evaluation: bool = False,
) -> dict[str, Any]:
  """Returns the cost of a compiled step per device."""
  need, program = fit.need(fitted.compiled), hlo.read(text)
  cost = fitted.compiled.cost_analysis() or {}
  figures: dict[str, Any] = {
    'arguments': need.arguments,
    'outputs': need.outputs,
    'temporaries': need.temporaries,
    'code': need.code,
    'total': fitted.total,
    'traffic': program.traffic,
    'cycles': program.cycles,
    'large_gathers': program.large_gathers,
    'large_scatters': program.large_scatters,
    'collectives': [x._asdict() for x in program.collectives],
    'collective_bytes': sum(x.times * x.bytes for x in program.collectives),
    'overlapped_bytes': sum(
      x.times * x.bytes for x in program.collectives if x.work
    ),
    'compile_seconds': fitted.seconds,
    'seconds': None,
    'cycle_seconds': None,
    'bound': None,
  }
  # The compiler counts a loop body once.
  traffic_ratio = program.traffic / program.traffic_once
  cycle_ratio = traffic_ratio
  if program.cycles_once:
    cycle_ratio = program.cycles / program.cycles_once
  if 'flops' in cost:
    figures['flops'] = cost['flops'] * cycle_ratio
    figures['bytes_accessed'] = cost.get('bytes accessed', 0.0) * traffic_ratio
  else:
    figures['flops'] = _flops(config, share, fitted.parts, evaluation)
    figures['bytes_accessed'] = program.traffic
  kind = topology.kind
  if kind is None:
    return figures
  compute = figures['flops'] / _peak(kind, config, evaluation)
  transfer = figures['bytes_accessed'] / kind.bandwidth
  figures |= {
    'compute_seconds': compute,
    'memory_seconds': transfer,
    'bound': 'compute' if compute > transfer else 'memory',
  }
  if (optimal := optimal_seconds(cost)) and program.cycles_once:
    figures['seconds'] = optimal * cycle_ratio
  else:
    figures['seconds'] = max(compute, transfer)
  if kind.clock and program.cycles:
    figures['cycle_seconds'] = program.cycles / kind.clock
  return figures


def optimal_seconds(cost: Mapping[str, float]) -> float | None:
  """Returns XLA's estimate of a program's time, None if unavailable.

  libtpu's is negative for a v5e.

  Example:
    >>> optimal_seconds({'optimal_seconds': -407.9}) is None
    True
  """
  seconds = cost.get('optimal_seconds', 0.0)
  return seconds if seconds > 0 else None


def _peak(
  kind: topologies.Kind, config: config_dict.ConfigDict, evaluation: bool
) -> float:
  """Returns the peak FLOP/s for a step's matrix products."""
  dtype = config.eval_dtype if evaluation else config.compute_dtype
  if dtype == 'bfloat16':
    return kind.flops
  return kind.exact_flops if evaluation else kind.float32_flops


def _flops(
  config: config_dict.ConfigDict, share: int, parts: int, evaluation: bool
) -> float:
  """Counts FLOPs where the compiler does not."""
  size = config.data.eval_image_size if evaluation else config.data.image_size
  # No device axis here.
  excluded = ('name', 'cross_replica_axis')
  overrides = {k: v for k, v in config.model.items() if k not in excluded}

  def forward(images: jax.Array) -> dict[str, jax.Array]:
    net = models.create(config.model.name, 1000, **overrides)
    return net(images, is_training=False)

  macs = models.count_macs(
    hk.transform_with_state(forward).init,
    jax.eval_shape(lambda: jax.random.key(0)),
    jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),
  )
  if evaluation:
    return 4.0 * share * macs  # two forward passes
  # Forward, recomputed forward with remat, and twice that backward.
  passes = 3 if config.remat is None else 4
  images = share
  if config.optimizer.sam_rho is not None:
    images += sam.ascent_images(share, config.optimizer.sam_fraction, parts)[0]
  return 2.0 * passes * images * macs


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def table(result: dict[str, Any]) -> str:
  """Formats the result of `measure` as text."""
  gib, x = 2**30, result
  lines = [
    f'{x["model"]}, {x["image_size"]} px, {x["compute_dtype"]}, batch '
    f'{x["batch_size"]:,} on {x["topology"]}: {x["devices"]:,} device(s) of '
    f'{x["share"]:,} images ({x["compiler"]})'
  ]
  room = (
    f'{x["usable_memory"] / gib:.2f} GiB of the {x["device_memory"] / gib:.2f} '
    'that a device has'
  )
  if not x['fits']:
    lines += ['', f'It does not fit into {room}: {x["reason"]}']
    if 'training' in x:
      lines.append('The training step fits; its figures are in the JSON.')
    elif remedy := x['remedy']:
      again = f' and remat={remedy["remat"]!r}' if remedy['remat'] else ''
      lines.append(
        f'micro_batches={remedy["micro_batches"]}{again} fits, with '
        f'{remedy["bytes"] / gib:.2f} GiB'
      )
    else:
      lines.append(
        'No number of micro-batches fits, with remat or without. Make '
        'data.image_size or batch_size smaller, or take more devices'
      )
    return '\n'.join(lines)
  again = f', remat {x["remat"]}' if x['remat'] else ''
  lines += [
    f'It fits into {room}: {x["micro_batches"]} micro-batch(es){again}',
    '',
  ]
  columns = [x[name] for name in ('training', 'evaluation') if name in x]
  titles = ['training', 'evaluation'][: len(columns)]

  def row(what: str, *cells: str) -> None:
    lines.append(f'{what:46}' + ''.join(f'{cell:>12}' for cell in cells))

  row('estimates for each device and step', *titles)
  for what, name, scale, digits in (
    ('arguments: state and batch, GiB', 'arguments', gib, 3),
    ('results beside them, GiB', 'outputs', gib, 3),
    ('temporaries, GiB', 'temporaries', gib, 3),
    ('program, GiB', 'code', gib, 3),
    ('total with the two batches that wait, GiB', 'total', gib, 3),
    ('TFLOP', 'flops', 1e12, 3),
    ('bytes accessed, GB', 'bytes_accessed', 1e9, 2),
    ('collectives, MB', 'collective_bytes', 1e6, 1),
    ('of these with work during them, MB', 'overlapped_bytes', 1e6, 1),
    (f'gathers of more than {hlo.LARGE:,} elements', 'large_gathers', 1, 0),
    ('scatters of as many', 'large_scatters', 1, 0),
    ('all operations at peak, ms', 'compute_seconds', 1e-3, 1),
    ('all bytes at peak, ms', 'memory_seconds', 1e-3, 1),
    ('estimated time, ms', 'seconds', 1e-3, 1),
    ("by the compiler's cycles, ms", 'cycle_seconds', 1e-3, 1),
    ('compiled in, s', 'compile_seconds', 1, 1),
  ):
    values = [column.get(name) for column in columns]
    if any(value is not None for value in values):
      row(
        what,
        *(
          '' if value is None else f'{value / scale:,.{digits}f}'
          for value in values
        ),
      )
  if 'images_per_second' in x:
    lines += [
      '',
      f'{x["images_per_second"]:,.0f} images/s and {x["days"]:.2f} days for '
      f'{x["epochs"]:g} epochs, if collectives, input and evaluation take no '
      f'time; bound by {x["training"]["bound"]}',
    ]
  return '\n'.join(lines)
