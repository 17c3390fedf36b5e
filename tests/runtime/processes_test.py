import os
import subprocess
import sys

import jax
import pytest

from nfnets_jax.runtime import processes
from tests import multi_process_test as runs
from tests.runtime.launchers_test import MPIEXEC, MPIRUN, ORTE, SRUN


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (('', 2, 0), '--coordinator_address is missing'),
    (('localhost:1',), '--num_processes, --process_id is missing'),
    ((None, 2), '--coordinator_address, --process_id is missing'),
    ((None, None, 0), '--coordinator_address, --num_processes is missing'),
    (('localhost:1', 2), '--process_id is missing: give .* or none of them'),
    (('localhost', 2, 0), 'coordinator_address localhost is not host:port'),
    (('localhost:1', 2, 2), 'process_id 2 is not one of 2 processes'),
    (('localhost:1', 2, -1), 'process_id -1 is not one of 2 processes'),
    ((None, 1, 1), 'coordinator_address is missing'),
    ((None, None, None, 0), 'start_timeout must be at least 1 second, got 0'),
    ((None, None, None, 1, 0), 'heartbeat_timeout must be at least 1 second'),
  ],
)
def test_flags_that_make_no_sense(flags, message, monkeypatch):
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', '')
  with pytest.raises(ValueError, match=message):
    processes.initialize(*flags)


def test_a_run_by_itself_joins_nobody(monkeypatch):
  """jax refuses where it has been asked for its devices before."""
  jax.devices()
  for name in SRUN:
    monkeypatch.delenv(name, raising=False)
  processes.initialize()
  for name, value in SRUN.items():
    monkeypatch.setenv(name, value)
  processes.initialize(num_processes=1)
  with pytest.raises(RuntimeError, match='--num_processes=1 runs a process by'):
    processes.initialize()


def test_one_process_agrees_with_itself(tmp_path):
  processes.agree('the seed', 0)
  assert processes.all_agree(True)
  assert not processes.all_agree(False)
  processes.check_shared(tmp_path / 'new')
  assert not (tmp_path / 'new').exists()
  with pytest.raises(KeyError), processes.ending_together():
    raise KeyError('as usual')


_JOIN = """
import jax
from nfnets_jax.runtime import processes
processes.initialize(start_timeout=60)
processes.agree('the number of devices', jax.device_count())
"""


@pytest.mark.parametrize(
  ('environment', 'rank'),
  [
    (SRUN, ('SLURM_PROCID', 'SLURM_LOCALID')),
    pytest.param(
      MPIRUN | ORTE,
      ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK'),
      marks=pytest.mark.slow,
    ),
    pytest.param(
      MPIRUN,
      ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK'),
      marks=pytest.mark.slow,
    ),
    pytest.param(
      MPIEXEC, ('PMI_RANK', 'MPI_LOCALRANKID'), marks=pytest.mark.slow
    ),
    pytest.param(
      SRUN | dict.fromkeys([*MPIRUN, *ORTE], ''),
      ('SLURM_PROCID', 'SLURM_LOCALID'),
      marks=pytest.mark.slow,
    ),
  ],
  ids=['slurm', 'Open MPI 4', 'Open MPI 5', 'mpiexec', 'empty ones'],
)
def test_processes_find_one_another(environment, rank, monkeypatch):
  """With the variables that srun and mpirun set, in two real processes."""
  port = runs.free_port()
  if environment in (MPIRUN, MPIEXEC):
    environment = environment | {'JAX_COORDINATOR_ADDRESS': f'localhost:{port}'}
  else:
    monkeypatch.setenv('JAX_COORDINATOR_PORT', str(port))
  started = []
  try:
    for index in range(2):
      started.append(
        subprocess.Popen(
          [sys.executable, '-c', _JOIN],
          cwd=runs.ROOT,
          env={
            **os.environ,
            'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': '--xla_force_host_platform_device_count=3',
            **environment,
            **dict.fromkeys(rank, str(index)),
          },
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          text=True,
        )
      )
    printed = runs.outputs(started, timeout=90)
  finally:
    for process in started:
      process.kill()
      process.communicate()
  for process, text in zip(started, printed, strict=True):
    assert process.returncode == 0, text
  assert 'process 0 of 2, 3 local of 6 devices' in printed[0]
  assert 'local of' not in printed[1]
