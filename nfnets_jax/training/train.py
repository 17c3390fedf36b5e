"""The training loop, read from top to bottom."""

import contextlib
import functools
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import haiku as hk
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import config_dict

from nfnets_jax import devices, models, paths, weights
from nfnets_jax.data import datasets, mixing, prepare, transforms
from nfnets_jax.data import loader as loaders
from nfnets_jax.models import variants
from nfnets_jax.runtime import (
  checkpoint,
  integrity,
  interrupt,
  lock,
  logbook,
  meters,
  parallel,
  processes,
  progress,
)
from nfnets_jax.runtime import workdir as workdirs
from nfnets_jax.training import (
  build,
  ema,
  evaluate,
  fit,
  init_from,
  sam,
)
from nfnets_jax.training import optimizer as optimizers
from nfnets_jax.training import train_step as steps
from nfnets_jax.weights import recognize


def train_and_evaluate(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path,
  allow_config_change: bool = False,
) -> dict[str, Any]:
  """Trains a network and evaluates it, or goes on with what was begun.

  Args:
    config: of the run; `experiments/base.py` documents the fields.
    workdir: receives `config.json`, `data.json`, `metrics.jsonl`,
      `tensorboard/`, `checkpoints/`, `curves.png` and, at the end,
      `report.json`. A run that was interrupted there goes on after its newest
      checkpoint; a finished one is reported as it is. While the run lasts, a
      file `lock` names its process.
    allow_config_change: whether a run begun under another config, or with other
      data, may go on.

  Returns:
    The report: `steps`, `eval_top_1`, `eval_top_5`, `eval_loss`, the same with
    the prefix `ema_`, `eval_count`, `images_per_second` and `num_params`;
    `batch_size`, `num_classes`, `devices` and `device_kind`; `skipped`, how
    often a damaged image was left out of the training, and `eval_skipped`, how
    many of the test images were; `nonfinite`, how many steps were left out.
    Accuracies are fractions.

  Raises:
    ValueError: if the config is impossible, or the folder is of another config
      or other data.
    lock.InUseError: if another process trains in the folder.
    FloatingPointError: if the loss or the gradient norm is not finite, or the
      loss above `max_loss`; the message names the step and the last good
      checkpoint.
    interrupt.StoppedError: if SIGTERM or SIGINT stopped the run, after a
      checkpoint.
  """
  # Set up.
  workdir = paths.expand_literal(workdir, '--workdir')
  check_config(config, jax.device_count())
  processes.agree('the config', config.to_json())
  same_run = workdirs.check(workdir, config, allow_config_change)
  first_process, several = jax.process_index() == 0, jax.process_count() > 1
  # A folder without a whole checkpoint is what a run killed early leaves.
  saved = (workdir / 'checkpoints').glob('*')
  begun = any(path.name.isdecimal() for path in saved)
  processes.agree(f'what has begun in {workdir}, a folder to share,', begun)
  if config.init_from is not None and not begun:
    weights.locate(config.init_from, config.model.name, 'config.init_from')

  # Data.
  train_set, test_set = load_data(config)
  epoch_steps = len(train_set) / config.batch_size
  total_steps = count_steps(config.epochs, epoch_steps)
  data = build.describe_data(train_set, test_set)
  processes.agree('the data set', data)
  same_run &= workdirs.check_data(workdir, data, allow_config_change)
  report = workdirs.read_report(workdir)
  processes.agree(f'report.json in {workdir}, a folder to share,', report)
  if same_run and report is not None:
    progress.say(f'this run is finished after {report["steps"]} steps')
    return report
  loader = train_batches(config, train_set)
  test_batches = functools.partial(eval_batches, config, test_set)

  # Model and optimiser.
  net = create_net(config, train_set.num_classes)
  # Of the numbers themselves, which it checks; that of the step has tracers.
  optimizer = optimizers.create_optimizer(
    config.optimizer,
    optimizers.create_schedule(
      config.optimizer, config.batch_size, epoch_steps, total_steps
    ),
    config.model.depth,
  )
  first_state = steps.init_state(
    net, optimizer, config.seed, config.data.image_size
  )
  if config.init_from is not None and not begun:
    first_state = init_from.merge(
      first_state,
      initial_weights(config),
      train_set.num_classes,
      config.init_new_head,
    )
  state = parallel.replicate(first_state)
  num_params = hk.data_structures.tree_size(state.params)

  with contextlib.ExitStack() as stack:
    stack.callback(loader.close)
    if first_process:  # the only one that writes
      stack.enter_context(lock.hold(workdir))

    # Restore.
    checkpoints = checkpoint.Checkpointer(
      workdir / 'checkpoints', config.keep_checkpoints
    )
    stack.callback(checkpoints.close)
    start = 0
    if checkpoints.latest_step is not None:
      state, loader_state = checkpoints.restore(state)
      loader.set_state(loader_state)
      start = int(state.step)
      progress.say(f'resumed after step {start}')
    if several:
      # Also where the versions of jax or the kinds of device differ.
      processes.agree('the state', integrity.fingerprint_of(state, {}))
    if start > total_steps:
      raise ValueError(
        f'the run in {workdir} has made {start} steps, and this config asks '
        f'for {total_steps}; raise epochs, or use another --workdir'
      )

    # Steps, compiled before the run leaves a trace of itself.
    keep_compiled(config, workdir)
    compiling = stack.enter_context(meters.CompileTimes())
    train_step = compile_train_step(
      config, net, state, train_set.num_classes, epoch_steps
    )
    eval_step = compile_eval_step(config, net, state)
    progress.say(str(compiling))

    writer = None
    if first_process:
      # Not before here, so that a config which cannot be run leaves no trace.
      workdirs.record(workdir, config)
      workdirs.write_json(workdir / 'data.json', data)
      writer = stack.enter_context(logbook.Writer(workdir, start))
    progress.say(
      f'{config.model.name}: {num_params:,} parameters; {config.data.name}: '
      f'{len(train_set):,} images; {total_steps:,} steps of '
      f'{config.batch_size} images on {jax.device_count()} '
      f'{jax.devices()[0].platform} device(s)'
    )

    # Loop.
    eval_every = max(1, round(config.eval_every_epochs * epoch_steps))
    save_every = max(1, round(config.checkpoint_every_epochs * epoch_steps))
    window = meters.Window(
      config.batch_size, config.optimizer.skip_nonfinite, config.max_loss
    )
    bar = stack.enter_context(
      progress.Progress(start, total_steps, config.batch_size)
    )
    signals = stack.enter_context(interrupt.Signals())
    results: dict[str, float] = {}
    try:
      for step in range(start + 1, total_steps + 1):
        with window.waiting():
          batch = next(loader)
        if several:
          batch['stop'] = stop_votes(signals)
        state, step_metrics = train_step(state, parallel.shard(batch))
        window.push(step, step_metrics)
        bar.advance()
        if step == start + 1:
          window.forget_time()  # the first step loads the program
        # Several processes stop after the same step, once they know of it.
        stop = window.stop_requested if several else signals.received
        last = step == total_steps
        save = last or stop or step % save_every == 0
        # Also at a checkpoint, so that a resumed run averages the same steps.
        if save or step % config.log_every_steps == 0:
          checkpoints.check()
          means = window.summarize()
          # Of this step alone: it reads all parameters, and all wait here.
          pair = (state.ema_params, state.params)
          pair = jax.tree.map(parallel.local_copy, pair)
          means['ema_distance'] = float(ema.distance(*pair))
          bar.show(step, step / epoch_steps, means)
          if writer:
            writer.write(step, 'train', means)
        if last or step % eval_every == 0:
          with window.paused():
            results = evaluate.evaluate(eval_step, state, test_batches())
          bar.show(step, step / epoch_steps, results)
          if writer:
            writer.write(step, 'test', results)
        # Last, so that what was measured up to a checkpoint is on record.
        if save:
          with window.paused():  # every step so far was finite
            check_replicas(state, step)
            checkpoints.save(step, state, loader.get_state())
        if stop and not last:
          checkpoints.wait()
          raise interrupt.StoppedError(
            f'{signals.received or "another process"} stopped the run after '
            f'step {step}; the same command goes on'
          )
    except FloatingPointError as error:
      checkpoints.wait()
      kept = checkpoints.latest_step
      where = f'step {kept}' if kept is not None else 'none yet'
      raise FloatingPointError(
        f'{error}; last good checkpoint in {workdir / "checkpoints"}: {where}. '
        'Lower optimizer.learning_rate_per_256 or optimizer.clipping, or raise '
        'optimizer.warmup_epochs'
      ) from error

    # Report, once nothing can be lost any more.
    checkpoints.wait()
    if not results:  # all steps had been made, but the report not written
      results = evaluate.evaluate(eval_step, state, test_batches())
    lines = logbook.read(workdir)
    speeds = [x['images_per_second'] for x in lines if 'images_per_second' in x]
    report = {
      'model': config.model.name,
      'data': config.data.name,
      'steps': total_steps,
      'batch_size': config.batch_size,
      'devices': jax.device_count(),
      'device_kind': jax.devices()[0].device_kind,
      'num_classes': train_set.num_classes,
      **results,
      'images_per_second': statistics.median(speeds) if speeds else None,
      'num_params': num_params,
      'skipped': sum(x.get('skipped', 0) for x in lines),
      'nonfinite': sum(x.get('nonfinite', 0) for x in lines),
      'eval_skipped': len(test_set) - results['eval_count'],
    }
    if first_process:
      logbook.plot_curves(workdir)
      workdirs.write_json(workdir / 'report.json', report)
  return report


def count_steps(epochs: float, epoch_steps: float) -> int:
  """Returns the whole steps of a run, as released: 112,602 of 112,602.57.

  Args:
    epochs: of the run.
    epoch_steps: steps of an epoch, not necessarily whole.

  Example:
    >>> count_steps(360.0, 1_281_167 / 4096)
    112602
    >>> count_steps(15_000 / (50_000 / 2048), 50_000 / 2048)
    15000
  """
  # Epochs that were computed from steps are off by the rounding of a float.
  return math.floor(epochs * epoch_steps + 1e-6)


def evaluate_checkpoint(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path,
  allow_config_change: bool = False,
) -> dict[str, float]:
  """Evaluates a run's newest checkpoint, or other weights, on its test split.

  Args:
    config: of the run; fields of the evaluation, such as
      `data.eval_image_size`, may differ from those of the training. With
      `init_from` it is those weights that are evaluated.
    workdir: of the run; need not be there with `init_from`.
    allow_config_change: whether the classes may have other names than in the
      training.

  Returns:
    As `evaluate.evaluate`, and `num_classes`.

  Raises:
    FileNotFoundError: if there is no checkpoint.
    ValueError: if the config is impossible, or the classes are not those of the
      training.
  """
  workdir = paths.expand_literal(workdir, '--workdir')
  check_config(config, jax.device_count())
  directory = workdir / 'checkpoints'
  if config.init_from is None and not directory.is_dir():
    raise FileNotFoundError(
      f'there is no run to evaluate in {workdir}; train first, or give '
      '--config.init_from=FILE'
    )
  if config.init_from is not None:
    weights.locate(config.init_from, config.model.name, 'config.init_from')
  if config.data.prepare:
    load_data(config)
  test_set = _load_split(config, config.data.test_split)
  names = {'class_names': list(test_set.class_names)}
  if config.init_from is None:
    workdirs.check_data(workdir, names, allow_config_change)
  net = create_net(config, test_set.num_classes)
  optimizer = optimizers.create_optimizer(
    config.optimizer, lambda step: 0.0, config.model.depth
  )
  size = config.data.image_size
  if config.init_from is not None:
    found = initial_weights(config)
    if found.num_classes != test_set.num_classes:
      raise ValueError(
        f'init_from holds weights for {found.num_classes} classes, and '
        f'{config.data.name} has {test_set.num_classes}; train first'
      )
    if found.class_names is not None:
      workdirs.compare_data(
        config.init_from,
        {'class_names': list(found.class_names)},
        names,
        allow_config_change,
      )
    state = steps.init_state(net, optimizer, config.seed, size)
    state = init_from.merge(state, found, test_set.num_classes)
    state = parallel.replicate(state)
  else:
    shapes = steps.state_shapes(net, optimizer, size)  # nothing is drawn
    checkpoints = checkpoint.Checkpointer(directory, config.keep_checkpoints)
    with contextlib.closing(checkpoints):
      state, _ = checkpoints.restore(shapes)
  eval_step = compile_eval_step(config, net, state)
  results = evaluate.evaluate(eval_step, state, eval_batches(config, test_set))
  return {**results, 'num_classes': test_set.num_classes}


def initial_weights(config: config_dict.ConfigDict) -> weights.Weights:
  """Returns the weights that `config.init_from` names.

  Args:
    config: of the run.

  Returns:
    The weights, which are of the config's network.

  Raises:
    ValueError: if they are of another network, or damaged.
    OSError: if they cannot be read.
  """
  source, name = config.init_from, config.model.name
  path = weights.locate(source, name, 'init_from')
  if source == 'released':
    found = weights.read(weights.fetch(name), name)
  elif path.is_dir():
    found = load_average(path)
  else:
    arguments = models.arguments(name)
    overrides = {
      field: value
      for field, value in config.model.items()
      if field != 'name' and value != arguments[field]
    }
    found = weights.read(path, name, **overrides)
  init_from.check_model(found, config.model)
  return found


def load_average(workdir: str | pathlib.Path) -> weights.Weights:
  """Returns the averaged weights of a run's newest checkpoint.

  Args:
    workdir: of the run; its data need not be here.

  Returns:
    The weights, on the host, with the size and crop of the run's evaluation,
    and the names of its classes if it has recorded them.

  Raises:
    FileNotFoundError: if there is no run, or no checkpoint.
    ValueError: if all checkpoints are damaged, or what the run has recorded.
  """
  workdir = paths.existing(workdir, 'workdir', 'folder')
  recognize.check_folder(workdir, 'workdir')
  text = (workdir / 'config.json').read_text()
  config = config_dict.ConfigDict(json.loads(text))
  checkpoints = checkpoint.Checkpointer(
    workdir / 'checkpoints', config.keep_checkpoints
  )
  with contextlib.closing(checkpoints):
    # The classifier's; blocks have gates of that name, and come after `~/`.
    (num_classes,) = checkpoints.shape_of('Net/~/linear.b')
    net = create_net(config, num_classes)
    optimizer = optimizers.create_optimizer(
      config.optimizer, lambda step: 0.0, config.model.depth
    )
    state, _ = checkpoints.restore(
      steps.state_shapes(net, optimizer, config.data.image_size)
    )
  params, model_state = jax.device_get(
    jax.tree.map(parallel.local_copy, (state.ema_params, state.ema_model_state))
  )
  default = models.arguments(config.model.name)
  told = {k: v for k, v in config.model.to_dict().items() if k != 'name'}
  told = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
  overrides = {k: v for k, v in told.items() if v != default[k]}
  return weights.Weights(
    config.model.name,
    params,
    model_state,
    overrides,
    **init_from.recorded_facts(workdir, config, num_classes),
  )


def create_train_step(
  config: config_dict.ConfigDict,
  net: hk.TransformedWithState,
  num_classes: int,
  epoch_steps: float,
  micro_batches: int,
) -> Callable:
  """Returns the training step, a function also of its rates and thresholds.

  Args:
    config: of the run.
    net: as of `create_net`.
    num_classes: K.
    epoch_steps: steps of an epoch, not necessarily whole.
    micro_batches: parts that each device's share is computed in.

  Returns:
    `step(state, batch, inputs) → (state, metrics)`, to be mapped over
    `parallel.AXIS`; `inputs` are those of `optimizer.step_inputs`.
  """

  def step(state: steps.TrainState, batch: steps.Batch, inputs: Any):
    traced = config.copy_and_resolve_references()
    traced.optimizer = optimizers.with_inputs(config.optimizer, inputs)
    schedule = optimizers.create_schedule(
      traced.optimizer,
      config.batch_size,
      epoch_steps,
      count_steps(config.epochs, epoch_steps),
    )
    train_step = steps.create_train_step(
      net,
      optimizers.create_optimizer(
        traced.optimizer, schedule, config.model.depth
      ),
      schedule,
      traced,
      num_classes,
      parallel.AXIS,
      micro_batches,
    )
    return train_step(state, batch)

  return step


def compile_train_step(
  config: config_dict.ConfigDict,
  net: hk.TransformedWithState,
  state: steps.TrainState,
  num_classes: int,
  epoch_steps: float,
) -> parallel.Program:
  """Compiles the training step with the fewest micro-batches that fit.

  Args:
    config: of the run; its `micro_batches`, if not None, are taken unseen.
    net: as of `create_net`.
    state: replicated.
    num_classes: K.
    epoch_steps: steps of an epoch, not necessarily whole.

  Returns:
    The compiled `step(state, batch) → (state, metrics)`, with the same number
    of micro-batches in all processes.

  Raises:
    fit.TooLargeError: if no number fits.
    ValueError: if a device does not say how much memory it has.
  """
  inputs = optimizers.step_inputs(config.optimizer)
  batch = _local_part(
    steps.batch_shapes(config, jax.device_count(), jax.process_count() > 1)
  )
  share = config.batch_size // jax.device_count()
  chosen = config.micro_batches is None
  memory = devices.memory() if chosen else None
  counts = fit.valid_micro_batches(share) if chosen else [config.micro_batches]
  found = fit.compile_fewest(
    lambda count: parallel.lower_train_step(
      create_train_step(config, net, num_classes, epoch_steps, count),
      state,
      batch,
      inputs,
    ),
    counts,
    memory=memory,
    beside=fit.bytes_beside(batch),
    agree=processes.all_agree,
  )
  if memory is not None:
    progress.say(
      f'micro-batches: {found.parts} of {share // found.parts} images on each '
      f'device, {found.total / fit.GIB:.2f} of {memory / fit.GIB:.2f} GiB'
    )
  if state.model_state and found.parts > 1:
    progress.say(
      f'batch normalisation takes statistics of {found.parts} parts of a '
      "device's share of a batch; set micro_batches for the same elsewhere"
    )
  return parallel.Program(found.compiled, inputs)


def compile_eval_step(
  config: config_dict.ConfigDict,
  net: hk.TransformedWithState,
  state: steps.TrainState,
) -> parallel.Program:
  """Compiles the evaluation step in the fewest parts that fit.

  Args:
    config: of the run.
    net: as of `create_net`.
    state: replicated.

  Returns:
    The compiled `step(state, batch) → sums`.

  Raises:
    fit.TooLargeError: if no number of parts fits; where a device does not say
      how much memory it has, if the compiler refuses them all.
  """
  batch = _local_part(steps.eval_batch_shapes(config, jax.device_count()))
  found = fit.compile_fewest(
    lambda parts: parallel.lower_eval_step(
      steps.create_eval_step(net, parallel.AXIS, parts, config.eval_dtype),
      state,
      batch,
    ),
    fit.valid_micro_batches(config.eval_batch_size // jax.device_count()),
    memory=devices.known_memory(),
    beside=fit.bytes_beside(batch),
    agree=processes.all_agree,
    remedy=fit.EVALUATION_REMEDY,
  )
  return parallel.Program(found.compiled)


def _local_part(batch: steps.Batch) -> steps.Batch:
  """Returns the shapes of this process's part of a batch over all devices."""
  local = jax.local_device_count()
  return jax.tree.map(lambda x: x.update(shape=(local, *x.shape[1:])), batch)


def keep_compiled(
  config: config_dict.ConfigDict, workdir: pathlib.Path
) -> None:
  """Makes jax keep compiled programs, so that resuming starts fast.

  A folder that jax was told of otherwise, as by the environment variable
  JAX_COMPILATION_CACHE_DIR, comes first.

  Args:
    config: of the run.
    workdir: of the run, which a relative folder belongs to.
  """
  name = 'jax_compilation_cache_dir'
  if config.compilation_cache and not getattr(jax.config, name):
    folder = workdir.absolute() / paths.expand_literal(
      config.compilation_cache, 'config.compilation_cache'
    )
    jax.config.update(name, str(folder))
    # jax decides at the first compilation whether to keep any.
    compilation_cache.reset_cache()


def check_config(config: config_dict.ConfigDict, devices: int) -> None:
  """Checks what can be checked before data are read and weights are drawn.

  Args:
    config: of the run.
    devices: of all processes.

  Raises:
    ValueError: for a name that is not known, or if the batches cannot be split
      so.
  """
  optimizers.create_optimizer(
    config.optimizer, lambda step: 0.0, config.model.depth
  )
  data = config.data
  if not 0 <= config.seed < 2**32:
    raise ValueError(f'seed {config.seed} is not in [0, 2^32)')
  for name in ('image_size', 'eval_image_size'):
    if data[name] < 1:
      raise ValueError(f'data.{name} must be at least 1, got {data[name]}')
  loaders.check_workers(data.num_workers, data.worker_type)
  if config.optimizer.sam_rho is not None:
    sam.check_fraction(config.optimizer.sam_fraction)
  create_transform(config)
  transforms.eval_transform(data.eval_image_size, data.eval_crop)
  if config.compilation_cache:
    paths.expand_literal(config.compilation_cache, 'config.compilation_cache')
  for name in ('compute_dtype', 'eval_dtype'):
    if config[name] not in steps.DTYPES:
      raise ValueError(
        f'{name} is {config[name]!r}; choose one of {", ".join(steps.DTYPES)}'
      )
  for name in ('batch_size', 'eval_batch_size'):
    if config[name] < 1 or config[name] % devices:
      raise ValueError(
        f'{name} {config[name]} is not divisible by {devices} devices; use a '
        f'positive multiple of {devices}'
      )
  if config.keep_checkpoints < 1:
    raise ValueError(
      f'keep_checkpoints must be at least 1, got {config.keep_checkpoints}'
    )
  axis = config.model.get('cross_replica_axis')
  if axis not in (None, parallel.AXIS):
    raise ValueError(
      f'model.cross_replica_axis is {axis!r}; the devices are {parallel.AXIS!r}'
    )
  share = config.batch_size // devices
  count = config.micro_batches
  valid = fit.valid_micro_batches(share)
  if count is not None and count not in valid:
    below = [x for x in valid if x < count][-1:]
    nearest = below + [x for x in valid if x > count][:1]
    raise ValueError(
      f'micro_batches {count} does not split the {share} images of each of '
      f'{devices} devices into equal parts; use '
      f'{" or ".join(map(str, nearest))}'
    )


def stop_votes(signals: interrupt.Signals) -> np.ndarray:
  """Returns what this process adds to a batch to ask all others to stop."""
  votes = np.zeros(jax.local_device_count(), np.int32)
  votes[0] = signals.received is not None
  return votes


def check_replicas(state: steps.TrainState, step: int) -> None:
  """Raises if the devices' copies of the state differ or are not finite."""
  spread = parallel.replica_spread(state)
  if math.isnan(spread):
    raise FloatingPointError(f'the state is not finite at step {step}')
  if spread != 0:
    raise RuntimeError(
      f'the copies of the state on {jax.device_count()} devices differ by '
      f'{spread} at step {step}; this is a fault in the training step or of a '
      'device'
    )


def load_data(
  config: config_dict.ConfigDict,
) -> tuple[datasets.Dataset, datasets.Dataset]:
  """Opens the training and the test split, preparing them if told to."""
  name, data_dir = config.data.name, config.data.data_dir
  if config.data.prepare:
    if jax.process_index() == 0:
      prepare.prepare(name, data_dir)
    multihost_utils.sync_global_devices('data prepared')
  return (
    _load_split(config, config.data.train_split),
    _load_split(config, config.data.test_split),
  )


def _load_split(config: config_dict.ConfigDict, split: str) -> datasets.Dataset:
  dataset = datasets.load(config.data.name, split, config.data.data_dir)
  if config.data.classes is not None:
    dataset = datasets.select_classes(dataset, config.data.classes)
  return datasets.keep_in_memory(dataset) if config.data.in_memory else dataset


def create_transform(
  config: config_dict.ConfigDict,
) -> transforms.TrainTransform:
  """Returns what makes the config's training images."""
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
  """Returns whether a training image is made of two photographs."""
  return mixing.is_on(config.augment.mixup_alpha, config.augment.cutmix)


def loader_options(config: config_dict.ConfigDict) -> dict[str, Any]:
  """Returns what all loaders of this process have in common."""
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
  """Returns this process's training batches, an endless stream."""
  return loaders.train_batches(
    train_set,
    batch_size=config.batch_size,
    transform=create_transform(config),
    partners=mixes(config),
    seed=config.seed,
    **loader_options(config),
  )


def eval_batches(
  config: config_dict.ConfigDict, test_set: datasets.Dataset
) -> Iterable[steps.Batch]:
  """Returns this process's batches of the test split, from its beginning."""
  return loaders.eval_batches(
    test_set,
    batch_size=config.eval_batch_size,
    transform=transforms.eval_transform(
      config.data.eval_image_size, config.data.eval_crop
    ),
    **loader_options(config),
  )


def create_net(
  config: config_dict.ConfigDict, num_classes: int
) -> hk.TransformedWithState:
  """Returns the config's network.

  Args:
    config: of the run.
    num_classes: K.

  Returns:
    The network as functions of `(images, is_training, image_index=None,
    standardized=False)`; see `models.create`.

  Raises:
    ValueError: if the config names one variant and describes another, as when
      only `model.name` is overridden.
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
      standardized=standardized,
      remat=config.remat,
      **overrides,
    )
    return net(images, is_training, image_index)

  return hk.transform_with_state(forward)
