"""The scripts of experiments/launch train, each on two hosts without a cluster.

The hosts are network namespaces; `cluster.py` has the commands of the cluster.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests import multi_process_test as runs
from tests import network
from tests.experiments.launch import cluster as commands
from tests.multi_process_test import folders  # noqa: F401, a fixture
from tests.network_test import CHANGES, STEPS, TIMEOUT, newest

LAUNCH = runs.ROOT / 'experiments' / 'launch'
# The second names are those that the JobSet controller gives.
PODS = [f'nfnets-workers-0-{i}.nfnets' for i in range(2)]


@pytest.fixture(scope='module')
def hosts(tmp_path_factory):
  """Two hosts."""
  with network.of(tmp_path_factory.mktemp('network'), 2, PODS) as found:
    yield found


@pytest.fixture
def environment(folders, hosts, tmp_path):  # noqa: F811
  """Variables with which a script trains; the working folder is a checkout."""
  programs = tmp_path / 'bin'
  programs.mkdir()
  (tmp_path / '.venv' / 'bin').mkdir(parents=True)
  scripts = {programs / 'sleep': 'true'}
  for name in ('sbatch', 'srun', 'scontrol', 'gcloud'):
    words = f'{sys.executable} {commands.__file__} {name}'
    scripts[programs / name] = f'exec {words} "$@"'
  python = tmp_path / '.venv' / 'bin' / 'python'
  scripts[python] = f'exec {sys.executable} "$@"'
  for path, text in scripts.items():
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)
  for name in ('experiments', 'nfnets_jax'):
    (tmp_path / name).symlink_to(runs.ROOT / name)
  (tmp_path / 'nfnets jax').symlink_to(tmp_path)  # a name to be quoted
  path = tmp_path / 'cluster.json'
  path.write_text(
    json.dumps(
      {
        'hosts': [hosts.on(i, []) for i in range(2)],
        'cpus': 96,
        'gpus': 8,
        'folder': str(tmp_path),
      }
    )
  )
  return {
    'JAX_COMPILATION_CACHE_DIR': str(folders[1]),
    **os.environ,
    'CLUSTER': str(path),
    'PATH': f'{programs}:{os.environ["PATH"]}',
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} '
    '--xla_force_host_platform_device_count=1',
    'CONFIG': 'experiments/digits.py',
    'DATA_DIR': str(folders[0]),
    'WORKDIR': str(tmp_path / 'a run'),
  }


def arguments(folders):  # noqa: F811
  """Flags of a small net."""
  (words,) = runs.main(folders, '', 1, **CHANGES)
  return [word for word in words if word.startswith('--config.')]


def wait(job, condition):
  deadline = time.monotonic() + TIMEOUT
  while not (found := condition()):
    assert time.monotonic() < deadline
    assert job.poll() is None
    time.sleep(0.05)
  return found


@pytest.mark.slow
def test_slurm(environment, folders, tmp_path):  # noqa: F811
  """A task is killed; then comes the time limit, and the job goes on."""
  workdir = tmp_path / 'a run'
  tasks = tmp_path / 'tasks'
  words = ['sbatch', '--ntasks-per-node=1', LAUNCH / 'slurm.sbatch']
  job = subprocess.Popen(
    [*words, *arguments(folders)],
    cwd=tmp_path,
    env=environment,
    start_new_session=True,
  )
  try:
    wait(job, lambda: newest(workdir) >= 5)
    first = json.loads(tasks.read_text())
    os.kill(first[1], signal.SIGKILL)
    killed = newest(workdir)
    wait(job, lambda: newest(workdir) > killed + 5)
    second = json.loads(tasks.read_text())
    assert not set(first) & set(second)
    for pid in second:  # as --signal=TERM@300 asks
      os.kill(pid, signal.SIGTERM)
    assert job.wait(TIMEOUT) == 0
  finally:
    if job.poll() is None:
      pids = json.loads(tasks.read_text()) if tasks.exists() else []
      os.killpg(job.pid, signal.SIGKILL)
      for pid in pids:
        os.kill(pid, signal.SIGKILL)
  log = (tmp_path / f'nfnets-{commands.JOB}.log').read_text()
  assert '0: process 0 of 2, 1 local of 2 devices' in log
  assert 'attempt 1 failed with exit code 137' in log
  stopped = re.search(r'0: SIGTERM stopped the run after step (\d+)', log)
  resumed = re.findall(r'0: resumed after step (\d+)', log)
  assert stopped and len(resumed) == 2 and resumed[1] == stopped[1], log
  report = json.loads((workdir / 'report.json').read_text())
  assert (report['steps'], report['devices']) == (STEPS, 2)


@pytest.mark.slow
def test_tpu_pod(environment, folders, tmp_path):  # noqa: F811
  """The first connection fails."""
  done = subprocess.run(
    ['bash', LAUNCH / 'tpu_pod.sh', *arguments(folders)],
    cwd='/',
    env=environment
    | {'TPU': 'pod', 'ZONE': 'here', 'REPOSITORY': 'nfnets jax'},
    capture_output=True,
    text=True,
    timeout=TIMEOUT,
  )
  assert done.returncode == 0, done.stderr
  assert 'attempt 1 failed' in done.stderr
  assert 'process 0 of 2, 1 local of 2 devices' in done.stdout
  report = json.loads((tmp_path / 'a run' / 'report.json').read_text())
  assert (report['steps'], report['devices']) == (STEPS, 2)


@pytest.mark.slow
def test_jobset(environment, hosts, folders, tmp_path):  # noqa: F811
  """Pods of the job, with folders of this machine in place of the volumes."""
  jobset = yaml.safe_load((LAUNCH / 'jobset.yaml').read_text())
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  (container,) = job['template']['spec']['containers']
  folder = {'/runs/f1': environment['WORKDIR'], '/data': str(folders[0])}
  pods = []
  for index in range(job['completions']):
    words = [
      word.replace('$(JOB_COMPLETION_INDEX)', str(index))
      .replace('/runs/f1', folder['/runs/f1'])
      .replace('/data/tensorflow_datasets', folder['/data'])
      .replace('nfnet_imagenet.py:F1', 'digits.py')
      for word in container['command']
    ]
    pods.append(
      subprocess.Popen(
        hosts.on(index, [*words, *arguments(folders)]),
        cwd=tmp_path,
        env=environment | {'JOB_COMPLETION_INDEX': str(index)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
      )
    )
  try:
    printed = runs.outputs(pods, TIMEOUT)
  finally:
    for pod in pods:
      pod.kill()
      pod.communicate()
  for pod, text in zip(pods, printed, strict=True):
    assert pod.returncode == 0, text
  assert 'process 0 of 2, 1 local of 2 devices' in printed[0]
  workdir = pathlib.Path(environment['WORKDIR'])
  report = json.loads((workdir / 'report.json').read_text())
  assert (report['steps'], report['devices']) == (STEPS, 2)
