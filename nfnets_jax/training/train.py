"""The training loop, read from top to bottom."""

import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Iterable
from typing import Any

import haiku as hk
import jax
import tqdm
from jax.experimental import multihost_utils
from ml_collections import config_dict

from nfnets_jax import models
from nfnets_jax.data import datasets, prepare, transforms
from nfnets_jax.data import loader as loaders
from nfnets_jax.training import checkpoint, evaluate, metrics, parallel
from nfnets_jax.training import optimizer as optimizers
from nfnets_jax.training import train_step as steps
from nfnets_jax.training import workdir as workdirs


def train_and_evaluate(
  config: config_dict.ConfigDict,
  workdir: str | pathlib.Path,
  allow_config_change: bool = False,
) -> dict[str, Any]:
  """Trains a network and evaluates it, or goes on with what was begun.

  Args:
    config: of the run; `experiments/base.py` documents the fields.
    workdir: receives `config.json`, `metrics.jsonl`, `tensorboard/`,
      `checkpoints/`, `curves.png` and, at the end, `report.json`. A run that
      was interrupted there goes on after its newest checkpoint; a finished one
      is reported as it is.
    allow_config_change: whether a run begun under another config may go on.

  Returns:
    The report: `steps`, `eval_top_1`, `eval_top_5`, `eval_loss`, the same with
    the prefix `ema_`, `eval_count`, `images_per_second` and `num_params`.
    Accuracies are fractions.

  Raises:
    ValueError: if the config is impossible, or the folder another config's.
    FloatingPointError: if the loss or the gradient norm is not finite; the
      message names the step and the last good checkpoint.
  """
  # Set up.
  workdir = pathlib.Path(workdir)
  check_batch_sizes(config, jax.device_count())
  first_process = jax.process_index() == 0
  workdirs.claim(workdir, config, allow_config_change, write=first_process)

  # Data.
  train_set, test_set = load_data(config)
  epoch_steps = len(train_set) / config.batch_size
  total_steps = round(config.epochs * epoch_steps)
  report = workdirs.read_report(workdir)
  if report is not None and report['steps'] == total_steps:
    print(f'this run is finished after {total_steps} steps', flush=True)
    return report
  loader = loaders.train_batches(
    train_set,
    batch_size=config.batch_size * config.augment.raw_per_image,
    transform=transforms.train_transform(
      config.data.image_size, config.data.crop, config.data.flip
    ),
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    num_threads=config.data.num_threads,
  )
  test_batches = functools.partial(eval_batches, config, test_set)

  # Model, optimiser and steps.
  net = create_net(config, train_set.num_classes)
  schedule = optimizers.warmup_cosine(
    config.optimizer.learning_rate_per_256 * config.batch_size / 256,
    config.optimizer.warmup_epochs * epoch_steps,
    total_steps,
  )
  optimizer = optimizers.create_optimizer(config.optimizer, schedule)
  state = parallel.replicate(
    steps.init_state(net, optimizer, config.seed, config.data.image_size)
  )
  num_params = hk.data_structures.tree_size(state.params)
  train_step = parallel.parallel_train_step(
    steps.create_train_step(
      net, optimizer, schedule, config, train_set.num_classes, parallel.AXIS
    )
  )
  eval_step = parallel.parallel_eval_step(
    steps.create_eval_step(net, config, parallel.AXIS)
  )

  # Restore.
  checkpoints = checkpoint.Checkpointer(
    workdir / 'checkpoints', config.keep_checkpoints
  )
  start = 0
  if checkpoints.latest_step is not None:
    state, loader_state = checkpoints.restore(state)
    loader.set_state(loader_state)
    start = int(state.step)
    print(f'resumed after step {start}', flush=True)
  writer = metrics.Writer(workdir, start) if first_process else None
  print(
    f'{config.model.name}: {num_params:,} parameters; {config.data.name}: '
    f'{len(train_set):,} images; {total_steps:,} steps of '
    f'{config.batch_size} images on {jax.device_count()} '
    f'{jax.devices()[0].platform} device(s)',
    flush=True,
  )

  # Loop.
  eval_every = max(1, round(config.eval_every_epochs * epoch_steps))
  checkpoint_every = max(1, round(config.checkpoint_every_epochs * epoch_steps))
  window = metrics.Window(config.batch_size)
  progress = Progress(start, total_steps, config.batch_size)
  results: dict[str, float] = {}
  try:
    for step in range(start + 1, total_steps + 1):
      state, step_metrics = train_step(state, parallel.shard(next(loader)))
      window.push(step, step_metrics)
      progress.advance()
      if step == start + 1:
        window.pause()
        window.resume(forget=True)  # it was spent compiling
      last = step == total_steps
      if last or step % config.log_every_steps == 0:
        means = window.summarize()
        progress.show(step, step / epoch_steps, means)
        if writer:
          writer.write(step, 'train', means)
      if last or step % eval_every == 0:
        window.pause()
        results = evaluate.evaluate(eval_step, state, test_batches())
        progress.show(step, step / epoch_steps, results)
        if writer:
          writer.write(step, 'test', results)
        window.resume()
      # Last, so that what was measured up to a checkpoint is on record.
      if last or step % checkpoint_every == 0:
        window.pause()  # so that only a state known to be finite is kept
        spread = parallel.replica_spread((state.params, state.opt_state))
        if spread != 0:
          raise RuntimeError(
            f'the copies of the state on {jax.device_count()} devices differ '
            f'by {spread} at step {step}; this is a fault in the training step '
            'or of a device'
          )
        checkpoints.save(step, state, loader.get_state())
        window.resume()
  except FloatingPointError as error:
    checkpoints.wait()
    kept = checkpoints.latest_step
    where = f'step {kept}' if kept is not None else 'none yet'
    raise FloatingPointError(
      f'{error}; last good checkpoint in {workdir / "checkpoints"}: {where}. '
      'Lower optimizer.learning_rate_per_256 or optimizer.clipping, or raise '
      'optimizer.warmup_epochs'
    ) from error
  finally:
    progress.close()
    loader.close()
    checkpoints.close()
    if writer:
      writer.close()

  # Report.
  if not results:  # every step had been made, but the report was not written
    results = evaluate.evaluate(eval_step, state, test_batches())
  speeds = [
    line['images_per_second']
    for line in metrics.read(workdir)
    if 'images_per_second' in line
  ]
  report = {
    'model': config.model.name,
    'data': config.data.name,
    'steps': total_steps,
    **results,
    'images_per_second': statistics.median(speeds) if speeds else None,
    'num_params': num_params,
  }
  if first_process:
    metrics.plot_curves(workdir)
    workdirs.write_json(workdir / 'report.json', report)
  return report


def evaluate_checkpoint(
  config: config_dict.ConfigDict, workdir: str | pathlib.Path
) -> dict[str, float]:
  """Evaluates the newest checkpoint of a run on its test split.

  Args:
    config: of the run; fields of the evaluation, such as
      `data.eval_image_size`, may differ from those of the training.
    workdir: of the run.

  Returns:
    As `evaluate.evaluate`.

  Raises:
    FileNotFoundError: if there is no checkpoint.
  """
  check_batch_sizes(config, jax.device_count())
  directory = pathlib.Path(workdir) / 'checkpoints'
  if not directory.is_dir():
    raise FileNotFoundError(
      f'there is no run to evaluate in {workdir}; train first'
    )
  _, test_set = load_data(config)
  net = create_net(config, test_set.num_classes)
  optimizer = optimizers.create_optimizer(config.optimizer, lambda step: 0.0)
  state = parallel.replicate(
    steps.init_state(net, optimizer, config.seed, config.data.image_size)
  )
  checkpoints = checkpoint.Checkpointer(directory, config.keep_checkpoints)
  state, _ = checkpoints.restore(state)
  checkpoints.close()
  eval_step = parallel.parallel_eval_step(
    steps.create_eval_step(net, config, parallel.AXIS)
  )
  return evaluate.evaluate(eval_step, state, eval_batches(config, test_set))


def check_batch_sizes(config: config_dict.ConfigDict, devices: int) -> None:
  """Raises a ValueError if a batch cannot be split over the devices."""
  for name in ('batch_size', 'eval_batch_size'):
    if config[name] % devices:
      raise ValueError(
        f'{name} {config[name]} is not divisible by {devices} devices; use a '
        f'multiple of {devices}'
      )
  mixes = config.augment.mixup_alpha is not None, config.augment.cutmix
  if all(mixes) and config.batch_size // devices % 2:
    raise ValueError(
      f'batch_size {config.batch_size} leaves {config.batch_size // devices} '
      f'images for each of {devices} devices; MixUp and CutMix share a batch '
      'evenly, so use an even number'
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
    datasets.load(name, config.data.train_split, data_dir),
    datasets.load(name, config.data.test_split, data_dir),
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
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    num_threads=config.data.num_threads,
  )


def create_net(
  config: config_dict.ConfigDict, num_classes: int
) -> hk.TransformedWithState:
  """Returns the config's network as functions of `(images, is_training)`."""
  overrides = {k: v for k, v in config.model.items() if k != 'name'}

  def forward(images: jax.Array, is_training: bool) -> dict[str, jax.Array]:
    net = models.create(config.model.name, num_classes, **overrides)
    return net(images, is_training)

  return hk.transform_with_state(forward)


# What people watch; `metrics.jsonl` has the rest.
_SHOWN = (
  'loss',
  'top_1',
  'learning_rate',
  'images_per_second',
  'eval_top_1',
  'ema_eval_top_1',
  'eval_loss',
  'ema_eval_loss',
)


class Progress:
  """A bar where a person watches, plain lines where not."""

  def __init__(self, start: int, total: int, batch_size: int):
    """Starts at step `start` of `total`, each of `batch_size` images."""
    self._start, self._total = start, total
    self._began = time.monotonic()
    self._bar = None
    if sys.stderr.isatty() and jax.process_index() == 0:
      self._bar = tqdm.tqdm(
        total=total,
        initial=start,
        unit=' images',
        unit_scale=batch_size,
        dynamic_ncols=True,
      )

  def advance(self) -> None:
    """Counts a step."""
    if self._bar is not None:
      self._bar.update()

  def show(self, step: int, epoch: float, values: dict[str, float]) -> None:
    """Shows the newest values."""
    text = ', '.join(
      f'{name} {_format(values[name])}' for name in _SHOWN if name in values
    )
    if self._bar is not None:
      self._bar.write(f'step {step}, epoch {epoch:.1f}: {text}')
    elif jax.process_index() == 0:
      seconds = time.monotonic() - self._began
      eta = seconds / (step - self._start) * (self._total - step)
      print(
        f'step {step}/{self._total}, epoch {epoch:.1f}: {text}, '
        f'ETA {eta:.0f} s',
        flush=True,
      )

  def close(self) -> None:
    """Leaves the bar as it is."""
    if self._bar is not None:
      self._bar.close()


def _format(value: float) -> str:
  return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'
