r"""Trains an NFNet of the paper on ImageNet and sets the result beside it.

  python -m experiments.reproduce.nfnet --workdir=runs/reproduce-f1 \
    --config=experiments/nfnet_imagenet.py:F1

checks the data (exit code 2 and what to do if it is not as in the paper),
trains or resumes, evaluates the weights and their average, and writes
`report.json` and `report.md`. With `--rehearse` the data may be any, and the
training is killed after its first checkpoint and then resumed.
"""

import datetime
import functools
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_dict

from experiments.benchmarks import peak
from experiments.reproduce import paper
from nfnets_jax import command_line, paths
from nfnets_jax import main as main_lib
from nfnets_jax.data import datasets, decode, loader
from nfnets_jax.models import cost
from nfnets_jax.runtime import interrupt, processes, progress
from nfnets_jax.runtime import workdir as workdirs
from nfnets_jax.training import build, train

_REHEARSE = flags.DEFINE_bool(
  'rehearse', False, 'Take any data; kill the training once and resume it.'
)

_NUM_TRAIN, _NUM_TEST, _NUM_CLASSES = 1_281_167, 50_000, 1000

_REMEDY = """\
To get ImageNet:
  1. Register at https://image-net.org/download-images and put
       ILSVRC2012_img_train.tar  (147,897,477,120 bytes)
       ILSVRC2012_img_val.tar      (6,744,924,160 bytes)
     into one folder.
  2. make imagenet IMAGENET_DIR=FOLDER
     or, from a copy that TFDS has prepared as TFRecord files,
     make imagenet FROM_TFRECORD=FOLDER
  3. The same command again.
Data elsewhere than in ~/tensorflow_datasets are found with DATA_DIR=FOLDER for
make, --config.data.data_dir=FOLDER otherwise. To try it all on few photographs,
see make rehearse-f1."""

_REHEARSAL_REMEDY = """\
A rehearsal takes any photographs. Either prepare ImageNet, or a sample of it,
  make imagenet IMAGENET_DIR=FOLDER
or give another data set and its test split,
  make rehearse-f1 \\
    ARGS='--config.data.name=NAME --config.data.test_split=test[:16]'
or none at all, but noise:
  make rehearse-f1 ARGS=--config.data.name=fake
DATA_DIR=FOLDER says where data are that are not in ~/tensorflow_datasets."""


class DataError(Exception):
  """The data are not what the run needs; the message has the remedy."""


def check_data(config: config_dict.ConfigDict, rehearse: bool) -> None:
  """Opens both splits and reads the ends of each.

  Args:
    config: of the run.
    rehearse: whether the data may be other than the paper's.

  Raises:
    DataError: if a split is not there, not readable, or not the paper's.
  """
  name, data_dir = config.data.name, config.data.data_dir
  remedy = _REHEARSAL_REMEDY if rehearse else _REMEDY
  expected = {'train_split': _NUM_TRAIN, 'test_split': _NUM_TEST}
  for field, count in expected.items():
    split = config.data[field]
    try:
      dataset = datasets.load(name, split, data_dir)
      for index in {0, len(dataset) - 1} if len(dataset) else ():
        loader.read_example(
          dataset, index, lambda x: {'image': decode.decode(x['image'])}
        )
    except loader.DamagedExampleError as error:
      if not config.data.skip_corrupt:
        raise DataError(str(error)) from error
    except Exception as error:  # files can be damaged in many ways
      raise DataError(f'{error}\n\n{remedy}') from error
    found = (len(dataset), dataset.num_classes)
    if not rehearse and found != (count, _NUM_CLASSES):
      raise DataError(
        f'{name} split {split!r} has {found[0]:,} images of {found[1]:,} '
        f"classes; the paper's run takes {count:,} of {_NUM_CLASSES:,}. A "
        'sample was prepared there, or another split is asked for.\n\n'
        f'{remedy}'
      )
    if not len(dataset):
      raise DataError(f'{name} split {split!r} has no images\n\n{remedy}')
    print(f'data: {name} {split}, {len(dataset):,} images', flush=True)


def rehearse_training(
  workdir: pathlib.Path, arguments: list[str]
) -> int | None:
  """Trains in another process, kills it after a checkpoint, and resumes.

  This process must not have touched the devices, which the others take.

  Args:
    workdir: of the run.
    arguments: of `nfnets_jax.main`.

  Returns:
    The step of the checkpoint, or None if the run had one before.

  Raises:
    SystemExit: if a training fails; it has said why.
  """
  command = [sys.executable, '-m', 'nfnets_jax.main', *arguments]
  killed = None
  if _newest_checkpoint(workdir) is None:
    with subprocess.Popen(command) as process:
      try:
        while (killed := _newest_checkpoint(workdir)) is None:
          if process.poll() is not None:
            print('error: there was no checkpoint to resume', file=sys.stderr)
            sys.exit(process.returncode or 1)
          time.sleep(0.1)
      finally:
        process.send_signal(signal.SIGKILL)
    print(f'killed after the checkpoint of step {killed}', flush=True)
  if code := subprocess.run(command).returncode:
    sys.exit(code)
  return killed


def _newest_checkpoint(workdir: pathlib.Path) -> int | None:
  folder = workdir / 'checkpoints'
  # A checkpoint gets its name, the step, when it is whole.
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  return max((int(name) for name in names if name.isdigit()), default=None)


def training_macs(config: config_dict.ConfigDict) -> int:
  """Counts the multiply-accumulates of one training image's forward pass."""
  net = build.create_net(config, _NUM_CLASSES)
  px = config.data.image_size
  images = jax.ShapeDtypeStruct((1, px, px, 3), jnp.float32)
  key = jax.random.key(0)
  params, state = jax.eval_shape(
    lambda x: net.init(key, x, is_training=True), images
  )
  return cost.count_macs(
    lambda p, s, x: net.apply(p, s, key, x, is_training=True),
    params,
    state,
    images,
  )


def format_markdown(
  report: Mapping[str, Any],
  config: config_dict.ConfigDict,
  macs: int,
  peak_tflops: float,
  rehearsal: str | None = None,
) -> str:
  """Sets a run beside the paper.

  Args:
    report: of the run, as in `report.json`.
    config: of the run.
    macs: multiply-accumulates of one training image's forward pass.
    peak_tflops: what a large matrix product reaches on one of the devices.
    rehearsal: what was rehearsed, None for the real run.

  Returns:
    A page of Markdown.
  """
  result = paper.RESULTS.get(config.model.name)
  # Forward and backward pass: three times two operations each.
  tflops = 6 * macs / 1e12
  images = paper.DEVICES * paper.IMAGES_PER_DEVICE

  def percent(value: float) -> str:
    return f'{100 * value:.2f} %'

  rows = [
    ('top-1, moving average', percent(report['ema_eval_top_1'])),
    ('top-5, moving average', percent(report['ema_eval_top_5'])),
    ('top-1, weights', percent(report['eval_top_1'])),
    ('top-5, weights', percent(report['eval_top_5'])),
  ]
  published = [''] * 9
  if result is not None:
    published[:2] = [f'{result.top_1:.1f} %', f'{result.top_5:.1f} %']
  speed, devices = report['images_per_second'], report['devices']
  if speed is not None:
    rows += [
      ('training step', f'{1e3 * config.batch_size / speed:,.1f} ms'),
      ('images a step', f'{config.batch_size:,} on {devices}'),
      ('images/s', f'{speed:,.1f}'),
      ('TFLOP/s a device', f'{speed * tflops / devices:,.3f}'),
      (
        'share of its peak',
        f'{percent(speed * tflops / devices / peak_tflops)} of '
        f'{peak_tflops:,.3f} TFLOP/s, measured',
      ),
    ]
    if result is not None and result.step_ms is not None:
      per_second = images / (result.step_ms / 1e3)
      reached = per_second * tflops / paper.DEVICES
      published[4:] = [
        f'{result.step_ms:,.1f} ms',
        f'{images:,} on {paper.DEVICES}',
        f'{per_second:,.1f}',
        f'{reached:,.3f}',
        f'{percent(reached / paper.PEAK_TFLOPS)} of {paper.PEAK_TFLOPS} '
        'TFLOP/s, nominal',
      ]
  cells = [
    f'| {name} | {value} | {beside or "-"} |'
    for (name, value), beside in zip(rows, published, strict=False)
  ]
  lines = [
    f'# {config.model.name} on {config.data.name}',
    '',
    f'**A rehearsal, not a result.** {rehearsal}' if rehearsal else None,
    '' if rehearsal else None,
    '| | this run | the paper |',
    '|---|---|---|',
    *cells,
    '',
    f'The paper: {result.note}.' if result and result.note else None,
    '' if result and result.note else None,
    f'This run: {report["steps"]:,} steps of {config.batch_size:,} images, '
    f'{report["num_params"]:,} parameters, seed {config.seed}, '
    f'{report["eval_count"]:,} test images at {config.data.eval_image_size} '
    f'px, {devices} × {report["device_kind"]}, {config.compute_dtype}, jax '
    f'{jax.__version__}, Python {platform.python_version()}, '
    f'{datetime.date.today()}.',
    '',
    "The paper's speed is that of 32 TPUv3 cores with 32 images each and data "
    'already on the devices. A step counts as six operations for each '
    f'multiply-accumulate of the forward pass, {macs / 1e9:.2f} G an image of '
    f'{config.data.image_size} px.',
    '',
  ]
  return '\n'.join(line for line in lines if line is not None)


def main(argv: list[str], arguments: list[str]) -> None:
  """Checks, trains, evaluates, reports.

  Args:
    argv: the name of the program.
    arguments: the command line as it was typed.
  """
  del argv
  config = flags.FLAGS.config
  with command_line.telling():
    workdir = paths.expand_literal(flags.FLAGS.workdir, '--workdir')
  if flags.FLAGS.mode != 'train':
    raise app.UsageError('evaluate with python -m nfnets_jax.main')
  try:
    check_data(config, _REHEARSE.value)
  except DataError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)

  rehearsal = None
  if _REHEARSE.value:
    with command_line.telling():
      others = processes.detect(os.environ)
    if others or flags.FLAGS.num_processes:
      raise app.UsageError('a rehearsal runs in one process, on one host')
    killed = None
    if workdirs.read_report(workdir) is None:
      words = [word for word in arguments if not _is_rehearse(word)]
      killed = rehearse_training(workdir, words)
    rehearsal = (
      f'It saw {config.data.train_split} for {config.epochs:g} epoch(s); its '
      'accuracies say nothing about the net.'
    )
    if killed is not None:
      rehearsal += f' It was killed after step {killed} and resumed from there.'
  main_lib.start()
  with (
    processes.ending_together(),
    command_line.telling(),
    interrupt.exiting(),
  ):
    report_run(config, workdir, rehearsal)


def _is_rehearse(word: str) -> bool:
  return re.fullmatch(r'--?rehearse(=true)?', word) is not None


def report_run(
  config: config_dict.ConfigDict, workdir: pathlib.Path, rehearsal: str | None
) -> None:
  """Trains, evaluates and reports.

  Args:
    config: of the run.
    workdir: of the run.
    rehearsal: what was rehearsed, None for the real run.
  """
  before = workdirs.read_report(workdir)
  report = train.train_and_evaluate(
    config, workdir, flags.FLAGS.allow_config_change
  )
  progress.say(workdirs.format_report(report, workdir))
  page = workdir / 'report.md'
  if jax.process_index() == 0 and not (report == before and page.exists()):
    page.write_text(
      format_markdown(
        report,
        config,
        training_macs(config),
        peak.measure_tflops(config.compute_dtype),
        rehearsal,
      )
    )
  progress.say(f'beside the paper: {page}')


if __name__ == '__main__':
  app.run(
    functools.partial(main, arguments=sys.argv[1:]),
    flags_parser=command_line.parse_flags,
  )
