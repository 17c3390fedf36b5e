"""Runs jobs in parallel, and those that measure one at a time.

The standard library alone, as `run` imports it before packages are installed.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Sequence

from experiments.gpu import common
from experiments.gpu.process import Job, Log, Process, paused

# Autotuning takes most of the compile time. Untuned Triton products are slow.
_UNTUNED = '--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false'


class Runner:
  """Runs jobs as processes.

  Attributes:
    log: log of the jobs and of those that failed.
  """

  def __init__(self, site: pathlib.Path | None):
    """Sets the environment of the processes.

    Args:
      site: folder of unpacked wheels, if any.
    """
    self.log = Log()
    # Held while a job measures.
    self._device = threading.Lock()
    root = pathlib.Path(__file__).parents[2]
    # Packages from wheels take precedence over those of the machine.
    path = [str(root), str(site or ''), os.environ.get('PYTHONPATH', '')]
    compiled = common.scratch().absolute() / 'compiled'
    self._environment = {
      # Jobs share the device, so none may preallocate its memory.
      'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
      'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.92',
      'JAX_COMPILATION_CACHE_DIR': str(compiled),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5',
      'TF_CPP_MIN_LOG_LEVEL': '2',
      'CUDA_VISIBLE_DEVICES': '0',
      **os.environ,
      'PYTHONUNBUFFERED': '1',
      'GPU_OUTPUT': str(common.output().absolute()),
      'GPU_SCRATCH': str(common.scratch().absolute()),
      'GPU_PACK': str(common.pack().absolute()),
      'PYTHONPATH': os.pathsep.join(filter(None, path)),
    }
    if common.dry_run():
      self._environment['XLA_FLAGS'] = '--xla_backend_optimization_level=0'
      self._environment['JAX_PLATFORMS'] = 'cpu'

  def run(
    self, jobs: Sequence[Job], slots: int, compiling: int, end: float
  ) -> None:
    """Runs jobs, most important first.

    Args:
      jobs: jobs; those that wait measure after all others have ended.
      slots: how many jobs that do not wait run at once.
      compiling: how many jobs that wait prepare at once.
      end: time at which all are stopped.
    """
    began = time.time()
    processes: list[Process] = []
    stopped = threading.Event()

    def create(job: Job, niceness: int = 0) -> Process:
      deadline = min(end, began + job.limit)
      flags = [self._environment.get('XLA_FLAGS')]
      if not job.tuned:
        flags.append(_UNTUNED)
      environment = {
        **self._environment,
        'XLA_FLAGS': ' '.join(filter(None, flags)),
        'GPU_DEADLINE': str(deadline),
        'GPU_JOB': job.name,
      }
      niceness = min(19, os.nice(0) + niceness)
      command = self._command(job)
      process = Process(self.log, job, command, environment, deadline, niceness)
      processes.append(process)
      return process

    def prepare(process: Process) -> None:
      with self._device:
        process.start()
      process.ready.wait(max(0.0, process.seconds_left()))

    def execute(job: Job) -> Process:
      process = create(job)
      process.start()
      process.finish()
      return process

    def execute_or_retry(job: Job) -> None:
      failed = execute(job).returncode
      if failed and not job.tuned and not stopped.is_set():
        self.log.info(f'part {job.part}: {job.name}: once more, tuned')
        execute(dataclasses.replace(job, tuned=True))

    # Important jobs compile first and with priority.
    queue = [
      create(job, niceness)
      for niceness, job in enumerate((x for x in jobs if x.waits), 1)
    ]
    with (
      concurrent.futures.ThreadPoolExecutor(slots) as pool,
      concurrent.futures.ThreadPoolExecutor(compiling) as compilers,
    ):
      try:
        prepared = [compilers.submit(prepare, process) for process in queue]
        executed = [
          pool.submit(execute_or_retry, job) for job in jobs if not job.waits
        ]
        for future in executed:
          future.result()
        finished = self._measure_in_turn(queue, pool)
        for future in [*prepared, *finished]:
          future.result()
      except BaseException:  # this command is stopped
        stopped.set()
        for executor in (pool, compilers):
          executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
          process.signal(signal.SIGKILL)
        raise

  def _measure_in_turn(
    self, processes: Sequence[Process], pool: concurrent.futures.Executor
  ) -> list[concurrent.futures.Future]:
    """Lets jobs measure one at a time, as they get ready.

    They finish in `pool`, while the next one measures.
    """
    queue = list(processes)
    finished = []
    while any(process.seconds_left() > 0 for process in queue):
      ready = [process for process in queue if process.ready.is_set()]
      if not ready:
        time.sleep(0.1)
        continue
      first = ready[0]
      queue.remove(first)
      with self._device, paused([x for x in queue if x not in ready]):
        first.measure()
      finished.append(pool.submit(first.finish))
    return finished + [pool.submit(process.finish) for process in queue]

  def _command(self, job: Job) -> list[str]:
    module, *arguments = job.words
    return [sys.executable, '-m', f'experiments.gpu.{module}', *arguments]
