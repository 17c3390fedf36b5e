"""Runs jobs as processes within time limits, and records failures.

The standard library alone, as `run` imports it before packages are installed.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import os
import pathlib
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence

from experiments.gpu import common, report

# Seconds between SIGTERM and SIGKILL.
_GRACE = 8.0


@dataclasses.dataclass
class Job:
  """A process of a part.

  Attributes:
    part: 1 to 4.
    words: module and arguments.
    waits: whether it prepares beside others, then waits to measure alone.
    limit: seconds after the start of its part at which it is stopped.
  """

  part: int
  words: Sequence[str]
  waits: bool = False
  limit: float = math.inf

  @property
  def name(self) -> str:
    """Its name in the log."""
    return ' '.join(self.words)


class Runner:
  """Runs jobs as processes.

  Attributes:
    failed: a message for each job that failed.
  """

  def __init__(self, python: str, site: pathlib.Path | None):
    """Sets the environment of the processes.

    Args:
      python: the interpreter.
      site: folder of packages installed from wheels, if any.
    """
    self.failed: list[str] = []
    self._python = python
    self._path = common.output() / 'log.txt'
    self._lock = threading.Lock()
    # Held by the job that measures.
    self._device = threading.Lock()
    root = pathlib.Path(__file__).parents[2]
    # Packages from wheels take precedence over those of the machine.
    path = [str(root), str(site or ''), os.environ.get('PYTHONPATH', '')]
    compiled = common.scratch().absolute() / 'compiled'
    self._environment = {
      # Jobs share the device; none may preallocate its memory.
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

  def info(self, text: str) -> None:
    """Prints and logs a line."""
    with self._lock:
      print(text, flush=True)
      self._write(text)

  def log(self, name: str, line: str) -> None:
    """Logs a line of a job."""
    with self._lock:
      self._write(f'[{name}] {line}')

  def _write(self, line: str) -> None:
    with self._path.open('a') as file:
      file.write(f'{line}\n')

  def fail(self, job: Job, message: str) -> None:
    """Records a job that failed."""
    self.failed.append(f'part {job.part}, {job.name}: {message}')
    common.add(job.part, 'failed', job=job.name, message=message)

  def run(self, jobs: Sequence[Job], slots: int, end: float) -> None:
    """Runs jobs, most important first.

    Args:
      jobs: those that wait measure after all others have ended.
      slots: number of concurrent jobs.
      end: time at which the last is stopped.
    """
    began = time.time()
    processes = []
    for index, job in enumerate(jobs):
      deadline = min(end, began + job.limit)
      processes.append(
        _Process(
          self,
          job,
          self._command(job),
          {**self._environment, 'GPU_DEADLINE': str(deadline)},
          deadline,
          os.nice(0) + (index if job.waits else 0),
        )
      )

    def prepare(process: _Process) -> None:
      with self._device:
        process.start()
      if process.job.waits:
        process.ready.wait(max(0.0, process.deadline - time.time()))
      else:
        process.finish()

    with concurrent.futures.ThreadPoolExecutor(slots) as pool:
      prepared = [pool.submit(prepare, process) for process in processes]
      try:
        for process, future in zip(processes, prepared, strict=True):
          if not process.job.waits:
            future.result()
        self._measure_in_turn([x for x in processes if x.job.waits])
        for future in prepared:
          future.result()
      except BaseException:  # this command is stopped
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
          process.signal(signal.SIGKILL)
        raise

  def _measure_in_turn(self, queue: list['_Process']) -> None:
    """Lets jobs measure as they get ready, one at a time."""
    while any(time.time() < x.deadline - _GRACE for x in queue):
      ready = [process for process in queue if process.ready.is_set()]
      if not ready:
        time.sleep(0.1)
        continue
      first = ready[0]
      queue.remove(first)
      with self._device, _paused([x for x in queue if x not in ready]):
        first.go()
        first.finish()
    for process in queue:
      process.finish()

  def _command(self, job: Job) -> list[str]:
    python = self._python
    if job.words[0] == 'peer':
      python = os.environ.get('GPU_TIMM_PYTHON') or python
    return [python, '-m', f'experiments.gpu.{job.words[0]}', *job.words[1:]]


class _Process:
  """A running job."""

  def __init__(
    self,
    runner: Runner,
    job: Job,
    command: list[str],
    environment: dict[str, str],
    deadline: float,
    niceness: int,
  ):
    self.job = job
    self.ready = threading.Event()
    self.deadline = deadline
    self._runner, self._command = runner, command
    self._environment = environment
    self._niceness = niceness
    self._tail: collections.deque[str] = collections.deque(maxlen=20)
    self._process: subprocess.Popen | None = None

  def start(self) -> None:
    """Starts it, if there is time."""
    self._began = time.time()
    if self.deadline - _GRACE < self._began:
      self.ready.set()
      return
    self._process = subprocess.Popen(
      self._command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors='replace',
      env=self._environment,
      # Not a new session, so that what ends this command ends its jobs.
      process_group=0,
    )
    # Important jobs compile first.
    os.setpriority(os.PRIO_PGRP, self._process.pid, self._niceness)
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def _read(self) -> None:
    assert self._process is not None and self._process.stdout is not None
    for line in self._process.stdout:
      line = line.rstrip('\n')
      if line == 'ready':
        self.ready.set()
      self._tail.append(line)
      self._runner.log(self.job.name, line)
    self.ready.set()  # it has ended, which `finish` records

  def go(self) -> None:
    """Starts its measurement."""
    if self._process is None or self._process.stdin is None:
      return
    with contextlib.suppress(BrokenPipeError):  # it has ended
      self._process.stdin.write('go\n')
      self._process.stdin.flush()

  def signal(self, number: int) -> None:
    """Sends a signal to it and its children."""
    if self._process is not None:
      with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(self._process.pid, number)

  def finish(self) -> None:
    """Waits until it ends or reaches its limit, and records the outcome."""
    process = self._process
    if process is None:
      self._runner.fail(self.job, 'there was no time for it')
      return
    message = None
    try:
      process.wait(max(0.1, self.deadline - _GRACE - time.time()))
    except subprocess.TimeoutExpired:
      message = f'stopped after {time.time() - self._began:.0f} s, its limit'
      process.send_signal(signal.SIGTERM)  # which it passes to its children
      with contextlib.suppress(subprocess.TimeoutExpired):  # killed below
        process.wait(max(0.5, self.deadline - time.time()))
    self.signal(signal.SIGKILL)
    process.wait()
    self._reader.join(5)
    for pipe in (process.stdin, process.stdout):
      if pipe is not None:
        with contextlib.suppress(BrokenPipeError):
          pipe.close()
    if message is None and process.returncode:
      last = [x for x in self._tail if x.strip() and not x.startswith('---')]
      text = ' | '.join(last[-2:])[:400]
      message = f'ended with {process.returncode}: {text}'
    if message is not None:
      self._runner.fail(self.job, message)
    took = time.time() - self._began
    outcome = f'{message or "done"} ({took:.0f} s)'
    self._runner.info(f'part {self.job.part}: {self.job.name}: {outcome}')
    report.write(common.output())


@contextlib.contextmanager
def _paused(processes: list[_Process]) -> Iterator[None]:
  """Pauses jobs that still prepare, so that one measures alone."""
  if common.dry_run():
    yield
    return
  for process in processes:
    process.signal(signal.SIGSTOP)
  try:
    yield
  finally:
    for process in processes:
      process.signal(signal.SIGCONT)
