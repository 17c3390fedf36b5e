"""Part 4: the best CIFAR-10 accuracy of an NFNet in the remaining time.

  python -m experiments.gpu.record

The speed of the training step on this machine sets the number of epochs of
`experiments/cifar10_fast.py`. A run that turns out slower is stopped in time,
and its last checkpoint is evaluated.
"""

import json
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

from absl import flags
from ml_collections import config_dict

from experiments import cifar10_fast
from experiments.gpu import common, data, speed
from nfnets_jax.data import datasets
from nfnets_jax.runtime import logbook
from nfnets_jax.runtime import workdir as workdirs
from nfnets_jax.training import evaluate

# Seconds to start, compile both steps, start the loader and evaluate.
_OVERHEAD = 60.0
# Seconds to save and evaluate a stopped run.
_RESERVE = 35.0
# The share of the step's speed that training reaches.
_SHARE = 0.9


def choose_epochs(rate: float, left: float, images: int) -> float:
  """Returns the whole epochs that fit, at least 2 and at most 200.

  Args:
    rate: images per second of the training step.
    left: remaining seconds.
    images: images per epoch.
  """
  return float(
    min(200, max(2, int((left - _OVERHEAD) * _SHARE * rate / images)))
  )


def train(
  command: list[str], folder: pathlib.Path
) -> tuple[str, dict[str, Any]]:
  """Trains until the end, or stops in time to evaluate the last checkpoint."""
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
  if not stopped:
    raise RuntimeError(f'training ended with {process.returncode}')
  saved = json.loads((folder / 'config.json').read_text())
  report = evaluate.evaluate_checkpoint(config_dict.ConfigDict(saved), folder)
  return 'stopped before its end', report


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
  train_set = datasets.load(
    config.data.name, config.data.train_split, config.data.data_dir
  )
  program = speed.Program(config, config.batch_size, config.data.image_size)
  common.wait_for_turn()
  rate = config.batch_size / statistics.median(program.measure())
  common.add(4, 'step', images_per_second=rate)
  del program
  epochs = choose_epochs(rate, common.seconds_left(), len(train_set))
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
  speeds = [x['images_per_second'] for x in lines if 'images_per_second' in x]
  common.add(
    4,
    'cifar10',
    status=status,
    top_1=report['ema_eval_top_1'],
    weights_top_1=report['eval_top_1'],
    epochs=epochs,
    steps=lines[-1]['step'] if lines else None,
    images_per_second=sorted(speeds)[len(speeds) // 2] if speeds else None,
    data_wait=[
      x['data_wait_seconds'] / x['step_seconds']
      for x in lines
      if 'step_seconds' in x
    ][-1:],
    seconds=round(time.monotonic() - began, 1),
    data=config.data.name,
    command=' '.join(command[1:]),
  )
  shutil.copy(folder / 'metrics.jsonl', common.output() / 'cifar10.jsonl')


if __name__ == '__main__':
  main()
