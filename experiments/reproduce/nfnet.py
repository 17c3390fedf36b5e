r"""Trains an NFNet on ImageNet as in the paper and compares the result.

  python -m experiments.reproduce.nfnet --workdir=runs/reproduce-f1 \
    --config=experiments/nfnet_imagenet.py:F1

checks the data (if they are not the paper's, it exits with code 2 and the
remedy), trains or resumes, evaluates the weights and their EMA, and writes
`report.json` and `report.md`. With `--rehearse` any data will do, and the
training is killed after its first checkpoint and resumed.
"""

import functools
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
from absl import app, flags
from ml_collections import config_dict

from experiments.benchmarks import peak, programs
from experiments.reproduce import nfnet_report
from nfnets_jax import command_line, paths
from nfnets_jax import main as main_lib
from nfnets_jax.data import datasets, decode, imagenet, reader
from nfnets_jax.runtime import (
  checkpoint,
  interrupt,
  launchers,
  processes,
  progress,
)
from nfnets_jax.runtime import workdir as workdirs
from nfnets_jax.training import train

_REHEARSE = flags.DEFINE_bool(
  'rehearse', False, 'Accept any data; kill the training once and resume it.'
)

_NUM_CLASSES = 1000

_REMEDY = """\
To get ImageNet:
  1. Register at https://image-net.org/download-images and put
       ILSVRC2012_img_train.tar  (147,897,477,120 bytes)
       ILSVRC2012_img_val.tar      (6,744,924,160 bytes)
     into one folder.
  2. make imagenet IMAGENET_DIR=FOLDER
     or, from a copy that TFDS has prepared as TFRecord files,
     make imagenet FROM_TFRECORD=FOLDER
  3. Repeat this command.
For data outside ~/tensorflow_datasets add DATA_DIR=FOLDER to make, else
--config.data.data_dir=FOLDER. To try everything on a few photographs, see
make rehearse-f1."""

_REHEARSAL_REMEDY = """\
A rehearsal needs photographs. Prepare ImageNet or a sample of it,
  make imagenet IMAGENET_DIR=FOLDER
or use another data set and its test split,
  make rehearse-f1 \\
    ARGS='--config.data.name=NAME --config.data.test_split=test[:16]'
or noise:
  make rehearse-f1 ARGS=--config.data.name=fake
For data outside ~/tensorflow_datasets add DATA_DIR=FOLDER."""


class DataError(Exception):
  """The data are not those of the paper; the message has the remedy."""


def check_data(config: config_dict.ConfigDict, rehearse: bool) -> None:
  """Opens both splits and decodes the first and last example of each.

  Args:
    config: of the run.
    rehearse: whether to accept other data than the paper's.

  Raises:
    DataError: if a split is missing, unreadable, empty, or not the paper's.
  """
  name, data_dir = config.data.name, config.data.data_dir
  remedy = _REHEARSAL_REMEDY if rehearse else _REMEDY
  expected = {
    'train_split': imagenet.SPLITS['train'],
    'test_split': imagenet.SPLITS['validation'],
  }
  for field, count in expected.items():
    split = config.data[field]
    try:
      dataset = datasets.load(name, split, data_dir)
      for index in {0, len(dataset) - 1} if len(dataset) else ():
        reader.read_example(
          dataset, index, lambda x: {'image': decode.decode(x['image'])}
        )
    except reader.CorruptExampleError as error:
      if not config.data.skip_corrupt:
        raise DataError(str(error)) from error
    except Exception as error:  # files can be corrupt in many ways
      raise DataError(f'{error}\n\n{remedy}') from error
    found = (len(dataset), dataset.num_classes)
    if not rehearse and found != (count, _NUM_CLASSES):
      raise DataError(
        f'{name} split {split!r} has {found[0]:,} images of {found[1]:,} '
        f'classes; the paper has {count:,} of {_NUM_CLASSES:,}. It may be a '
        f'sample, or another split.\n\n{remedy}'
      )
    if not len(dataset):
      raise DataError(f'{name} split {split!r} has no images\n\n{remedy}')
    print(f'data: {name} {split}, {len(dataset):,} images', flush=True)


def rehearse_training(
  workdir: pathlib.Path, arguments: list[str]
) -> int | None:
  """Trains in a child process, kills it after a checkpoint, and resumes.

  This process must not have initialized the devices, which the children need.

  Args:
    workdir: of the run.
    arguments: of `nfnets_jax.main`.

  Returns:
    The step of the checkpoint, or None if the run already had one.

  Raises:
    SystemExit: if a training fails; it has printed why.
  """
  command = [sys.executable, '-m', 'nfnets_jax.main', *arguments]
  killed = None
  if _newest_checkpoint(workdir) is None:
    with subprocess.Popen(command) as process:
      try:
        while (killed := _newest_checkpoint(workdir)) is None:
          if process.poll() is not None:
            print('error: no checkpoint to resume from', file=sys.stderr)
            sys.exit(process.returncode or 1)
          time.sleep(0.1)
      finally:
        process.send_signal(signal.SIGKILL)
    print(f'killed after the checkpoint of step {killed}', flush=True)
  if code := subprocess.run(command).returncode:
    sys.exit(code)
  return killed


def _newest_checkpoint(workdir: pathlib.Path) -> int | None:
  return max(checkpoint.steps(workdir / 'checkpoints'), default=None)


def main(argv: list[str], arguments: list[str]) -> None:
  """Checks the data, trains, evaluates and reports.

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
      others = launchers.detect(os.environ)
    if others or flags.FLAGS.num_processes:
      raise app.UsageError('a rehearsal needs a single process')
    killed = None
    if workdirs.read_report(workdir) is None:
      words = [word for word in arguments if not _is_rehearse(word)]
      killed = rehearse_training(workdir, words)
    rehearsal = (
      f'It saw {config.data.train_split} for {config.epochs:g} epoch(s); its '
      'accuracy means nothing.'
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
  """Trains, evaluates and writes `report.json` and `report.md`."""
  before = workdirs.read_report(workdir)
  report = train.train_and_evaluate(
    config, workdir, flags.FLAGS.allow_config_change
  )
  progress.say(workdirs.format_report(report, workdir))
  page = workdir / 'report.md'
  if jax.process_index() == 0 and not (report == before and page.exists()):
    page.write_text(
      nfnet_report.format_markdown(
        report,
        config,
        programs.count_macs(config, config.data.image_size),
        peak.measure_tflops(config.compute_dtype),
        rehearsal,
      )
    )
  progress.say(f'comparison with the paper: {page}')


if __name__ == '__main__':
  app.run(
    functools.partial(main, arguments=sys.argv[1:]),
    flags_parser=command_line.parse_flags,
  )
