"""Part 4: the best CIFAR-10 accuracy of an NFNet in the remaining time.

  python -m experiments.gpu.record

Trains an epoch of `experiments/cifar10_fast.py`, whose speed sets the number of
epochs of the run. A run that is slower is stopped in time, and its last
checkpoint evaluated.
"""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax
from absl import flags
from ml_collections import config_dict

from experiments import cifar10_fast
from experiments.gpu import common, data
from nfnets_jax.runtime import checkpoint, logbook, parallel
from nfnets_jax.runtime import workdir as workdirs
from nfnets_jax.training import build, evaluate, programs, train_step

# Seconds to start, compile with tuned kernels, and evaluate.
_OVERHEAD = 60.0
# Seconds to save and evaluate a stopped run.
_RESERVE = 35.0
# Fraction of the measured speed that a run reaches.
_FRACTION = 0.9


def choose_epochs(rate: float, left: float, images: int) -> float:
  """Returns the whole epochs that fit, at least 2 and at most 200.

  Args:
    rate: images per second of training.
    left: remaining seconds.
    images: images per epoch.
  """
  fitting = int((left - _OVERHEAD) * _FRACTION * rate / images)
  return float(min(200, max(2, fitting)))


def measure(config: config_dict.ConfigDict) -> tuple[float, int]:
  """Compiles, waits for its turn, and trains for an epoch.

  The compilation cache then has the evaluation step and, as only the schedule
  of the run differs, the tuned kernels of its training step.

  Returns:
    The images per second, input pipeline included, and the images per epoch.
  """
  train_set, _ = build.load_data(config)
  size, count = config.batch_size, len(train_set)
  net = build.create_net(config, train_set.num_classes)
  optimizer = build.create_optimizer(
    config, build.create_schedule(config, count / size)
  )
  state = parallel.replicate(
    train_step.init_state(net, optimizer, 0, config.data.image_size)
  )
  step = programs.compile_train_step(
    config, net, state, train_set.num_classes, count / size
  )
  programs.compile_eval_step(config, net, state)
  loader = build.train_batches(config, train_set)
  for _ in range(-(-count // size)):  # the first epoch decodes
    batch = next(loader)
  state, metrics = step(state, parallel.shard(batch))
  jax.block_until_ready(metrics)
  common.wait_for_turn()
  began = time.monotonic()
  for _ in range(count // size):
    state, metrics = step(state, parallel.shard(next(loader)))
  jax.block_until_ready(metrics)
  seconds = time.monotonic() - began
  loader.close()
  return count // size * size / seconds, count


def train(
  command: list[str], folder: pathlib.Path
) -> tuple[str, dict[str, Any] | None]:
  """Runs a command, or stops it in time to evaluate its last checkpoint.

  Returns:
    How it ended, and its report; None if there is no checkpoint.
  """
  stopped = False
  with subprocess.Popen(command) as process:
    while process.poll() is None:
      time.sleep(0.2)
      if not stopped and common.seconds_left() < _RESERVE:
        stopped = True
        process.send_signal(signal.SIGTERM)
  report = workdirs.read_report(folder)
  if report is not None:
    return 'finished', report
  status = f'ended with {process.returncode}'
  if stopped:
    status = 'stopped before its end'
  if not checkpoint.steps(folder / 'checkpoints'):
    return f'{status}, without a checkpoint', None
  saved = json.loads((folder / 'config.json').read_text())
  report = evaluate.evaluate_checkpoint(config_dict.ConfigDict(saved), folder)
  return status, report


def summarize(
  status: str, report: dict[str, Any] | None, lines: list[dict[str, Any]]
) -> dict[str, Any]:
  """Returns the result of a run.

  Args:
    status: how it ended.
    report: its report; None if there is no checkpoint.
    lines: lines of its `metrics.jsonl`.
  """
  timed = [x for x in lines if 'step_seconds' in x]
  last = timed[-1] if timed else {}
  return {
    'status': status,
    'top_1': report and report['ema_eval_top_1'],
    'weights_top_1': report and report['eval_top_1'],
    'steps': last.get('step'),
    'last_loss': last.get('loss'),
    'images_per_second': last.get('images_per_second'),
    'data_wait': (
      last['data_wait_seconds'] / last['step_seconds'] if last else None
    ),
  }


def main() -> None:
  """Trains for the remaining time and records the accuracy."""
  flags.FLAGS.mark_as_parsed()  # Grain reads them
  config = cifar10_fast.get_config()
  folder = common.scratch() / 'cifar10'
  changes: dict[str, Any] = {f'data.{k}': v for k, v in data.fields().items()}
  if common.dry_run():
    changes |= {
      'batch_size': 32,
      'eval_batch_size': 32,
      'data.num_workers': 2,
      'data.train_split': 'train[:256]',
      'data.test_split': 'test[:64]',
      'model.width': (32, 32, 32),
      'model.group_width': (16, 16, 16),
      'model.depth': (1, 1, 1),
      'model.stem_width': (8,),
      'model.stem_strides': (2,),
    }
  config.update_from_flattened_dict(changes)
  rate, images = measure(config)
  common.add(4, 'training speed', images_per_second=rate)
  epochs = choose_epochs(rate, common.seconds_left(), images)
  if common.dry_run():
    epochs = 2.0
  changes |= {
    'epochs': epochs,
    'eval_every_epochs': epochs,
    'checkpoint_every_epochs': epochs / 5,
    'optimizer.warmup_epochs': min(5.0, epochs / 8),
  }
  command = [
    sys.executable,
    '-m',
    'nfnets_jax.main',
    '--config=experiments/cifar10_fast.py',
    f'--workdir={folder}',
    *(f'--config.{field}={value}' for field, value in changes.items()),
  ]
  began = time.monotonic()
  status, report = train(command, folder)
  lines = logbook.read(folder)
  common.add(
    4,
    'cifar10',
    **summarize(status, report, lines),
    epochs=epochs,
    seconds=round(time.monotonic() - began, 1),
    data=config.data.name,
    command=' '.join(command[1:]),
  )
  if lines:
    shutil.copy(folder / 'metrics.jsonl', common.output() / 'cifar10.jsonl')
  if report is None:
    sys.exit(f'the run {status}')


if __name__ == '__main__':
  main()
