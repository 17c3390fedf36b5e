"""A job as a process with a time limit.

The standard library alone, as `run` imports it before packages are installed.
"""

import collections
import contextlib
import dataclasses
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from experiments.gpu import common, report

# Seconds between SIGTERM and SIGKILL.
GRACE = 8.0


@dataclasses.dataclass
class Job:
  """A process of a part.

  Attributes:
    part: 1 to 4.
    words: module and arguments.
    waits: whether it prepares in parallel with others and waits to measure
      alone.
    limit: seconds after the start of its group when it is stopped.
    tuned: whether XLA autotunes kernels. An untuned job that fails is rerun
      once, tuned.
  """

  part: int
  words: Sequence[str]
  waits: bool = False
  limit: float = math.inf
  tuned: bool = True

  @property
  def name(self) -> str:
    """Its name in the log."""
    return ' '.join(self.words)


class Log:
  """A thread-safe log of jobs.

  Attributes:
    failed: a message for each failed job.
  """

  def __init__(self) -> None:
    """Appends to `log.txt`."""
    self.failed: list[str] = []
    self._path = common.output() / 'log.txt'
    self._lock = threading.Lock()

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
    """Records a failed job."""
    self.failed.append(f'part {job.part}, {job.name}: {message}')
    common.add(job.part, 'failed', job=job.name, message=message)

  def update_report(self) -> None:
    """Writes the report of all results so far."""
    with self._lock:
      report.write(common.output())


class Process:
  """A running job.

  Attributes:
    job: its job.
    deadline: time when it is killed.
    ready: set when it waits to measure or has ended.
    measured: set when it has measured or has ended.
    returncode: exit code, or None if it was stopped.
  """

  def __init__(
    self,
    log: Log,
    job: Job,
    command: Sequence[str],
    environment: Mapping[str, str],
    deadline: float,
    niceness: int,
  ):
    """Prepares, but does not start, the process."""
    self.job = job
    self.deadline = deadline
    self.ready = threading.Event()
    self.measured = threading.Event()
    self.returncode: int | None = None
    self._log, self._command = log, command
    self._environment = environment
    self._niceness = niceness
    self._tail: collections.deque[str] = collections.deque(maxlen=20)
    self._process: subprocess.Popen | None = None

  def start(self) -> None:
    """Starts it if there is time."""
    self._began = time.time()
    if self.seconds_left() <= 0:
      self.ready.set()
      self.measured.set()
      return
    self._process = subprocess.Popen(
      self._command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors='replace',
      env=self._environment,
      # Not a new session, so that whatever ends this command ends its jobs.
      process_group=0,
    )
    os.setpriority(os.PRIO_PGRP, self._process.pid, self._niceness)
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def _read(self) -> None:
    assert self._process is not None and self._process.stdout is not None
    for line in self._process.stdout:
      line = line.rstrip('\n')
      if line == 'ready':
        self.ready.set()
      if line == 'measured':
        self.measured.set()
      self._tail.append(line)
      self._log.log(self.job.name, line)
    self.ready.set()  # it has ended, which `finish` records
    self.measured.set()

  def seconds_left(self) -> float:
    """Returns the seconds until it is told to stop."""
    return self.deadline - GRACE - time.time()

  def measure(self) -> None:
    """Lets it measure, and waits until it has."""
    if self._process is None or self._process.stdin is None:
      return
    with contextlib.suppress(BrokenPipeError):  # it has ended
      self._process.stdin.write('go\n')
      self._process.stdin.flush()
    self.measured.wait(max(0.0, self.seconds_left()))

  def signal(self, number: int) -> None:
    """Sends a signal to it and its children."""
    if self._process is not None:
      with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(self._process.pid, number)

  def finish(self) -> None:
    """Waits until it ends or reaches its deadline, and records the outcome."""
    process = self._process
    if process is None:
      self._log.fail(self.job, 'there was no time for it')
      return
    message = None
    try:
      process.wait(max(0.1, self.seconds_left()))
    except subprocess.TimeoutExpired:
      message = f'stopped after {time.time() - self._began:.0f} s, its limit'
      process.send_signal(signal.SIGTERM)  # passed on to its children
      with contextlib.suppress(subprocess.TimeoutExpired):  # killed below
        process.wait(max(0.5, self.deadline - time.time()))
    self.signal(signal.SIGKILL)
    process.wait()
    self._reader.join(5)
    for pipe in (process.stdin, process.stdout):
      if pipe is not None:
        with contextlib.suppress(BrokenPipeError):
          pipe.close()
    if message is None:
      self.returncode = process.returncode
    if self.returncode:
      last = [x for x in self._tail if x.strip() and not x.startswith('---')]
      text = ' | '.join(last[-2:])[:400]
      message = f'ended with {self.returncode}: {text}'
    if message is not None:
      self._log.fail(self.job, message)
    took = time.time() - self._began
    outcome = f'{message or "done"} ({took:.0f} s)'
    self._log.info(f'part {self.job.part}: {self.job.name}: {outcome}')
    self._log.update_report()


@contextlib.contextmanager
def paused(processes: Sequence[Process]) -> Iterator[None]:
  """Pauses jobs while another one measures."""
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
