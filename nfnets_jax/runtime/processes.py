"""Runs over several processes, one per host or device.

Processes connect through the coordinator, process 0. Each reads its part of
every batch; only process 0 writes shared files. If a process fails, it exits at
once, the others within the heartbeat timeout. A restart resumes the run.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import pathlib
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from nfnets_jax import devices as platforms
from nfnets_jax.runtime import interrupt

# Seconds to wait for the other processes at the start.
START_TIMEOUT = 300
# Seconds without a heartbeat until a process counts as dead. A separate thread
# sends heartbeats, also while jax compiles.
HEARTBEAT_TIMEOUT = 60

# Seconds to wait for a new file to appear in all processes; NFS is slow.
_SHARED_TIMEOUT = 30.0

# jax treats empty variables with these prefixes as set.
_PREFIXES = ('JAX_', 'SLURM_', 'OMPI_', 'TPU_', 'MEGASCALE_', 'KUBERNETES_')

_ALONE = '--num_processes=1 runs a process by itself'


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


def initialize(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  start_timeout: int = START_TIMEOUT,
  heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> None:
  """Connects to the other processes of the run, if any.

  Without the first three arguments, the environment decides; see `detect`. Call
  it once, before any use of jax devices, which it initializes.

  Args:
    coordinator_address: `host:port` of process 0, reachable from all processes;
      defaults to `$JAX_COORDINATOR_ADDRESS`.
    num_processes: number of processes; 1 ignores the environment.
    process_id: index of this process, in [0, num_processes).
    start_timeout: seconds to wait for the others before exiting with an error.
    heartbeat_timeout: seconds without a heartbeat after which a process counts
      as dead, and the others exit.

  Raises:
    ValueError: if some of the first three arguments are missing or invalid, the
      environment is incomplete, or a platform that it names is missing.
    RuntimeError: if jax cannot connect the processes.
  """
  timeouts = {
    'start_timeout': start_timeout,
    'heartbeat_timeout': heartbeat_timeout,
  }
  for name, seconds in timeouts.items():
    if seconds < 1:
      raise ValueError(f'{name} must be at least 1 second, got {seconds}')
  if coordinator_address is None and num_processes is None is process_id:
    arguments = detect(os.environ)
  else:
    arguments = _from_flags(coordinator_address, num_processes, process_id)
  if arguments is None:
    platforms.start()
    return
  # jax treats empty variables as set.
  for name, value in list(os.environ.items()):
    if not value.strip() and name.startswith(_PREFIXES):
      del os.environ[name]
  if 'JAX_COORDINATOR_PORT' in os.environ:
    _number(os.environ, 'JAX_COORDINATOR_PORT')
  with _exit_after(start_timeout, arguments):
    try:
      jax.distributed.initialize(
        **arguments,
        # Longer than ours, since jax's message is less helpful.
        initialization_timeout=start_timeout + 60,
        heartbeat_timeout_seconds=heartbeat_timeout,
      )
      platforms.start()
      local, devices = jax.local_device_count(), jax.device_count()
    except Exception as error:
      raise RuntimeError(
        f'{_describe(arguments)} cannot join the others: {error}. On process 0 '
        'the port may be in use; or the environment resembles a cluster, but '
        f'jax finds none: {_ALONE}'
      ) from error
  count = jax.process_count()
  if local * count != devices:
    raise ValueError(
      f'process {jax.process_index()} has {local} of {devices} devices; all '
      f'{count} processes must have equally many'
    )
  if count > 1 and jax.process_index() == 0:
    print(
      f'process 0 of {count}, {local} local of {devices} devices', flush=True
    )


def _from_flags(
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
) -> dict[str, Any] | None:
  """Returns arguments for jax, None for a single process."""
  if num_processes == 1 and process_id in (None, 0):
    return None
  flags: dict[str, Any] = {
    'coordinator_address': coordinator_address
    or os.environ.get('JAX_COORDINATOR_ADDRESS', '').strip()
    or None,
    'num_processes': num_processes,
    'process_id': process_id,
  }
  if missing := [name for name, value in flags.items() if value is None]:
    raise ValueError(
      f'--{", --".join(missing)} is missing: give --coordinator_address, '
      '--num_processes and --process_id, or none of them'
    )
  _check_address('coordinator_address', str(flags['coordinator_address']))
  if not 0 <= flags['process_id'] < flags['num_processes']:
    raise ValueError(
      f'process_id {process_id} is not one of {num_processes} processes: give '
      'a number from 0'
    )
  # Do not mix flags with the environment.
  return {**flags, 'cluster_detection_method': 'deactivate'}


def _check_address(name: str, address: str) -> None:
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
      _number(environment, name)  # read by jax
    step = 'SLURM_STEP_NUM_TASKS'
    tasks = _number(
      environment, step if step in environment else 'SLURM_NTASKS'
    )
    slurm = tasks, _number(environment, 'SLURM_PROCID')

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
    _number(environment, 'JOB_COMPLETION_INDEX')
    if importlib.util.find_spec('kubernetes') is None:
      raise ValueError(
        'this pod is one of an indexed job, and how many there are the API '
        'alone knows: give --coordinator_address, --num_processes and '
        "--process_id, or install 'jax[k8s]' and let the pod read jobs and "
        f'pods; {_ALONE}'
      )
    return {}
  return None


def _number(environment: Mapping[str, str], name: str) -> int:
  text = environment[name].strip()
  if not (text.isascii() and text.isdecimal()):
    raise ValueError(
      f'{name}={text} in the environment is not a number; unset it if no '
      f'launcher has set it; {_ALONE}'
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
    _number(environment, name) if name in environment else None
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
    _check_address('JAX_COORDINATOR_ADDRESS', address)
    arguments: dict[str, Any] = {
      'coordinator_address': address,
      'num_processes': size,
      'process_id': rank,
      'cluster_detection_method': 'deactivate',
    }
    if launcher.local_rank in environment:
      local_rank = _number(environment, launcher.local_rank)
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
    f'{launcher.name} has started several processes ({given}) and does not say '
    f'where process 0 is: {remedy}; {_ALONE}'
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


def _describe(arguments: Mapping[str, Any]) -> str:
  if 'process_id' not in arguments:
    return 'this process'
  return (
    f'process {arguments["process_id"]} of {arguments["num_processes"]}, with '
    f'process 0 at {arguments["coordinator_address"]},'
  )


@contextlib.contextmanager
def _exit_after(seconds: float, arguments: Mapping[str, Any]) -> Iterator[None]:
  """Exits with an error if the body takes longer."""

  def end() -> None:
    print(
      f'error: {_describe(arguments)} has waited {seconds} s for the others. '
      'Are all started, with the same address and number of processes, and can '
      'they reach that port? --start_timeout waits longer',
      file=sys.stderr,
      flush=True,
    )
    os._exit(1)

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Exits at once if the body fails, so that the other processes notice.

  Otherwise a failed process would block at exit on the others, which block on
  it in their next collective. A single process raises as usual.
  """
  try:
    yield
  except BaseException as error:
    stopped = (
      isinstance(error, SystemExit) and error.code == interrupt.EXIT_CODE
    )
    if jax.process_count() == 1 or stopped:  # all stop at the same step
      raise
    if not isinstance(error, SystemExit):
      traceback.print_exc()
    print(
      f'error: process {jax.process_index()} of {jax.process_count()} ends, '
      f'and the others with it: {error or type(error).__name__}\n'
      'If the connection to another process was lost, the reason is in what '
      'that one printed. Start all processes again to go on from the newest '
      'checkpoint',
      file=sys.stderr,
      flush=True,
    )
    sys.stdout.flush()
    os._exit(1)


def agree(what: str, value: Any) -> None:
  """Checks that all processes, which must all call this, have the same value.

  `what` names it in the message; `value` is JSON-serialisable. A ValueError is
  raised in every process if any value differs from that of process 0.

  Example:
    >>> agree('the seed', 0)
  """
  if jax.process_count() == 1:
    return
  text = json.dumps(value, sort_keys=True)
  digest = hashlib.sha256(text.encode()).digest()
  digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
  if others := np.flatnonzero((digests != digests[0]).any(axis=1)).tolist():
    shown = text if len(text) <= 200 else f'{text[:200]}...'
    raise ValueError(
      f'{what} is not the same in all processes: {others} differ from process '
      f'0; in process {jax.process_index()} it is {shown}'
    )


def all_agree(yes: bool) -> bool:
  """Returns the logical and over all processes, which must all call this."""
  if jax.process_count() == 1:
    return yes
  return bool(multihost_utils.process_allgather(np.uint8(yes)).all())


def check_shared(folder: pathlib.Path) -> None:
  """Checks that all processes, which must all call this, share a folder.

  Creates the folder if there are several. A ValueError is raised in every
  process if any sees another folder.
  """
  if jax.process_count() == 1:
    return
  number = np.frombuffer(os.urandom(4), np.uint32)
  mark = f'.shared-{multihost_utils.broadcast_one_to_all(number)[0]:08x}'
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob('.shared-*'):
      stale.unlink()
    (folder / mark).touch()
  all_agree(True)  # wait for process 0 to write
  deadline = time.monotonic() + _SHARED_TIMEOUT
  # Listing refreshes the cached view of the whole folder.
  while not (seen := folder.is_dir() and folder / mark in folder.iterdir()):
    if time.monotonic() > deadline:
      break
    time.sleep(0.2)
  shared = multihost_utils.process_allgather(np.uint8(seen))
  if jax.process_index() == 0:
    (folder / mark).unlink()
  if not shared.all():
    raise ValueError(
      f'{folder} is not one folder for all processes: what process 0 writes '
      f'there, {np.flatnonzero(shared == 0).tolist()} do not see. Give a '
      '--workdir on a file system that all hosts share'
    )
