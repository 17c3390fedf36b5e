r"""Checks and measures everything on an accelerator, the most important first.

  python -m experiments.gpu.run --output=DIR            (or: make gpu)

Four parts, each with a time limit; `--parts` chooses some, `--seconds` is the
limit of all, and part 4 takes what is left:

1. is it right there: golden values, a step beside the CPU's, a training that is
   killed and resumed (2 minutes);
2. speed of training steps beside the released formulation and timm (4 minutes);
3. the paper's main effect: batch sizes with and without AGC (4 minutes);
4. the best CIFAR-10 accuracy of an NFNet in the time that is left.

DIR gets `results.jsonl`, as the results come, `log.txt`, `cifar10.jsonl` and
`report.md`, written anew after each job: a machine that is taken away leaves
what was done. A part that fails does not stop the next; the exit code is 1.
`GPU_DRY_RUN=1` makes everything tiny, for a CPU.

Nothing is fetched. `make gpu-pack` gathers beforehand, where there is a
network, the wheels that a machine with jax, torch and timm lacks, and CIFAR-10,
in the folder gpu-pack/; the Python that runs this gets them on its path, and
nothing is installed into it.

On a machine that runs commands of ten minutes at most, with that folder carried
along and $OUT the folder that comes back, two commands, the second with the
seconds that are left:

  python3 -m experiments.gpu.run --output=$OUT --scratch=/tmp/gpu \
    --parts=1,2 --seconds=420
  python3 -m experiments.gpu.run --output=$OUT --scratch=/tmp/gpu \
    --parts=3,4 --seconds=390
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence

from experiments.gpu import common, report
from nfnets_jax import paths

LIMITS = {1: 120.0, 2: 240.0, 3: 240.0, 4: 600.0}
# Of part 2, after which jobs measure though others are not ready yet, and
# after which they do not wait for more important ones either.
_PREPARING, _PATIENCE = 130.0, 170.0
# Between SIGTERM and SIGKILL.
_GRACE = 8.0
# For the report at the end of all.
_LAST = 5.0
# What the jobs import that a bare machine may lack.
_PACKAGES = (
  'haiku',
  'jmp',
  'ml_collections',
  'grain',
  'array_record',
  'tensorflow_datasets',
  'simplejpeg',
  'tensorboardX',
  'importlib_resources',
  'tree',
  'immutabledict',
  'promise',
  'simple_parsing',
  'tensorflow_metadata',
  'termcolor',
  'toml',
)
_VERSIONS = ('jax', 'jaxlib', 'numpy', 'dm-haiku', 'torch', 'timm')


@dataclasses.dataclass
class Job:
  """A process of a part.

  Attributes:
    words: module and arguments.
    waits: it prepares beside others, and measures alone, when it is told to.
  """

  words: Sequence[str]
  waits: bool = False

  @property
  def name(self) -> str:
    """What it is called in the log."""
    return ' '.join(self.words)


def jobs(part: int) -> list[Job]:
  """Returns a part's jobs, the most important first."""
  if part == 1:
    checks = [
      ('agc',),
      ('f0', 'float32'),
      ('f0', 'bfloat16'),
      ('step', 'float32'),
      ('step', 'bfloat16'),
      ('digits',),
      ('net', 'nf_resnet50'),
      ('net', 'resnet50'),
      ('net', 'nf_regnet_b0'),
    ]
    if common.dry_run():  # the others take the same way
      checks = checks[:2] + checks[4:7]
    return [Job(('right', *words)) for words in checks]
  if part == 2:
    both = ('ours', 'released')
    names = [
      ('speed', 'peak'),
      ('speed', 'nfnet_f0', '32', *both),
      ('peer', 'nfnet_f0', 'eager'),
      ('speed', 'nfnet_f1', '32', *both),
      ('peer', 'nfnet_f1', 'eager'),
      ('speed', 'efficientnet_b7', '32', 'ours'),
      ('peer', 'nfnet_f0', 'compiled'),
      ('speed', 'nf_resnet50', '32', 'ours'),
      ('speed', 'resnet50', '32', 'ours'),
      ('peer', 'nf_resnet50', 'eager'),
      ('peer', 'resnet50', 'eager'),
      ('peer', 'nfnet_f1', 'compiled'),
      # Last, when no other job has memory of the device.
      ('peer', 'nfnet_f0', 'largest'),
      ('speed', 'nfnet_f0', 'largest', 'ours'),
      ('peer', 'nfnet_f1', 'largest'),
      ('speed', 'nfnet_f1', 'largest', 'ours'),
    ]
    if common.dry_run():  # one net: the others take the same way
      names = [words for words in names if words[1] in ('peak', 'nfnet_f0')]
    return [Job(words, waits=True) for words in names]
  if part == 3:
    count = 2 if common.dry_run() else 9
    return [Job(('effect', str(i))) for i in range(count)]
  return [Job(('record',))]


class Runner:
  """Runs jobs as processes, with limits, and writes down how they end."""

  def __init__(self, python: str, site: pathlib.Path | None, slots: int):
    """Describes the processes.

    Args:
      python: the interpreter.
      site: folder of the wheels' packages, if they were installed.
      slots: how many jobs at a time.
    """
    self._python = python
    self._slots = slots
    self._path = common.output() / 'log.txt'
    self._lock = threading.Lock()
    self.failed: list[str] = []
    root = pathlib.Path(__file__).parents[2]
    # What wheels bring comes before what the machine has.
    places = [str(root), str(site or ''), os.environ.get('PYTHONPATH', '')]
    compiled = common.scratch().absolute() / 'compiled'
    self._environment = {
      # Jobs share the device; no process takes most of its memory at once.
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
      'PYTHONPATH': os.pathsep.join(filter(None, places)),
    }
    if common.dry_run():
      self._environment['XLA_FLAGS'] = '--xla_backend_optimization_level=0'
      self._environment['JAX_PLATFORMS'] = 'cpu'

  def say(self, text: str) -> None:
    """Prints and logs a line."""
    with self._lock:
      print(text, flush=True)
      self._write(text)

  def run_part(self, part: int, deadline: float) -> None:
    """Runs a part's jobs until a time."""
    began = time.time()
    everything = [
      _Process(
        self,
        job,
        part,
        self._words(job),
        self._environment,
        deadline,
        os.nice(0) + (place if job.waits else 0),
      )
      for place, job in enumerate(jobs(part))
    ]

    def prepare(process: _Process) -> None:
      process.start()
      if process.job.waits:
        process.ready.wait(max(0.0, deadline - time.time()))
      else:
        process.finish()

    with concurrent.futures.ThreadPoolExecutor(self._slots) as pool:
      prepared = [pool.submit(prepare, process) for process in everything]
      try:
        self._measure_in_turn(
          [process for process in everything if process.job.waits],
          began,
          deadline,
        )
        for future in prepared:
          future.result()
      except BaseException:  # this command is stopped
        pool.shutdown(wait=False, cancel_futures=True)
        for process in everything:
          process.signal(signal.SIGKILL)
        raise

  def _measure_in_turn(
    self, queue: list['_Process'], began: float, deadline: float
  ) -> None:
    """Lets jobs measure, one at a time, once they are ready."""
    while queue and time.time() < deadline - _GRACE:
      took = time.time() - began
      ready = [process for process in queue if process.ready.is_set()]
      all_prepared = len(ready) == len(queue) or took > _PREPARING
      in_order = ready[:1] == queue[:1] or took > _PATIENCE
      if ready and ((all_prepared and in_order) or common.dry_run()):
        queue.remove(ready[0])
        others = [process for process in queue if process not in ready]
        with _held(others):
          ready[0].go()
          ready[0].finish()
      else:
        time.sleep(0.1)
    for process in queue:
      process.finish()

  def _words(self, job: Job) -> list[str]:
    python = self._python
    if job.words[0] == 'peer':
      python = os.environ.get('GPU_TIMM_PYTHON') or python
    return [python, '-m', f'experiments.gpu.{job.words[0]}', *job.words[1:]]

  def log(self, name: str, line: str) -> None:
    """Logs a line of a job."""
    with self._lock:
      self._write(f'[{name}] {line}')

  def _write(self, line: str) -> None:
    with self._path.open('a') as file:
      file.write(f'{line}\n')

  def fail(self, part: int, name: str, message: str) -> None:
    """Records a job that failed."""
    self.failed.append(f'part {part}, {name}: {message}')
    common.add(part, 'failed', job=name, message=message)


class _Process:
  """A job that runs."""

  def __init__(
    self,
    runner: Runner,
    job: Job,
    part: int,
    words: list[str],
    environment: dict[str, str],
    deadline: float,
    niceness: int,
  ):
    self.job = job
    self._niceness = niceness
    self.ready = threading.Event()
    self._runner, self._part, self._words = runner, part, words
    self._environment = {**environment, 'GPU_DEADLINE': str(deadline)}
    self._deadline = deadline
    self._tail: collections.deque[str] = collections.deque(maxlen=20)
    self._process: subprocess.Popen | None = None

  def start(self) -> None:
    """Starts it, if there is time."""
    self._began = time.time()
    if self._deadline - _GRACE < self._began:
      self.ready.set()
      return
    self._process = subprocess.Popen(
      self._words,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors='replace',
      env=self._environment,
      # Not a session of its own: what ends this command ends its jobs.
      process_group=0,
    )
    # What is important compiles first.
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
    self.ready.set()  # it has ended, and `finish` says how

  def go(self) -> None:
    """Tells it to measure."""
    if self._process is None or self._process.stdin is None:
      return
    with contextlib.suppress(BrokenPipeError):  # it has ended
      self._process.stdin.write('go\n')
      self._process.stdin.flush()

  def signal(self, number: int) -> None:
    """Sends a signal to it and to all that it has started."""
    if self._process is not None:
      with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(self._process.pid, number)

  def finish(self) -> None:
    """Waits until it ends or its time is over, and records how."""
    process = self._process
    if process is None:
      self._runner.fail(self._part, self.job.name, 'there was no time for it')
      return
    message = None
    try:
      process.wait(max(0.1, self._deadline - _GRACE - time.time()))
    except subprocess.TimeoutExpired:
      message = f'stopped after {time.time() - self._began:.0f} s, its limit'
      process.send_signal(signal.SIGTERM)  # its children get it from it
      with contextlib.suppress(subprocess.TimeoutExpired):  # killed below
        process.wait(max(0.5, self._deadline - time.time()))
    self.signal(signal.SIGKILL)
    process.wait()
    self._reader.join(5)
    for pipe in (process.stdin, process.stdout):
      if pipe is not None:
        with contextlib.suppress(BrokenPipeError):
          pipe.close()
    if message is None and process.returncode:
      last = [x for x in self._tail if x.strip() and not x.startswith('---')]
      message = (
        f'ended with {process.returncode}: {" | ".join(last[-2:])[:400]}'
      )
    if message is not None:
      self._runner.fail(self._part, self.job.name, message)
    took = time.time() - self._began
    self._runner.say(
      f'part {self._part}: {self.job.name}: {message or "done"} ({took:.0f} s)'
    )
    report.write(common.output())


@contextlib.contextmanager
def _held(processes: list[_Process]) -> Iterator[None]:
  """Holds what still prepares, so that one measures alone."""
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


def install_pack(python: str) -> pathlib.Path | None:
  """Unpacks the wheels of the pack, if this Python lacks what they hold.

  Args:
    python: the interpreter.

  Returns:
    The folder for its path; None if nothing is missing.

  Raises:
    SystemExit: if packages are missing and there is no pack.
  """
  missing = [x for x in _PACKAGES if importlib.util.find_spec(x) is None]
  if not missing:
    return None
  wheels = sorted(map(str, (common.pack() / 'wheels').glob('*.whl')))
  if not wheels:
    sys.exit(
      f'error: {python} lacks {", ".join(missing)}, and there are no wheels in '
      f'{common.pack()}/wheels; run make gpu-pack where there is a network, or '
      'make install and give GPU_PYTHON=.venv/bin/python'
    )
  site = common.scratch().absolute() / 'site'
  if site.exists():  # of an earlier command
    return site
  partial = site.with_name('site-partial')
  subprocess.run(
    [
      python,
      '-m',
      'pip',
      'install',
      '--quiet',
      '--no-index',
      '--no-deps',
      '--no-compile',
      '--no-cache-dir',
      '--disable-pip-version-check',
      '--upgrade',
      '--target',
      str(partial),
      *wheels,
    ],
    check=True,
  )
  partial.rename(site)
  return site


def unpack_data() -> None:
  """Unpacks the data set of the pack, if there is one."""
  name, folder = common.data_set()
  archive = common.pack() / f'{name}.tar.gz'
  if archive.exists() and not (folder / name).exists():
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as opened:
      opened.extractall(folder, filter='data')


def describe(python: str) -> bool:
  """Records the machine; returns whether it has an accelerator."""
  words = [
    python,
    '-c',
    'import jax; x = jax.local_devices(); '
    'print(x[0].platform, len(x), x[0].device_kind, sep="\\n")',
  ]
  environment = {**os.environ, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
  if common.dry_run():
    environment['JAX_PLATFORMS'] = 'cpu'
  done = subprocess.run(words, capture_output=True, text=True, env=environment)
  if done.returncode:
    sys.exit(f'error: jax finds no device: {done.stderr.strip()[-500:]}')
  where, count, kind = done.stdout.splitlines()[-3:]
  versions: dict[str, str | None] = {}
  for name in _VERSIONS:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = None
  driver = None
  try:
    told = subprocess.run(
      [
        'nvidia-smi',
        '--query-gpu=name,driver_version,memory.total,power.limit',
        '--format=csv,noheader',
      ],
      capture_output=True,
      text=True,
      timeout=10,
    )
    driver = told.stdout.strip() or None
  except (OSError, subprocess.TimeoutExpired):
    pass  # not a machine of NVIDIA's
  common.add(
    0,
    'machine',
    platform=where,
    devices=int(count),
    device=kind,
    nvidia_smi=driver,
    cores=len(os.sched_getaffinity(0)),
    versions=versions,
    python=platform.python_version(),
    dry_run=common.dry_run(),
    date=datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  )
  return where != 'cpu'


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.gpu.run',
    description='Everything that needs an accelerator.',
  )
  parser.add_argument(
    '--output',
    default=os.environ.get('GPU_OUTPUT') or 'runs/gpu',
    help='folder of the results; $GPU_OUTPUT, or runs/gpu',
  )
  parser.add_argument(
    '--scratch',
    default=os.environ.get('GPU_SCRATCH') or None,
    help='folder of runs and compiled programs; a temporary one if none',
  )
  parser.add_argument('--parts', default='1,2,3,4', help='such as 1,2')
  parser.add_argument(
    '--seconds', type=float, default=870.0, help='the limit of all parts'
  )
  parser.add_argument('--pack', help='folder of pack; gpu-pack if none')
  parser.add_argument('--data_dir', help="of TFDS's data sets")
  parser.add_argument('--data_name', help='what CIFAR-10 is called there')
  args = parser.parse_args(argv)
  try:
    args.parts = sorted({int(x) for x in args.parts.split(',')})
    if not set(args.parts) <= set(LIMITS):
      raise ValueError(args.parts)
  except ValueError:
    parser.error(f'--parts={args.parts}: give some of 1,2,3,4')
  return args


def main(argv: list[str] | None = None) -> None:
  """Runs the parts and says what failed."""
  began = time.time()
  args = parse(sys.argv[1:] if argv is None else argv)
  # As an interrupt, so that no job outlives this command.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  output = paths.expand_literal(args.output, '--output')
  output.mkdir(parents=True, exist_ok=True)
  scratch = args.scratch or tempfile.mkdtemp(prefix='nfnets-gpu-')
  os.environ['GPU_OUTPUT'] = str(output)
  os.environ['GPU_SCRATCH'] = str(paths.expand_literal(scratch, '--scratch'))
  common.scratch().mkdir(parents=True, exist_ok=True)
  told = {
    'GPU_PACK': args.pack,
    'GPU_DATA_DIR': args.data_dir,
    'GPU_DATA_NAME': args.data_name,
  }
  os.environ.update({k: v for k, v in told.items() if v})
  found = describe(sys.executable)
  if not found and not common.dry_run():
    sys.exit(
      'error: jax finds no accelerator here; GPU_DRY_RUN=1 tries it on a CPU'
    )
  site = install_pack(sys.executable)
  unpack_data()
  slots = max(2, len(os.sched_getaffinity(0)))
  runner = Runner(sys.executable, site, slots)
  end = began + args.seconds - _LAST
  for part in args.parts:
    limit = 600.0 if common.dry_run() else LIMITS[part]
    part_began = time.time()
    deadline = min(end, part_began + limit)
    runner.say(f'part {part}: {deadline - part_began:.0f} s at most')
    runner.run_part(part, deadline)
    common.add(
      part,
      'part',
      seconds=round(time.time() - part_began, 1),
    )
  report.write(output)
  runner.say((output / 'report.md').read_text())
  runner.say(f'{time.time() - began:.0f} s in all; results in {output}')
  wrong = [x['what'] for x in common.read(output) if x.get('ok') is False]
  for text in [*runner.failed, *(f'not as it should be: {x}' for x in wrong)]:
    runner.say(f'error: {text}')
  if runner.failed or wrong:
    sys.exit(1)


if __name__ == '__main__':
  main()
