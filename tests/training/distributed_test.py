import os
import pathlib
import subprocess
import sys

import jax
import pytest

from nfnets_jax.training import distributed
from tests import multi_process_test as processes

SRUN = {
  'SLURM_JOB_ID': '4711',
  'SLURM_STEP_NODELIST': 'localhost',
  'SLURM_STEP_NUM_TASKS': '2',
  'SLURM_NTASKS': '2',
  'SLURM_PROCID': '1',
  'SLURM_LOCALID': '1',
}
MPIRUN = {
  'OMPI_COMM_WORLD_SIZE': '2',
  'OMPI_COMM_WORLD_RANK': '1',
  'OMPI_COMM_WORLD_LOCAL_RANK': '1',
}
ORTE = {'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://127.0.0.1:34911'}
POD = {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '1'}


@pytest.mark.parametrize(
  'environment',
  [
    {},
    SRUN | {'SLURM_NTASKS': '1', 'SLURM_STEP_NUM_TASKS': '1'},
    # An interactive step of one task in a job of more.
    SRUN | {'SLURM_STEP_NUM_TASKS': '1'},
    # A shell of salloc, and the script of sbatch.
    {name: SRUN[name] for name in ('SLURM_JOB_ID', 'SLURM_NTASKS')},
    {x: y for x, y in SRUN.items() if x != 'SLURM_STEP_NODELIST'},
    MPIRUN | ORTE | {'OMPI_COMM_WORLD_SIZE': '1'},
    SRUN | MPIRUN | {'OMPI_COMM_WORLD_SIZE': '1'},
    {'KUBERNETES_SERVICE_HOST': '10.0.0.1'},
    {'JAX_PLATFORMS': 'cpu', 'TPU_WORKER_HOSTNAMES': 'a,b'},
    {'JAX_COORDINATOR_ADDRESS': 'localhost:1'},
  ],
)
def test_alone(environment):
  assert distributed.detect(environment) is None


@pytest.mark.parametrize('environment', [SRUN, MPIRUN | ORTE])
def test_jax_finds_the_others(environment):
  assert distributed.detect(environment) == {}


@pytest.fixture
def no_packages(monkeypatch):
  """None of the packages that are asked for is installed."""
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)


@pytest.fixture
def all_packages(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: True)


def test_open_mpi_5(no_packages):
  with pytest.raises(ValueError, match='set JAX_COORDINATOR_ADDRESS=host:port'):
    distributed.detect(MPIRUN)
  address = {'JAX_COORDINATOR_ADDRESS': 'node1:1234'}
  assert distributed.detect(MPIRUN | address) == {
    'coordinator_address': 'node1:1234',
    'num_processes': 2,
    'process_id': 1,
    'local_device_ids': [1],
    'cluster_detection_method': 'deactivate',
  }


def test_open_mpi_5_with_mpi4py(all_packages):
  expected = {'cluster_detection_method': 'mpi4py'}
  assert distributed.detect(MPIRUN) == expected


def test_kubernetes_without_its_package(no_packages):
  with pytest.raises(ValueError, match=r"install 'jax\[k8s\]'"):
    distributed.detect(POD)


def test_kubernetes(all_packages):
  assert distributed.detect(POD | {'JAX_PLATFORMS': 'cuda,cpu'}) == {}


@pytest.mark.parametrize(
  ('environment', 'expected'),
  [
    ({}, {}),
    ({'TPU_SKIP_MDS_QUERY': '1'}, None),
    ({'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'a,b'}, {}),
    ({'JAX_PLATFORMS': 'tpu,cpu'}, {}),
    ({'JAX_PLATFORMS': 'cpu'}, None),
  ],
)
def test_tpu(all_packages, monkeypatch, environment, expected):
  def glob(folder, pattern):
    return [folder / 'accel0'] if str(folder) == '/dev' else []

  monkeypatch.setattr(pathlib.Path, 'glob', glob)
  assert distributed.detect(environment) == expected
  # Without a chip it is an ordinary host.
  monkeypatch.setattr(pathlib.Path, 'glob', lambda folder, pattern: [])
  assert distributed.detect(environment) is None


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
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
  monkeypatch.delenv('JAX_COORDINATOR_ADDRESS', raising=False)
  with pytest.raises(ValueError, match=message):
    distributed.initialize(*flags)


def test_a_run_by_itself_joins_nobody(monkeypatch):
  """jax refuses where it has been asked for its devices before."""
  jax.devices()
  for name in SRUN:
    monkeypatch.delenv(name, raising=False)
  distributed.initialize()
  for name, value in SRUN.items():
    monkeypatch.setenv(name, value)
  distributed.initialize(num_processes=1)
  with pytest.raises(RuntimeError, match='--num_processes=1 runs a process by'):
    distributed.initialize()


def test_one_process_agrees_with_itself(tmp_path):
  distributed.agree('the seed', 0)
  assert distributed.all_agree(True)
  assert not distributed.all_agree(False)
  distributed.check_shared(tmp_path / 'new')
  assert not (tmp_path / 'new').exists()
  with pytest.raises(KeyError), distributed.ending_together():
    raise KeyError('as usual')


_JOIN = """
import jax
from nfnets_jax.training import distributed
distributed.initialize(start_timeout=60)
distributed.agree('the number of devices', jax.device_count())
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
  ],
  ids=['slurm', 'Open MPI 4', 'Open MPI 5'],
)
def test_processes_find_one_another(environment, rank, monkeypatch):
  """With the variables that srun and mpirun set, in two real processes."""
  port = processes.free_port()
  if environment == MPIRUN:
    environment = MPIRUN | {'JAX_COORDINATOR_ADDRESS': f'localhost:{port}'}
  else:
    monkeypatch.setenv('JAX_COORDINATOR_PORT', str(port))
  started = []
  try:
    for index in range(2):
      started.append(
        subprocess.Popen(
          [sys.executable, '-c', _JOIN],
          cwd=processes.ROOT,
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
    printed = processes.outputs(started, timeout=90)
  finally:
    for process in started:
      process.kill()
      process.communicate()
  for process, text in zip(started, printed, strict=True):
    assert process.returncode == 0, text
  assert 'process 0 of 2, 3 local of 6 devices' in printed[0]
  assert 'local of' not in printed[1]
