"""Detects the processes of a run from the environment of a launcher.

jax detects TPU pod slices, SLURM, Open MPI and Kubernetes. Other launchers give
the number of processes but not the coordinator, or are unknown to jax, whose
processes would then train separately.
"""

import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

ALONE = '--num_processes=1 runs a process by itself'


class _Launcher(NamedTuple):
  """A launcher's environment variables in each process; '' if missing."""

  name: str
  size: str
  rank: str
  local_rank: str = ''


# Launchers unknown to jax, whose processes would otherwise train alone.
_LAUNCHERS = (
  _Launcher('mpiexec', 'PMI_SIZE', 'PMI_RANK', 'MPI_LOCALRANKID'),
  _Launcher(
    'MVAPICH',
    'MV2_COMM_WORLD_SIZE',
    'MV2_COMM_WORLD_RANK',
    'MV2_COMM_WORLD_LOCAL_RANK',
  ),
  _Launcher(
    'jsrun',
    'JSM_NAMESPACE_SIZE',
    'JSM_NAMESPACE_RANK',
    'JSM_NAMESPACE_LOCAL_RANK',
  ),
  _Launcher('flux', 'FLUX_JOB_SIZE', 'FLUX_TASK_RANK', 'FLUX_TASK_LOCAL_ID'),
  _Launcher('torchrun', 'WORLD_SIZE', 'RANK', 'LOCAL_RANK'),
  _Launcher('horovodrun', 'HOROVOD_SIZE', 'HOROVOD_RANK', 'HOROVOD_LOCAL_RANK'),
  _Launcher('aprun', '', 'ALPS_APP_PE'),
  _Launcher('PALS', '', 'PALS_RANKID', 'PALS_LOCAL_RANKID'),
  _Launcher('PMIx', '', 'PMIX_RANK'),
  _Launcher('mpiexec', 'MPI_LOCALNRANKS', 'MPI_LOCALRANKID'),
)
_OPEN_MPI = _Launcher(
  'Open MPI',
  'OMPI_COMM_WORLD_SIZE',
  'OMPI_COMM_WORLD_RANK',
  'OMPI_COMM_WORLD_LOCAL_RANK',
)


def check_address(name: str, address: str) -> None:
  """Raises a ValueError unless the address is `host:port`."""
  host, _, port = address.rpartition(':')
  if not host or not (port.isascii() and port.isdecimal()):
    raise ValueError(f'{name} {address} is not host:port')


def detect(environment: Mapping[str, str]) -> dict[str, Any] | None:
  """Detects the other processes of a run from the environment.

  The innermost launcher wins: one unknown to jax (`mpiexec` of MPICH or Intel
  MPI, torchrun etc.), if it differs from the rest; then, in this order, Open
  MPI, SLURM, a TPU pod slice and an indexed Kubernetes job. Empty variables
  count as unset.

  Returns:
    None for a single process. Else arguments of `jax.distributed.initialize`,
    empty if jax detects them itself.

  Raises:
    ValueError: if there are other processes but not enough information, or a
      variable is not a number; the message has the remedy.

  Example:
    >>> detect({}) is None
    True
    >>> srun = {'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'node[1-2]',
    ...         'SLURM_NTASKS': '2', 'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'}
    >>> detect(srun)
    {}
    >>> detect(srun | {'SLURM_NTASKS': '1'}) is None
    True
    >>> mpiexec = {'PMI_SIZE': '2', 'PMI_RANK': '1'}
    >>> detect(mpiexec | {'JAX_COORDINATOR_ADDRESS': 'n1:80'})['process_id']
    1
  """
  environment = {x: y for x, y in environment.items() if y.strip()}
  open_mpi = _size_and_rank(environment, _OPEN_MPI)
  # In a shell of `salloc` or `sbatch`, some of these are missing, or the step
  # has one task although the job has more, which would never connect.
  started_by_srun = all(
    name in environment
    for name in (
      'SLURM_JOB_ID',
      'SLURM_STEP_NODELIST',
      'SLURM_NTASKS',
      'SLURM_PROCID',
      'SLURM_LOCALID',
    )
  )
  slurm = None
  if started_by_srun:
    for name in ('SLURM_JOB_ID', 'SLURM_NTASKS', 'SLURM_LOCALID'):
      number(environment, name)  # read by jax
    step = 'SLURM_STEP_NUM_TASKS'
    tasks = number(environment, step if step in environment else 'SLURM_NTASKS')
    slurm = tasks, number(environment, 'SLURM_PROCID')

  for launcher in _LAUNCHERS:
    detected = _size_and_rank(environment, launcher)
    # SLURM also sets PMI's variables, and jsrun Open MPI's.
    is_known = any(_agree(detected, other) for other in (open_mpi, slurm))
    if detected and _of_several(detected) and not is_known:
      return _from_launcher(environment, launcher)
  if open_mpi:
    if not _of_several(open_mpi):
      return None
    if 'OMPI_MCA_orte_hnp_uri' in environment:
      return {}
    return _from_launcher(environment, _OPEN_MPI)
  if slurm:
    return {} if _of_several(slurm) else None

  if _has_tpu(environment):
    return {}

  if {'KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX'} <= environment.keys():
    number(environment, 'JOB_COMPLETION_INDEX')
    if importlib.util.find_spec('kubernetes') is None:
      raise ValueError(
        'this pod is one of an indexed job, whose size only the API knows: '
        'give --coordinator_address, --num_processes and '
        "--process_id, or install 'jax[k8s]' and let the pod read jobs and "
        f'pods; {ALONE}'
      )
    return {}
  return None


def number(environment: Mapping[str, str], name: str) -> int:
  """Returns a variable as an int; raises a ValueError if it is none."""
  text = environment[name].strip()
  if not (text.isascii() and text.isdecimal()):
    raise ValueError(
      f'{name}={text} in the environment is not a number; unset it if no '
      f'launcher has set it; {ALONE}'
    )
  return int(text)


_SizeAndRank = tuple[int | None, int | None]


def _size_and_rank(
  environment: Mapping[str, str], launcher: _Launcher
) -> _SizeAndRank | None:
  """Returns (number of processes, index); None where unknown."""
  names = {launcher.size, launcher.rank} & environment.keys()
  # torchrun's names are generic: require both.
  if not names or (launcher.name == 'torchrun' and len(names) < 2):
    return None
  size, rank = (
    number(environment, name) if name in environment else None
    for name in (launcher.size, launcher.rank)
  )
  return size, rank


def _agree(detected: _SizeAndRank | None, other: _SizeAndRank | None) -> bool:
  if detected is None or other is None:
    return False
  return detected[0] in (None, other[0]) and detected[1] == other[1]


def _of_several(detected: _SizeAndRank) -> bool:
  """Whether there are others; if the size is unknown, rank 0 passes."""
  size, rank = detected
  return bool(rank) if size is None else size > 1


def _from_launcher(
  environment: Mapping[str, str], launcher: _Launcher
) -> dict[str, Any]:
  """Returns arguments for a launcher that does not give process 0's address."""
  size, rank = _size_and_rank(environment, launcher) or (None, None)
  # MPI_LOCALNRANKS counts the processes of this host only.
  known = None not in (size, rank) and launcher.size != 'MPI_LOCALNRANKS'
  address = environment.get('JAX_COORDINATOR_ADDRESS', '').strip()
  if known and address:
    check_address('JAX_COORDINATOR_ADDRESS', address)
    arguments: dict[str, Any] = {
      'coordinator_address': address,
      'num_processes': size,
      'process_id': rank,
      'cluster_detection_method': 'deactivate',
    }
    if launcher.local_rank in environment:
      local_rank = number(environment, launcher.local_rank)
      arguments['local_device_ids'] = [local_rank]
    return arguments
  if launcher is _OPEN_MPI and importlib.util.find_spec('mpi4py') is not None:
    return {'cluster_detection_method': 'mpi4py'}
  if launcher is _OPEN_MPI:
    remedy = (
      'set JAX_COORDINATOR_ADDRESS=host:port with `mpirun -x`, or install '
      'mpi4py'
    )
  elif known:
    remedy = (
      'set JAX_COORDINATOR_ADDRESS=host:port for all of them, with a free port '
      'of its host'
    )
  else:
    remedy = 'give --coordinator_address, --num_processes and --process_id'
  given = ', '.join(
    f'{name}={environment[name].strip()}'
    for name in (launcher.size, launcher.rank)
    if name in environment
  )
  raise ValueError(
    f'{launcher.name} started several processes ({given}) without the address '
    f'of process 0: {remedy}; {ALONE}'
  )


def _has_tpu(environment: Mapping[str, str]) -> bool:
  """Whether jax would use TPU chips of this host, alone or in a slice."""
  platforms = environment.get('JAX_PLATFORMS', '')
  if platforms and 'tpu' not in platforms.split(','):
    return False
  # Without the metadata server, only these variables list the hosts.
  names = (
    'TPU_PROCESS_ADDRESSES_PATH',
    'TPU_PROCESS_ADDRESSES',
    'TPU_WORKER_HOSTNAMES',
  )
  if 'TPU_SKIP_MDS_QUERY' in environment and not any(
    name in environment for name in names
  ):
    return False
  library = 'TPU_LIBRARY_PATH' in environment or (
    importlib.util.find_spec('libtpu') is not None
  )
  chips = [
    *pathlib.Path('/dev').glob('accel*'),
    *pathlib.Path('/dev/vfio').glob('[0-9]*'),
  ]
  return library and bool(chips)
