"""Jobs measure in turn, are stopped at their limit, and retried."""

import os
import signal
import sys
import threading
import time

import pytest

from experiments.gpu import common, process, runner


def test_jobs_measure_in_turn_and_a_failure_stops_none(
  output, tmp_path, monkeypatch
):
  """Two that wait and one that fails, as scripts in place of our modules."""
  one = (
    'import sys, time\n'
    'print("ready", flush=True)\n'
    'sys.stdin.readline()\n'
    'with open(sys.argv[1], "a") as file:\n'
    '  file.write("begin ")\n'
    '  file.flush()\n'
    '  time.sleep(0.2)\n'
    '  file.write("end ")\n'
    'print("measured", flush=True)\n'
  )
  script = tmp_path / 'one.py'
  script.write_text(one)
  log = tmp_path / 'turns'
  names = {'a': [script, log], 'b': [script, log], 'c': [tmp_path / 'no.py']}
  jobs = [process.Job(2, (x,), waits=True) for x in names]
  made = runner.Runner(None)
  monkeypatch.setattr(
    made,
    '_command',
    lambda job: [sys.executable, *map(str, names[job.words[0]])],
  )
  made.run(jobs, 1, 2, time.time() + 60)
  assert log.read_text() == 'begin end begin end '
  (failed,) = common.read(output / 'results.jsonl')
  assert failed['job'] == 'c' and "can't open file" in failed['message']
  assert 'part 2, c: ended with 2' in made.log.failed[0]
  assert (output / 'report.md').exists()


def test_jobs_are_stopped_at_their_limit(output, monkeypatch):
  monkeypatch.setattr(process, 'GRACE', 1.0)
  made = runner.Runner(None)
  words = [sys.executable, '-c', 'import time; time.sleep(60)']
  monkeypatch.setattr(made, '_command', lambda job: words)
  began = time.monotonic()
  jobs = [
    process.Job(1, ('sleep',), limit=2.0),
    process.Job(2, ('prepare',), waits=True, limit=2.0),
    process.Job(2, ('later',), waits=True, limit=2.0),
  ]
  made.run(jobs, 1, 1, time.time() + 60)
  assert time.monotonic() - began < 10
  messages = sorted(x.partition(' after')[0] for x in made.log.failed)
  assert messages == [
    'part 1, sleep: stopped',
    'part 2, later: there was no time for it',
    'part 2, prepare: stopped',
  ]


def test_a_job_that_fails_untuned_is_run_once_more(
  output, tmp_path, monkeypatch
):
  script = tmp_path / 'one.py'
  script.write_text(
    'import os, sys\n'
    'print(os.environ["XLA_FLAGS"], os.environ["GPU_JOB"])\n'
    'sys.exit("autotune_level=0" in os.environ["XLA_FLAGS"])\n'
  )
  monkeypatch.setenv('XLA_FLAGS', '--xla_mine=1')
  made = runner.Runner(None)
  words = [sys.executable, str(script)]
  monkeypatch.setattr(made, '_command', lambda job: words)
  made.run([process.Job(3, ('one',), tuned=False)], 1, 1, time.time() + 60)
  lines = (output / 'log.txt').read_text().splitlines()
  assert lines[0].startswith('[one] --xla_mine=1 --xla_gpu_autotune_level=0')
  assert lines[0].endswith(' one') and lines[3] == '[one] --xla_mine=1 one'
  assert len(made.log.failed) == 1


def test_an_interrupt_ends_all_jobs(output, monkeypatch):
  # The workers of pytest-xdist ignore it.
  handler = signal.signal(signal.SIGINT, signal.default_int_handler)
  made = runner.Runner(None)
  code = 'import time; print("started", flush=True); time.sleep(60)'
  words = [sys.executable, '-c', code]
  monkeypatch.setattr(made, '_command', lambda job: words)
  log = output / 'log.txt'

  def interrupt():
    while not log.exists():
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)

  thread = threading.Thread(target=interrupt)
  thread.start()
  job = process.Job(1, ('sleep',), tuned=False)
  with pytest.raises(KeyboardInterrupt):
    made.run([job], 1, 1, time.time() + 60)
  thread.join()
  signal.signal(signal.SIGINT, handler)
  # Not run once more.
  assert log.read_text().count('[sleep] started') == 1
  assert 'ended with -9' in made.log.failed[0]
