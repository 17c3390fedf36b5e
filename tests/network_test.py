"""A run of several hosts, in a bucket, whose network and processes fail."""

import re
import signal
import time

import jax
import numpy as np
import pytest

from nfnets_jax import paths
from nfnets_jax.runtime import checkpoint
from tests import buckets, network
from tests import multi_process_test as runs
from tests.multi_process_test import folders  # noqa: F401, a fixture

STEPS = 80
CHANGES = {
  'epochs': 8.0,
  'checkpoint_every_epochs': 0.5,  # 5 steps
  'log_every_steps': 20,
}
# Long enough for four processes that start at once on two cores.
HEARTBEAT = 20
# Of a run, in seconds, beside others on the same cores.
TIMEOUT = 1200


@pytest.fixture(scope='module')
def hosts(tmp_path_factory):
  """Four hosts."""
  with network.of(tmp_path_factory.mktemp('network'), 4) as found:
    yield found


@pytest.fixture(scope='module')
def workdir(hosts):
  """A run folder in a bucket that all hosts reach."""
  with buckets.served('gs', hosts.gateway):
    yield paths.expand('gs://bucket/run')


def start(folders, workdir, hosts, numbers, devices=1):  # noqa: F811
  """Starts a process on each of the hosts with these numbers."""
  first = f'host{numbers[0]}'
  arguments = runs.main(folders, workdir, len(numbers), first, **CHANGES)
  for words in arguments:
    words.append(f'--heartbeat_timeout={HEARTBEAT}')
  return runs.started(
    arguments,
    devices,
    folders[1],
    lambda index, words: hosts.on(numbers[index], words),
  )


def wait_until(processes, workdir, steps):
  """Waits until a run that goes on has a checkpoint of so many steps."""
  deadline = time.monotonic() + TIMEOUT
  while newest(workdir) < steps:
    assert time.monotonic() < deadline
    for process in processes:
      assert process.poll() is None, process.stdout.read()
    time.sleep(0.05)


def newest(workdir):
  """The step of the newest complete checkpoint, or 0."""
  return max(checkpoint.steps(workdir / 'checkpoints'), default=0)


def fail(processes, least):
  """Waits until all have ended by themselves; returns the seconds and texts."""
  begun = time.monotonic()
  printed = runs.outputs(processes, timeout=HEARTBEAT + 180)
  seconds = time.monotonic() - begun
  for process, text in zip(processes, printed, strict=True):
    assert process.returncode != 0, text
  assert seconds > least
  return seconds, printed


def finish(processes):
  printed = runs.outputs(processes, TIMEOUT)
  for process, text in zip(processes, printed, strict=True):
    assert process.returncode == 0, text
  return printed


@pytest.mark.slow
def test_faults_do_not_change_the_result(folders, workdir, tmp_path, hosts):  # noqa: F811
  """Killed, slow, cut for seconds and for a minute, and resumed on two hosts.

  Two processes of two devices add up the same sums as four of one, in the same
  order, so the parameters are the same to the bit.
  """
  straight = tmp_path / 'straight'
  with start(folders, straight, hosts, [0, 1, 2, 3]) as processes:
    finish(processes)

  with start(folders, workdir, hosts, [0, 1, 2, 3]) as processes:
    wait_until(processes, workdir, 5)
    processes[2].send_signal(signal.SIGKILL)
    seconds, _ = fail(processes, 0)
    print(f'killed: all ended after {seconds:.1f} s')
  killed = newest(workdir)
  assert 5 <= killed < STEPS

  with start(folders, workdir, hosts, [0, 1, 2, 3]) as processes:
    # Shorter than the heartbeat timeout: the run waits and goes on.
    wait_until(processes, workdir, killed + 5)
    processes[3].send_signal(signal.SIGSTOP)
    time.sleep(4)
    processes[3].send_signal(signal.SIGCONT)
    wait_until(processes, workdir, newest(workdir) + 5)
    hosts.cut(1)
    time.sleep(4)
    hosts.mend(1)
    wait_until(processes, workdir, newest(workdir) + 5)
    # Longer: it ends on both sides.
    hosts.cut(0)
    cut = time.monotonic()
    seconds, printed = fail(processes, 4)
    print(f'cut: all ended after {seconds:.1f} s', printed)
  assert f'resumed after step {killed}' in printed[0]
  reached = newest(workdir)
  assert killed < reached < STEPS

  # Without host 0, which is still cut.
  with start(folders, workdir, hosts, [1, 2], devices=2) as processes:
    printed = finish(processes)
  time.sleep(max(0, cut + 60 - time.monotonic()))
  hosts.mend(0)
  resumed = re.search(r'resumed after step (\d+)', printed[0])
  assert resumed and int(resumed[1]) == reached
  ours, theirs = (runs.stored_state(x, STEPS) for x in (workdir, straight))
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_array_equal(x, y)
