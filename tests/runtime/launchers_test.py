import pathlib

import pytest

from nfnets_jax.runtime import launchers

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
MPIEXEC = {'PMI_SIZE': '2', 'PMI_RANK': '1', 'MPI_LOCALRANKID': '1'}
TORCHRUN = {
  'WORLD_SIZE': '16',
  'RANK': '9',
  'LOCAL_RANK': '1',
  'MASTER_ADDR': 'node1',
  'MASTER_PORT': '29500',
}
JSRUN = {
  'JSM_NAMESPACE_SIZE': '2',
  'JSM_NAMESPACE_RANK': '1',
  'JSM_NAMESPACE_LOCAL_RANK': '1',
}
ADDRESS = {'JAX_COORDINATOR_ADDRESS': 'node1:1234'}
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
    MPIEXEC | {'PMI_SIZE': '1', 'PMI_RANK': '0', 'MPI_LOCALNRANKS': '1'},
    {'PMI_RANK': '0'},
    {'PMIX_RANK': '0'},
    TORCHRUN | {'WORLD_SIZE': '1', 'RANK': '0'},
    # Such names are used for other things.
    {'WORLD_SIZE': '3'},
    {'RANK': 'captain'},
    # Set, and to nothing.
    dict.fromkeys([*SRUN, *MPIRUN, *MPIEXEC, *TORCHRUN, *ADDRESS], ''),
    dict.fromkeys([*MPIRUN, *ORTE, *POD, *JSRUN], ' '),
    SRUN | {'SLURM_PROCID': ''},
    {'JOB_COMPLETION_INDEX': '1', 'KUBERNETES_SERVICE_HOST': ''},
  ],
)
def test_alone(environment):
  assert launchers.detect(environment) is None


@pytest.mark.parametrize(
  'environment',
  [
    SRUN,
    MPIRUN | ORTE,
    # What srun and mpirun set beside their own.
    SRUN | MPIEXEC,
    SRUN | {'PMIX_RANK': '1'},
    MPIRUN | ORTE | {'PMIX_RANK': '1'},
    SRUN | dict.fromkeys([*MPIRUN, *ORTE], ''),
    SRUN | {'SLURM_STEP_NUM_TASKS': ''},
  ],
)
def test_jax_finds_the_others(environment):
  assert launchers.detect(environment) == {}


@pytest.fixture
def no_packages(monkeypatch):
  """None of the packages that are asked for is installed."""
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)


@pytest.fixture
def all_packages(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: True)


def test_open_mpi_5(no_packages):
  with pytest.raises(ValueError, match='set JAX_COORDINATOR_ADDRESS=host:port'):
    launchers.detect(MPIRUN)
  with pytest.raises(ValueError, match='set JAX_COORDINATOR_ADDRESS=host:port'):
    launchers.detect(MPIRUN | dict.fromkeys(ADDRESS, ''))
  assert launchers.detect(MPIRUN | ADDRESS) == {
    'coordinator_address': 'node1:1234',
    'num_processes': 2,
    'process_id': 1,
    'local_device_ids': [1],
    'cluster_detection_method': 'deactivate',
  }


def test_open_mpi_5_with_mpi4py(all_packages):
  expected = {'cluster_detection_method': 'mpi4py'}
  assert launchers.detect(MPIRUN) == expected


@pytest.mark.parametrize(
  ('environment', 'size', 'rank', 'local_rank'),
  [
    (MPIEXEC, 2, 1, 1),
    (TORCHRUN, 16, 9, 1),
    (JSRUN | MPIRUN, 2, 1, 1),
    ({'PMI_SIZE': '4', 'PMI_RANK': '0'}, 4, 0, None),
    # One task of srun has started sixteen processes.
    (SRUN | TORCHRUN, 16, 9, 1),
    (SRUN | {'SLURM_STEP_NUM_TASKS': '1'} | MPIEXEC, 2, 1, 1),
  ],
)
def test_launchers_that_jax_does_not_know(environment, size, rank, local_rank):
  message = (
    f'={size}, .*set JAX_COORDINATOR_ADDRESS=host:port .*--num_processes'
  )
  with pytest.raises(ValueError, match=message):
    launchers.detect(environment)
  expected = {
    'coordinator_address': 'node1:1234',
    'num_processes': size,
    'process_id': rank,
    'cluster_detection_method': 'deactivate',
  }
  if local_rank is not None:
    expected['local_device_ids'] = [local_rank]
  assert launchers.detect(environment | ADDRESS) == expected


@pytest.mark.parametrize(
  'environment',
  [
    {'PMIX_RANK': '1'},
    {'ALPS_APP_PE': '3'},
    {'MPI_LOCALNRANKS': '2', 'MPI_LOCALRANKID': '0'},
    {'PMI_SIZE': '2'},
  ],
)
def test_launchers_that_tell_too_little(environment):
  (name, value), *_ = environment.items()
  with pytest.raises(ValueError, match=f'{name}={value}.* give --coordinator_'):
    launchers.detect(environment | ADDRESS)


@pytest.mark.parametrize(
  ('environment', 'name'),
  [
    (MPIRUN | {'OMPI_COMM_WORLD_SIZE': 'abc'}, 'OMPI_COMM_WORLD_SIZE=abc'),
    (SRUN | {'SLURM_PROCID': '1.0'}, 'SLURM_PROCID=1.0'),
    (SRUN | {'SLURM_JOB_ID': 'x7'}, 'SLURM_JOB_ID=x7'),
    (MPIEXEC | {'PMI_RANK': '-1'}, 'PMI_RANK=-1'),
    (TORCHRUN | {'WORLD_SIZE': '$N'}, r'WORLD_SIZE=\$N'),
    (POD | {'JOB_COMPLETION_INDEX': 'a'}, 'JOB_COMPLETION_INDEX=a'),
  ],
)
def test_variables_that_are_no_numbers(environment, name):
  with pytest.raises(
    ValueError, match=f'{name} in the environment is not a nu'
  ):
    launchers.detect(environment)


def test_addresses_in_the_environment_are_checked():
  for address in ('node1', ':80', 'node1:http'):
    with pytest.raises(ValueError, match=f'ADDRESS {address} is not host:port'):
      launchers.detect(MPIEXEC | {'JAX_COORDINATOR_ADDRESS': address})


def test_kubernetes_without_its_package(no_packages):
  with pytest.raises(ValueError, match=r"install 'jax\[k8s\]'"):
    launchers.detect(POD)


def test_kubernetes(all_packages):
  assert launchers.detect(POD | {'JAX_PLATFORMS': 'cuda,cpu'}) == {}


@pytest.mark.parametrize(
  ('environment', 'expected'),
  [
    ({}, {}),
    ({'TPU_SKIP_MDS_QUERY': '', 'JAX_PLATFORMS': ''}, {}),
    ({'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': ''}, None),
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
  assert launchers.detect(environment) == expected
  # Without a chip it is an ordinary host.
  monkeypatch.setattr(pathlib.Path, 'glob', lambda folder, pattern: [])
  assert launchers.detect(environment) is None
