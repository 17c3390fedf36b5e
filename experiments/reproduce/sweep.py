r"""Runs the trainings of one claim of the paper, or of all, one after another.

  python -m experiments.reproduce.sweep --row=batch-size --scale=small \
    --output=runs/reproduce --data_name=cifar10 --data_dir=DIR

What is finished is skipped and what was interrupted goes on, so the same
command may be given again, also for a row that shares runs with another. The
results gather in `results*.jsonl`, a JSON object a run; with `--slice=2/4` a
machine does its quarter and writes a file of its own into the same folder.

On CPU there are as many runs at a time as there are cores, each in a process on
a core of its own: small nets gain little from a second one.
"""

import argparse
import contextlib
import multiprocessing
import os
import pathlib
import sys
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping
from concurrent import futures
from typing import Any

import jax
from absl import flags
from absl import logging as absl_logging
from ml_collections import config_dict

from experiments.reproduce import latency, results, rows
from nfnets_jax import devices, paths
from nfnets_jax.data import datasets, workers
from nfnets_jax.runtime import interrupt, lock
from nfnets_jax.training import build, check, evaluate, fit, host_memory, train

_CIFAR10 = 'cifar10'


class Sweep:
  """Where runs are made, and by whom.

  Attributes:
    refused: name of a run that this machine cannot make, to the reason, such as
      more devices than images in a batch, or too little memory.
  """

  def __init__(
    self,
    output: pathlib.Path,
    data: Mapping[str, Any],
    part: tuple[int, int] = (1, 1),
    jobs: int = 1,
  ):
    """Reads nothing yet.

    Args:
      output: folder of the results and of the runs.
      data: fields of the config's `data` for the sets that are called cifar10
        or, at `paper`, imagenet2012: `data_dir` and the like; `name` is what
        cifar10 is called there.
      part: which of how many slices, counted from 1.
      jobs: how many runs at a time, each in a process and on a core of its own;
        1 makes them in this process, on what it has.
    """
    self._output = output
    self._data = dict(data)
    self._number, self._slices = part
    self._jobs = jobs
    self.refused: dict[str, str] = {}
    name = f'-{part[0]}-of-{part[1]}' if part[1] > 1 else ''
    self._path = output / f'results{name}.jsonl'

  def missing(
    self, found: list[rows.Run], made: results.Results
  ) -> Iterator[rows.Run]:
    """Yields the runs that have no result yet, or another config's.

    Left out is what was refused here, and what begins with it.
    """
    for run in found:
      if self.refused.keys() & {run.name, run.after}:
        continue
      if rows.find(run, made) is None:
        yield run

  def mine(self, run: rows.Run) -> bool:
    """Tells whether a run is this slice's, with what it begins with."""
    key = (run.after or run.name).encode()
    return zlib.crc32(key) % self._slices == self._number - 1

  def execute(self, row: rows.Row, scale: str) -> int:
    """Makes all of a row's runs that are this slice's.

    Args:
      row: of `rows.ROWS`.
      scale: one of `rows.SCALES`.

    Returns:
      How many runs are missing, which other slices have to make. What cannot be
      made here does not count, nor what begins with its weights.
    """
    began, done = time.monotonic(), 0
    running: dict[futures.Future, rows.Run] = {}
    with self._workers() as workers:
      while True:
        # What is chosen by results is told as soon as they are there.
        made = results.read(self._output)
        missing = list(self.missing(row.runs(scale, made), made))
        to_come = {run.name for run in missing}
        taken = {run.name for run in running.values()}
        mine = [x for x in missing if self.mine(x) and x.name not in taken]
        mine.sort(key=_order)
        if not mine and not running:
          return len(missing)
        for run in mine:
          if len(running) < self._jobs and run.after not in to_come:
            running[workers.submit(self.make, run)] = run
        finished, _ = futures.wait(running, return_when=futures.FIRST_COMPLETED)
        for future in finished:
          run = running.pop(future)
          result = future.result()
          if result['status'] == 'refused':  # another machine may make it
            self.refused[run.name] = result['message']
            print(f'{row.name}: {run.name} cannot be made here', flush=True)
            continue
          results.append(self._path, result)
          done += 1
          minutes = (time.monotonic() - began) / 60
          left = len(mine) + len(taken) - len(finished)
          print(
            f'{row.name}: {_summary(result)}; {done} made in {minutes:.1f} '
            f'minutes, {left} to make, {minutes / done * left:.0f} minutes',
            flush=True,
          )

  @contextlib.contextmanager
  def alone(self) -> Iterator[None]:
    """Keeps other sweeps of the same slice out of the folder."""
    try:
      with lock.hold(self._output, f'{self._path.stem}.lock'):
        yield
    except lock.InUseError as error:
      sys.exit(f'error: {error}')

  @contextlib.contextmanager
  def _workers(self) -> Iterator[futures.Executor]:
    if self._jobs == 1:
      yield _InProcess()
      return
    context = multiprocessing.get_context('spawn')
    cores: Any = context.Queue()
    usable = sorted(os.sched_getaffinity(0))
    for number in range(self._jobs):
      cores.put(usable[number % len(usable)])
    with futures.ProcessPoolExecutor(
      self._jobs, context, initializer=_begin_worker, initargs=(cores,)
    ) as workers:
      try:
        yield workers
      finally:
        workers.shutdown(cancel_futures=True)

  def make(self, run: rows.Run) -> dict[str, Any]:
    """Makes a run, or goes on with it.

    Args:
      run: of a row.

    Returns:
      The result. A run that diverges is a result too: its `status` is
      'diverged', and `message` says at which step and how. That of one that
      this machine cannot make, as its devices do not divide the batch or their
      memory is too small, is 'refused'.
    """
    made = results.read(self._output)
    before = made[run.after] if run.after else None
    config = self.placed(run)
    mark = rows.fingerprint(run, made)
    # Another config of the same name is another run.
    folder = self._output / 'runs' / f'{run.name},{mark}'
    began = time.monotonic()
    result: dict[str, Any] = {
      'name': run.name,
      'labels': dict(run.labels),
      'fingerprint': mark,
      'data': config.data.name,
      'workdir': str(folder.relative_to(self._output)),
    }
    try:
      check.check_config(config, jax.device_count())
    except ValueError as error:
      return result | {'status': 'refused', 'message': str(error)}
    if before is not None:
      config.init_from = str((self._output / before['workdir']).absolute())
    try:
      if before is not None and before['status'] != 'finished':
        raise FloatingPointError(f'{run.after} diverged')
      with (
        (self._output / 'log.txt').open('a') as log,
        contextlib.redirect_stdout(log),
      ):
        report = train.train_and_evaluate(config, folder)
      result |= {'status': 'finished', 'report': report}
      # Of the average; without one it is that of the weights.
      result['top_1'] = report['ema_eval_top_1']
      if run.held_out is not None:
        config.data.test_split = run.held_out
        held_out = evaluate.evaluate_checkpoint(config, folder)
        result['held_out_top_1'] = held_out['ema_eval_top_1']
    except FloatingPointError as error:
      result |= {
        'status': 'diverged',
        'message': str(error).partition(';')[0],
        'top_1': None,
      }
    except (fit.TooLargeError, jax.errors.JaxRuntimeError) as error:
      told = isinstance(error, fit.TooLargeError)
      if not told and 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      with (self._output / 'log.txt').open('a') as log:
        traceback.print_exception(error, file=log)
      message = str(error).partition('\n')[0]
      result |= {'status': 'refused', 'message': message}
    finally:
      jax.clear_caches()  # the next net is another one
    result['seconds'] = round(time.monotonic() - began, 1)
    return result

  def placed(self, run: rows.Run) -> config_dict.ConfigDict:
    """Returns a run's config with what this machine and its data ask for."""
    config = run.config.copy_and_resolve_references()
    data = dict(self._data)
    name = data.pop('name', None)
    if config.data.name == _CIFAR10:
      config.data.name = name or _CIFAR10
    config.data.update(data)
    config.compilation_cache = str(self._output.absolute() / 'compiled')
    return config


def _order(run: rows.Run) -> tuple[float, ...]:
  """Puts runs of one program apart: the second finds it compiled."""
  inputs = build.initial_hyperparams(run.config)
  return run.config.seed, *map(float, inputs.values())


class _InProcess(futures.Executor):
  """Runs what is submitted at once, in this process."""

  def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    future: futures.Future = futures.Future()
    future.set_result(function(*args, **kwargs))
    return future


def _begin_worker(cores: Any) -> None:
  os.sched_setaffinity(0, {cores.get()})  # before jax counts them
  workers.end_with_parent()
  _begin()


def _begin() -> None:
  """Does what `main` of the package does at its beginning."""
  flags.FLAGS.mark_as_parsed()  # Grain reads them
  absl_logging.set_verbosity(absl_logging.WARNING)
  if jax.default_backend() == 'cpu':
    host_memory.keep_freed_memory()


def _summary(result: Mapping[str, Any]) -> str:
  top_1 = result['top_1']
  shown = result['message'] if top_1 is None else f'{100 * top_1:.1f} %'
  return f'{result["name"]}: {shown} ({result["seconds"]:.0f} s)'


def _slice(text: str) -> tuple[int, int]:
  number, _, count = text.partition('/')
  if not (number.isdigit() and count.isdigit()) or not (
    1 <= int(number) <= int(count)
  ):
    raise argparse.ArgumentTypeError(f"'{text}' is no part such as 1/4 or 4/4")
  return int(number), int(count)


def main(argv: list[str] | None = None) -> None:
  """Parses the command line and makes the runs.

  Args:
    argv: arguments; None takes those of the process.
  """
  parser = argparse.ArgumentParser(
    prog='python -m experiments.reproduce.sweep',
    description="The paper's claims, run.",
  )
  parser.add_argument(
    '--row', choices=['all', *rows.ROWS, 'latency'], default='all'
  )
  parser.add_argument('--scale', choices=rows.SCALES, default='small')
  parser.add_argument(
    '--output',
    type=paths.literal_argument,
    default=pathlib.Path('runs/reproduce'),
  )
  parser.add_argument(
    '--data_dir', type=paths.literal_argument, help="of TFDS's data sets"
  )
  parser.add_argument('--data_name', help='what CIFAR-10 is called there')
  parser.add_argument('--num_workers', type=int, help='that decode images')
  parser.add_argument(
    '--jobs', type=int, help='runs at a time; the cores on CPU, else 1'
  )
  parser.add_argument(
    '--slice', type=_slice, default=(1, 1), help='such as 1/4: this quarter'
  )
  parser.add_argument(
    '--list', action='store_true', help='name the runs and make none'
  )
  args = parser.parse_args(argv)
  names = [*rows.ROWS, 'latency'] if args.row == 'all' else [args.row]
  told = {
    'name': args.data_name,
    'data_dir': args.data_dir and str(args.data_dir.absolute()),
    'num_workers': args.num_workers,
  }
  data = {key: value for key, value in told.items() if value is not None}
  jobs = args.jobs
  devices.start_or_exit()
  if jobs is None:
    on_cpu = jax.default_backend() == 'cpu'
    jobs = len(os.sched_getaffinity(0)) if on_cpu else 1
  sweep = Sweep(args.output, data, args.slice, jobs)
  if args.list:
    for name in names:
      if name in rows.ROWS:
        made = results.read(args.output)
        for run in rows.ROWS[name].runs(args.scale, made):
          print(run.name, 'done' if rows.find(run, made) else 'to make')
    return
  if args.scale != 'paper' and names != ['latency']:
    try:
      datasets.load(args.data_name or _CIFAR10, 'train', data.get('data_dir'))
    except (OSError, ValueError) as error:
      sys.exit(f'error: {error}')
  _begin()
  left = 0
  with interrupt.exiting(), sweep.alone():
    try:
      for name in names:
        if name == 'latency':
          if args.slice[0] == 1:
            latency.execute(args.output, args.scale)
        else:
          left += sweep.execute(rows.ROWS[name], args.scale)
    except KeyboardInterrupt as error:  # the workers have saved their runs
      raise interrupt.StoppedError('stopped; the same command goes on') from (
        error
      )
  if left:
    print(
      f'{left} runs are left to other slices; what is chosen by their results '
      'is made by this command again'
    )
  if sweep.refused:
    why = [f'{name}: {reason}' for name, reason in sweep.refused.items()]
    sys.exit(
      '\n  '.join(['error: what cannot be made here:', *why])
      + '\nlog.txt has whole errors; `make report` draws the other runs'
    )
  if left:
    sys.exit(3)


if __name__ == '__main__':
  main()
