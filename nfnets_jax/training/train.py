"""The training loop."""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import haiku as hk
import jax
import numpy as np
import optax
from ml_collections import config_dict

from nfnets_jax import paths, weights
from nfnets_jax.runtime import (
  checkpoint,
  integrity,
  interrupt,
  lock,
  logbook,
  meters,
  parallel,
  processes,
  profile,
  progress,
)
from nfnets_jax.runtime import workdir as workdirs
from nfnets_jax.training import (
  build,
  check,
  ema,
  evaluate,
  init_from,
  programs,
  schedules,
  train_step,
)
from nfnets_jax.training import config as configs

_REMEDY = (
  'Lower optimizer.learning_rate_per_256 or optimizer.clipping, or raise '
  'optimizer.warmup_epochs'
)


def train_and_evaluate(
  config: config_dict.ConfigDict,
  workdir: paths.PathLike,
  allow_config_change: bool = False,
  profile_steps: int = 0,
) -> dict[str, Any]:
  """Trains a network and evaluates it, resuming an existing run.

  Args:
    config: config of the run; `training/config.py` documents the fields.
    workdir: folder, perhaps `gs://…` or `s3://…`, that receives `config.json`,
      `data.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `curves.png`
      and, at the end, `report.json`. An interrupted run resumes from its newest
      checkpoint; a finished run returns its report.
    allow_config_change: whether to resume with another config or other data.
    profile_steps: number of steps to trace into `tensorboard/`; 0 is off.

  Returns:
    The report: `steps`, `eval_top_1`, `eval_top_5`, `eval_loss`, the same with
    the prefix `ema_`, `eval_count`, `images_per_second`, `num_params`,
    `batch_size`, `num_classes`, `devices` and `device_kind`; the number of
    corrupt examples `skipped` in training and `eval_skipped` in the test split;
    the number of skipped `nonfinite` steps. Accuracies are fractions.

  Raises:
    ValueError: for an invalid config, or a folder with another config or data.
    lock.InUseError, lock.LostError: if another process trains in the folder.
    FloatingPointError: if the loss or gradient norm is not finite, or the loss
      exceeds `max_loss`; names the step and the last good checkpoint.
    interrupt.StoppedError: after a checkpoint, on SIGTERM or SIGINT.
  """
  folder = paths.expand_literal(workdir, '--workdir')
  config = configs.keep_derived(config, workdirs.read_config(folder))
  check.check_config(config, jax.device_count())
  processes.agree('the config', config.to_json())
  same_run = workdirs.check(folder, config, allow_config_change)
  first_process, several = jax.process_index() == 0, jax.process_count() > 1
  begun = bool(checkpoint.steps(folder / 'checkpoints'))
  processes.agree(f'what has begun in {folder}, a folder to share,', begun)
  if config.init_from is not None and not begun:
    weights.locate(config.init_from, config.model.name, 'config.init_from')

  # Data.
  train_set, test_set = build.load_data(config)
  config = configs.derive(config, len(train_set), jax.device_count())
  check.check_batch(config, jax.device_count(), len(train_set))
  epoch_steps = len(train_set) / config.batch_size
  total_steps = schedules.count_steps(config.epochs, epoch_steps)
  data = build.describe_data(train_set, test_set)
  processes.agree('the data set', data)
  same_run &= workdirs.check_data(folder, data, allow_config_change)
  report = workdirs.read_report(folder)
  processes.agree(f'report.json in {folder}, to be shared,', report)
  if same_run and report is not None:
    progress.say(f'this run is finished after {report["steps"]} steps')
    return report
  loader = build.train_batches(config, train_set)
  test_batches = functools.partial(build.eval_batches, config, test_set)

  # Model and optimizer.
  net = build.create_net(config, train_set.num_classes)
  optimizer = build.create_optimizer(
    config, build.create_schedule(config, epoch_steps)
  )
  classes = None if begun else train_set.class_names
  state = parallel.replicate(_init_state(config, net, optimizer, classes))
  num_params = hk.data_structures.tree_size(state.params)

  with contextlib.ExitStack() as stack:
    stack.callback(loader.close)
    # Process 0 is the only writer.
    held = stack.enter_context(lock.hold(folder)) if first_process else None

    # Restore.
    kept = folder / 'checkpoints'
    processes.check_shared(kept)
    processes.agree(f'what is in {kept}', checkpoint.steps(kept))
    checkpoints = checkpoint.Checkpointer(kept, config.keep_checkpoints)
    stack.callback(checkpoints.close)
    start = 0
    if checkpoints.latest_step is not None:
      state, loader_state = checkpoints.restore(state)
      loader.set_state(loader_state)
      start = int(state.step)
      progress.say(f'resumed after step {start}')
    if several:
      # jax versions or device kinds may differ between processes.
      processes.agree('the state', integrity.fingerprint_of(state, {}))
    if start > total_steps:
      raise ValueError(
        f'the run in {folder} has made {start} steps, and this config asks '
        f'for {total_steps}; raise epochs, or use another --workdir'
      )
    window = meters.Window(
      config.batch_size, config.optimizer.skip_nonfinite, config.max_loss
    )
    profiler = stack.enter_context(
      profile.Profile(folder, start, total_steps, profile_steps, window)
    )

    # Steps, compiled before anything is written.
    programs.keep_compiled(config, folder)
    compiling = stack.enter_context(meters.CompileTimes())
    step_fn = programs.compile_train_step(
      config, net, state, train_set.num_classes, epoch_steps
    )
    eval_fn = programs.compile_eval_step(config, net, state)
    progress.say(str(compiling))

    writer = None
    if first_process:
      # Not earlier, so that a failing config leaves no files.
      workdirs.record(folder, config)
      workdirs.write_json(folder / 'data.json', data)
      writer = stack.enter_context(logbook.Writer(folder, start))
    progress.say(
      f'{config.model.name}: {num_params:,} parameters; {config.data.name}: '
      f'{len(train_set):,} images; {total_steps:,} steps of '
      f'{config.batch_size} images on {jax.device_count()} '
      f'{jax.devices()[0].platform} device(s)'
    )

    # Loop.
    eval_every = max(1, round(config.eval_every_epochs * epoch_steps))
    save_every = max(1, round(config.checkpoint_every_epochs * epoch_steps))
    bar = stack.enter_context(
      progress.Progress(start, total_steps, config.batch_size)
    )

    def log(step: int, split: str, values: dict[str, float]) -> None:
      bar.show(step, step / epoch_steps, values)
      if writer:
        writer.write(step, split, values)

    def is_due(step: int) -> bool:
      return step == total_steps or step % eval_every == 0

    def evaluate_at(step: int) -> dict[str, float]:
      with window.paused('evaluation'):
        try:
          results = evaluate.evaluate(eval_fn, state, test_batches())
        except FloatingPointError as error:
          checkpoints.wait()
          if checkpoints.latest_step != step:
            raise
          raise _EvaluationError(
            f'{error} at step {step}; to go on from an earlier checkpoint, '
            f'move {kept / str(step)} away. {_REMEDY}'
          ) from error
      log(step, 'test', results)
      return results

    signals = stack.enter_context(interrupt.Signals())
    stack.enter_context(_advice(checkpoints, folder))
    results: dict[str, float] = {}
    if start and is_due(start) and not _is_evaluated(folder, start):
      results = evaluate_at(start)  # such as after a kill
    for step in range(start + 1, total_steps + 1):
      with profiler.step(step):
        with window.waiting():
          batch = next(loader)
        if several:
          batch['stop'] = _stop_votes(signals)
        state, metrics = step_fn(state, parallel.shard(batch))
        window.push(step, metrics)
      bar.advance()
      if step == start + 1:
        window.forget_time()  # the first step loads the program
      # All processes stop at the same step, once the vote is fetched.
      stop = window.stop_requested if several else signals.received
      last = step == total_steps
      save = last or stop or step % save_every == 0
      # Also at a checkpoint, so that a resumed run averages the same steps.
      if save or step % config.log_every_steps == 0:
        checkpoints.check()
        if held:
          held.check()
        means = window.summarize()
        means['ema_distance'] = _ema_distance(state)
        log(step, 'train', means)
      # Before the evaluation, for which a stopped run may lack the time.
      if save:
        if writer:
          writer.flush()
        with window.paused('checkpoint'):  # all steps so far were finite
          check_replicas(state, step)
          if held:
            held.check()
          checkpoints.save(step, state, loader.get_state())
      if stop and not last:
        checkpoints.wait()
        raise interrupt.StoppedError(
          f'{signals.received or "another process"} stopped the run after '
          f'step {step}; the same command goes on'
        )
      if is_due(step):
        results = evaluate_at(step)

    # Report, once the last checkpoint is on disk.
    with window.waiting('checkpoint'):
      checkpoints.wait()
    progress.say(window.describe_waits())
    if not results:  # resumed after the last step
      results = evaluate.evaluate(eval_fn, state, test_batches())
    if writer:
      writer.flush()  # the report and the curves are of all metrics
    report = {
      **_describe(config),
      'steps': total_steps,
      'num_classes': train_set.num_classes,
      **results,
      'num_params': num_params,
      **logbook.totals(folder),
      'eval_skipped': len(test_set) - results['eval_count'],
    }
    if first_process:
      logbook.plot_curves(folder)
      workdirs.write_json(folder / 'report.json', report)
  return report


def _is_evaluated(folder: paths.Path, step: int) -> bool:
  """Returns whether process 0 sees results of the test set at a step."""
  return processes.all_agree(
    jax.process_index() != 0
    or any(
      (x['step'], x['split']) == (step, 'test') for x in logbook.read(folder)
    )
  )


class _EvaluationError(FloatingPointError):
  """The evaluation of a state that is already in a checkpoint diverged."""


def _init_state(
  config: config_dict.ConfigDict,
  net: hk.TransformedWithState,
  optimizer: optax.GradientTransformation,
  class_names: Sequence[str] | None,
) -> train_step.TrainState:
  """Returns the state at step 0, from `init_from` if class names are given."""
  state = train_step.init_state(
    net, optimizer, config.seed, config.data.image_size
  )
  if config.init_from is None or class_names is None:
    return state
  return init_from.initialize(config, state, class_names)


def _describe(config: config_dict.ConfigDict) -> dict[str, Any]:
  """Returns what a report tells of the config and the devices."""
  return {
    'model': config.model.name,
    'data': config.data.name,
    'batch_size': config.batch_size,
    'devices': jax.device_count(),
    'device_kind': jax.devices()[0].device_kind,
  }


def _ema_distance(state: train_step.TrainState) -> float:
  """Returns `ema.distance`; reads all parameters, and blocks."""
  pair = (state.ema_params, state.params)
  return float(ema.distance(*jax.tree.map(parallel.local_copy, pair)))


@contextlib.contextmanager
def _advice(
  checkpoints: checkpoint.Checkpointer, workdir: paths.Path
) -> Iterator[None]:
  """Adds the last good checkpoint and a remedy to divergence errors."""
  try:
    yield
  except _EvaluationError:
    raise
  except FloatingPointError as error:
    checkpoints.wait()
    kept = checkpoints.latest_step
    where = f'step {kept}' if kept is not None else 'none yet'
    raise FloatingPointError(
      f'{error}; last good checkpoint in {workdir / "checkpoints"}: {where}. '
      f'{_REMEDY}'
    ) from error


def _stop_votes(signals: interrupt.Signals) -> np.ndarray:
  """Returns this process's request to stop, as an array of the batch."""
  votes = np.zeros(jax.local_device_count(), np.int32)
  votes[0] = signals.received is not None
  return votes


def check_replicas(state: train_step.TrainState, step: int) -> None:
  """Raises if the replicas differ or are not finite."""
  spread = parallel.replica_spread(state)
  if math.isnan(spread):
    raise FloatingPointError(f'the state is not finite at step {step}')
  if spread != 0:
    raise RuntimeError(
      f'the copies of the state on {jax.device_count()} devices differ by '
      f'{spread} at step {step}; this is a fault in the training step or of a '
      'device'
    )
