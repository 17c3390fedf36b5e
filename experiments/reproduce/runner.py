"""Runs the trainings of a claim, several at a time, and records the results."""

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

from experiments.reproduce import claim as claims_lib
from experiments.reproduce import results, scales, small_nets
from nfnets_jax.data import workers
from nfnets_jax.runtime import lock, logbook
from nfnets_jax.training import build, check, evaluate, fit, host_memory, train

CIFAR10 = 'cifar10'
_HELD_OUT = 'train[64:128]'  # of a rehearsal
_FOLDER = 'folder:'  # of a data set's name; TFDS has name:version


class Runner:
  """Makes the runs of claims on this machine.

  Attributes:
    refused: reasons, by name, of the runs that this machine cannot make, such
      as too little memory or devices that do not divide the batch.
  """

  def __init__(
    self,
    output: pathlib.Path,
    data: Mapping[str, Any],
    part: tuple[int, int] = (1, 1),
    jobs: int = 1,
    minutes: float | None = None,
    rehearse: bool = False,
  ):
    """Reads nothing yet.

    Args:
      output: folder of the results and of the runs.
      data: fields of the config's `data` on this machine, such as `data_dir`;
        `name` is the name of CIFAR-10 there, at `paper` of the data set that
        stands in for JFT-300M; 'folder:DIR' is a folder of photographs.
      part: which of how many slices, from (1, n) to (n, n).
      jobs: runs at a time, each in a process pinned to one core; 1 runs in this
        process on all cores and devices.
      minutes: after which a claim starts no more runs; None is no limit.
      rehearse: make each run with `small_nets.shrink`.

    Raises:
      ValueError: if the folder has results of a rehearsal and this is none, or
        the other way round.
    """
    self._output = output
    self._data = dict(data)
    self._number, self._slices = part
    self._jobs = jobs
    self._minutes = minutes
    self._rehearse = rehearse
    kinds = {x.get('rehearsal', False) for x in results.read(output).values()}
    if kinds - {rehearse}:
      kind = 'real results' if rehearse else 'results of a rehearsal'
      raise ValueError(f'{output} has {kind}; use another --output')
    self.refused: dict[str, str] = {}
    name = f'-{part[0]}-of-{part[1]}' if part[1] > 1 else ''
    self._path = output / f'results{name}.jsonl'

  def missing(
    self, runs: list[claims_lib.Run], made: results.Results
  ) -> Iterator[claims_lib.Run]:
    """Yields the runs without a result, but for those refused here."""
    for run in runs:
      if self.refused.keys() & {run.name, run.after}:
        continue
      if claims_lib.find(run, made) is None:
        yield run

  def owns(self, run: claims_lib.Run) -> bool:
    """Returns whether a run and what it starts from are in this slice."""
    key = (run.after or run.name).encode()
    return zlib.crc32(key) % self._slices == self._number - 1

  def execute(self, claim: claims_lib.Claim, scale: str) -> int:
    """Makes all runs of a claim that are in this slice.

    Args:
      claim: of `claims.CLAIMS`.
      scale: one of `scales.SCALES`.

    Returns:
      The number of runs left to other slices, or for want of time; refused runs
      do not count.
    """
    began, done = time.monotonic(), 0
    running: dict[futures.Future, claims_lib.Run] = {}
    with self._workers() as workers:
      while True:
        # New results may add runs, such as those with the best λ.
        made = results.read(self._output)
        missing = list(self.missing(claim.runs(scale, made), made))
        waiting_for = {run.name for run in missing}
        started = {run.name for run in running.values()}
        todo = [x for x in missing if self.owns(x) and x.name not in started]
        todo.sort(key=_order)
        minutes = (time.monotonic() - began) / 60
        if self._minutes is not None and minutes >= self._minutes and todo:
          print(
            f'{claim.name}: {len(todo)} runs are left after '
            f'{self._minutes:g} minutes',
            flush=True,
          )
          todo = []
        if not todo and not running:
          return len(missing)
        for run in todo:
          if len(running) < self._jobs and run.after not in waiting_for:
            running[workers.submit(self.make, run)] = run
        finished, _ = futures.wait(running, return_when=futures.FIRST_COMPLETED)
        for future in finished:
          run = running.pop(future)
          result = future.result()
          if result['status'] == 'refused':  # another machine may make it
            self.refused[run.name] = result['message']
            print(f'{claim.name}: {run.name} cannot run here', flush=True)
            continue
          results.append(self._path, result)
          done += 1
          minutes = (time.monotonic() - began) / 60
          left = len(todo) + len(started) - len(finished)
          print(
            f'{claim.name}: {_summary(result)}; {done} done in {minutes:.1f} '
            f'minutes, {left} left, {minutes / done * left:.0f} minutes',
            flush=True,
          )

  @contextlib.contextmanager
  def alone(self) -> Iterator[None]:
    """Locks the folder against other sweeps of the same slice."""
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
      self._jobs, context, initializer=_start_worker, initargs=(cores,)
    ) as workers:
      try:
        yield workers
      finally:
        workers.shutdown(cancel_futures=True)

  def make(self, run: claims_lib.Run) -> dict[str, Any]:
    """Makes or resumes a run.

    Args:
      run: of a claim.

    Returns:
      The result. Its `status` is 'finished', 'diverged' (`message` has the step
      and the loss) or 'refused' (`message` says why this machine cannot).
    """
    made = results.read(self._output)
    before = made[run.after] if run.after else None
    config = self.localize(run)
    if self._rehearse:
      small_nets.shrink(config)
    fingerprint = claims_lib.fingerprint(run, made)
    folder = self._output / 'runs' / f'{run.name},{fingerprint}'
    began = time.monotonic()
    result: dict[str, Any] = {
      'name': run.name,
      'labels': dict(run.labels),
      'fingerprint': fingerprint,
      'data': config.data.name,
      'workdir': str(folder.relative_to(self._output)),
    }
    if self._rehearse:
      result['rehearsal'] = True
    try:
      check.check_config(config, jax.device_count())
    except ValueError as error:
      return result | {'status': 'refused', 'message': str(error)}
    if before is not None:
      config.init_from = str((self._output / before['workdir']).absolute())
    try:
      if before is not None and before['status'] != 'finished':
        raise FloatingPointError(f'{run.after} diverged')
      result |= self._train(config, folder, run.held_out)
    except FloatingPointError as error:
      message = str(error).partition(';')[0]
      result |= {'status': 'diverged', 'message': message, 'top_1': None}
    except (fit.TooLargeError, jax.errors.JaxRuntimeError) as error:
      out_of_memory = 'RESOURCE_EXHAUSTED' in str(error)
      if not isinstance(error, fit.TooLargeError) and not out_of_memory:
        raise
      with (self._output / 'log.txt').open('a') as log:
        traceback.print_exception(error, file=log)
      message = str(error).partition('\n')[0]
      result |= {'status': 'refused', 'message': message}
    finally:
      jax.clear_caches()  # the next run has another net
    result['seconds'] = round(time.monotonic() - began, 1)
    return result

  def _train(
    self,
    config: config_dict.ConfigDict,
    folder: pathlib.Path,
    held_out: str | None,
  ) -> dict[str, Any]:
    with (
      (self._output / 'log.txt').open('a') as log,
      contextlib.redirect_stdout(log),
    ):
      report = train.train_and_evaluate(config, folder)
    # Without an EMA, the metrics of the EMA are those of the weights.
    top_1 = report['ema_eval_top_1']
    result = {
      'status': 'finished',
      'report': report,
      'top_1': top_1,
      'curve': _curve(folder),
    }
    if held_out is not None:
      config.data.test_split = _HELD_OUT if self._rehearse else held_out
      # Else `init_from` is evaluated, not the fine-tuned weights.
      config.init_from = None
      metrics = evaluate.evaluate_checkpoint(config, folder)
      result['held_out_top_1'] = metrics['ema_eval_top_1']
    return result

  def localize(self, run: claims_lib.Run) -> config_dict.ConfigDict:
    """Returns a run's config with this machine's data and cache."""
    config = run.config.copy_and_resolve_references()
    data = dict(self._data)
    name = data.pop('name', None)
    config.data.update(data)
    if name is not None and config.data.name in (CIFAR10, scales.STAND_IN):
      config.data.name = name
      if name.startswith(_FOLDER):
        config.data.name = 'folder'
        config.data.data_dir = name.removeprefix(_FOLDER)
    config.compilation_cache = str(self._output.absolute() / 'compiled')
    return config


def _curve(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the metrics at each evaluation, with the last training accuracy."""
  curve: list[dict[str, Any]] = []
  train_top_1 = None
  for line in logbook.read(folder):
    if line['split'] == 'train':
      train_top_1 = round(line['top_1'], 4)
    elif 'ema_eval_top_1' in line:
      point = {'step': line['step'], 'train_top_1': train_top_1}
      for name in ('top_1', 'loss'):
        point[name] = round(line[f'ema_eval_{name}'], 4)
      curve.append(point)
  return curve


def _order(run: claims_lib.Run) -> tuple[float, ...]:
  """Separates runs of one program, so that the second finds it compiled."""
  inputs = build.initial_hyperparams(run.config)
  return run.config.seed, *map(float, inputs.values())


class _InProcess(futures.Executor):
  """Runs each call at once, in this process."""

  def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    future: futures.Future = futures.Future()
    future.set_result(function(*args, **kwargs))
    return future


def _start_worker(cores: Any) -> None:
  os.sched_setaffinity(0, {cores.get()})  # before jax counts them
  workers.end_with_parent()
  start()


def start() -> None:
  """Sets up a process that trains, as `nfnets_jax.main` does."""
  flags.FLAGS.mark_as_parsed()  # Grain reads them
  absl_logging.set_verbosity(absl_logging.WARNING)
  if jax.default_backend() == 'cpu':
    host_memory.keep_freed_memory()


def _summary(result: Mapping[str, Any]) -> str:
  top_1 = result['top_1']
  shown = result['message'] if top_1 is None else f'{100 * top_1:.1f} %'
  return f'{result["name"]}: {shown} ({result["seconds"]:.0f} s)'
