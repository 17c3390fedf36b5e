"""Several processes that make one run, one on each host or device.

They find one another through the coordinator, process 0. Each reads its part of
every batch; what must be written once, process 0 writes. All live and die
together: a process that fails ends at once, and the others follow within the
heartbeat's timeout. Started again, they go on from the newest checkpoint.
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

# Seconds that the processes wait for one another at the start.
START_TIMEOUT = 300
# Seconds without a sign of life after which a process is taken for dead. The
# signs come from a thread of their own, also while jax compiles.
HEARTBEAT_TIMEOUT = 60

# Seconds until all processes must see a new file: NFS shows it late.
_SHARED_TIMEOUT = 30.0

# Of variables that jax takes for set where they are set to nothing.
_PREFIXES = ('JAX_', 'SLURM_', 'OMPI_', 'TPU_', 'MEGASCALE_', 'KUBERNETES_')

_ALONE = '--num_processes=1 runs a process by itself'


class _Launcher(NamedTuple):
  """The variables that a launcher sets in each process; '' if it has none."""

  name: str
  size: str
  rank: str
  local_rank: str = ''


# Those that jax does not know. Without this table, each of their processes
# would take itself for the whole run.
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
  """Joins the other processes of the run, if there are any.

  Without the first three arguments the environment decides, see `detect`. To be
  called once, before jax is asked for its devices, which it starts.

  Args:
    coordinator_address: `host:port` of process 0, which all processes reach; by
      default `$JAX_COORDINATOR_ADDRESS`.
    num_processes: how many there are; 1 is a run of one process, whatever the
      environment says.
    process_id: which this is, in [0, num_processes).
    start_timeout: seconds to wait for the others; after that the process says
      so and ends.
    heartbeat_timeout: seconds without a sign of life after which a process is
      taken for dead, and the others end.

  Raises:
    ValueError: if some of the first three arguments are missing or make no
      sense, the environment tells too little, or a platform that it names is
      missing.
    RuntimeError: if jax cannot join the processes.
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
  # jax asks whether some of them are set, even to nothing.
  for name, value in list(os.environ.items()):
    if not value.strip() and name.startswith(_PREFIXES):
      del os.environ[name]
  if 'JAX_COORDINATOR_PORT' in os.environ:
    _number(os.environ, 'JAX_COORDINATOR_PORT')
  with _ending_after(start_timeout, arguments):
    try:
      jax.distributed.initialize(
        **arguments,
        # Longer than ours, for jax ends the process with less of a message.
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
  # What the flags say is not to be mixed with what the environment says.
  return {**flags, 'cluster_detection_method': 'deactivate'}


def _check_address(name: str, address: str) -> None:
  host, _, port = address.rpartition(':')
  if not host or not (port.isascii() and port.isdecimal()):
    raise ValueError(f'{name} {address} is not host:port')


def detect(environment: Mapping[str, str]) -> dict[str, Any] | None:
  """Tells from the environment whether there are other processes.

  The innermost launcher decides: one that jax does not know (`mpiexec` of MPICH
  or Intel MPI, torchrun and the like), if what it says differs from the rest;
  then, in this order, Open MPI, SLURM, a TPU pod slice, an indexed job of
  Kubernetes.

  Args:
    environment: the process's variables; empty ones count as unset.

  Returns:
    None if this process is alone. Else arguments of
    `jax.distributed.initialize`, empty where jax finds all by itself.

  Raises:
    ValueError: if there are other processes, but not enough is known of them,
      or a variable is not a number; the message says what to do.

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
  open_mpi = _place(environment, _OPEN_MPI)
  # In a shell of `salloc` or `sbatch` some of these are missing, or the step
  # has one task although the job has more: nobody would join.
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
      _number(environment, name)  # jax reads them
    step = 'SLURM_STEP_NUM_TASKS'
    tasks = _number(
      environment, step if step in environment else 'SLURM_NTASKS'
    )
    slurm = tasks, _number(environment, 'SLURM_PROCID')

  for launcher in _LAUNCHERS:
    place = _place(environment, launcher)
    # SLURM sets the variables of PMI too, and jsrun those of Open MPI.
    said = any(_agree(place, other) for other in (open_mpi, slurm))
    if place and _of_several(place) and not said:
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


_Place = tuple[int | None, int | None]


def _place(
  environment: Mapping[str, str], launcher: _Launcher
) -> _Place | None:
  """Returns how many processes there are and which this is, None if unsaid."""
  names = {launcher.size, launcher.rank} & environment.keys()
  # The names of torchrun are such as others may use for something else.
  if not names or (launcher.name == 'torchrun' and len(names) < 2):
    return None
  size, rank = (
    _number(environment, name) if name in environment else None
    for name in (launcher.size, launcher.rank)
  )
  return size, rank


def _agree(place: _Place | None, other: _Place | None) -> bool:
  if place is None or other is None:
    return False
  return place[0] in (None, other[0]) and place[1] == other[1]


def _of_several(place: _Place) -> bool:
  """Whether there are others; where the size is unsaid, rank 0 is let pass.

  It could be alone, and if it is not, the others are refused.
  """
  size, rank = place
  return bool(rank) if size is None else size > 1


def _from_launcher(
  environment: Mapping[str, str], launcher: _Launcher
) -> dict[str, Any]:
  """Returns arguments where the launcher does not say where process 0 is."""
  size, rank = _place(environment, launcher) or (None, None)
  # The number of processes on this host is not that of all.
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
  found = ', '.join(
    f'{name}={environment[name].strip()}'
    for name in (launcher.size, launcher.rank)
    if name in environment
  )
  raise ValueError(
    f'{launcher.name} has started several processes ({found}) and does not say '
    f'where process 0 is: {remedy}; {_ALONE}'
  )


def _has_tpu(environment: Mapping[str, str]) -> bool:
  """Whether jax would use TPU chips of this host, alone or in a slice."""
  platforms = environment.get('JAX_PLATFORMS', '')
  if platforms and 'tpu' not in platforms.split(','):
    return False
  # Without the metadata server, hosts are known from these variables alone.
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
def _ending_after(
  seconds: float, arguments: Mapping[str, Any]
) -> Iterator[None]:
  """Ends the process with a message if what is inside takes longer."""

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
  """Ends the process at once if what is inside fails, so that others notice.

  Left to itself, a process of several that fails would wait at its exit for the
  others, which wait for it in the next sum over devices. A run of one process
  raises as usual.
  """
  try:
    yield
  except BaseException as error:
    stopped = (
      isinstance(error, SystemExit) and error.code == interrupt.EXIT_CODE
    )
    if jax.process_count() == 1 or stopped:  # all have stopped alike
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
  """Checks that a value is the same in all processes, which all call this.

  Args:
    what: the value's name, for the message.
    value: JSON-serialisable.

  Raises:
    ValueError: in every process, if a value differs from that of process 0.

  Example:
    >>> agree('the seed', 0)
  """
  if jax.process_count() == 1:
    return
  text = json.dumps(value, sort_keys=True)
  digest = hashlib.sha256(text.encode()).digest()
  digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
  if others := np.flatnonzero((digests != digests[0]).any(axis=1)).tolist():
    mine = text if len(text) <= 200 else f'{text[:200]}...'
    raise ValueError(
      f'{what} is not the same in all processes: {others} differ from process '
      f'0; in process {jax.process_index()} it is {mine}'
    )


def all_agree(yes: bool) -> bool:
  """Returns whether all processes, which all call this, say yes."""
  if jax.process_count() == 1:
    return yes
  return bool(multihost_utils.process_allgather(np.uint8(yes)).all())


def check_shared(folder: pathlib.Path) -> None:
  """Checks that a folder is the same for all processes, which all call this.

  Args:
    folder: made if it is not there and there are several processes.

  Raises:
    ValueError: in every process, if one has a folder of its own there.
  """
  if jax.process_count() == 1:
    return
  number = np.frombuffer(os.urandom(4), np.uint32)
  mark = f'.shared-{multihost_utils.broadcast_one_to_all(number)[0]:08x}'
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob('.shared-*'):
      left_over.unlink()
    (folder / mark).touch()
  all_agree(True)  # process 0 has written
  deadline = time.monotonic() + _SHARED_TIMEOUT
  # Listed, so that what else is in the folder is seen as well from here on.
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
