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
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from nfnets_jax.training import interrupt

# Seconds that the processes wait for one another at the start.
START_TIMEOUT = 300
# Seconds without a sign of life after which a process is taken for dead. The
# signs come from a thread of their own, also while jax compiles.
HEARTBEAT_TIMEOUT = 60

# Seconds until all processes must see a new file: NFS shows it late.
_SHARED_TIMEOUT = 30.0

_ALONE = '--num_processes=1 runs a process by itself'


def initialize(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  start_timeout: int = START_TIMEOUT,
  heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> None:
  """Joins the other processes of the run, if there are any.

  Without the first three arguments the environment decides, see `detect`. To be
  called once, before jax is asked for its devices.

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
      sense, or the environment tells too little.
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
    return
  with _ending_after(start_timeout, arguments):
    try:
      jax.distributed.initialize(
        **arguments,
        # Longer than ours, for jax ends the process with less of a message.
        initialization_timeout=start_timeout + 60,
        heartbeat_timeout_seconds=heartbeat_timeout,
      )
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
    or os.environ.get('JAX_COORDINATOR_ADDRESS'),
    'num_processes': num_processes,
    'process_id': process_id,
  }
  if missing := [name for name, value in flags.items() if value is None]:
    raise ValueError(
      f'--{", --".join(missing)} is missing: give --coordinator_address, '
      '--num_processes and --process_id, or none of them'
    )
  _, colon, port = str(flags['coordinator_address']).rpartition(':')
  if not colon or not port.isdecimal():
    raise ValueError(
      f'coordinator_address {flags["coordinator_address"]} is not host:port'
    )
  if not 0 <= flags['process_id'] < flags['num_processes']:
    raise ValueError(
      f'process_id {process_id} is not one of {num_processes} processes: give '
      'a number from 0'
    )
  # What the flags say is not to be mixed with what the environment says.
  return {**flags, 'cluster_detection_method': 'deactivate'}


def detect(environment: Mapping[str, str]) -> dict[str, Any] | None:
  """Tells from the environment whether there are other processes.

  In this order, the first that has started this process decides: Open MPI,
  SLURM, a TPU pod slice, an indexed job of Kubernetes.

  Args:
    environment: the process's variables.

  Returns:
    None if this process is alone. Else arguments of
    `jax.distributed.initialize`, empty where jax finds all by itself.

  Raises:
    ValueError: if there are other processes, but not enough is known of them;
      the message says what to do.

  Example:
    >>> detect({}) is None
    True
    >>> srun = {'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'node[1-2]',
    ...         'SLURM_NTASKS': '2', 'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'}
    >>> detect(srun)
    {}
    >>> detect(srun | {'SLURM_NTASKS': '1'}) is None
    True
  """
  if 'OMPI_COMM_WORLD_SIZE' in environment:
    if int(environment['OMPI_COMM_WORLD_SIZE']) == 1:
      return None
    if 'OMPI_MCA_orte_hnp_uri' in environment:
      return {}
    return _detect_open_mpi_5(environment)

  # In a shell of `salloc` or `sbatch` some of these are missing, or the step
  # has one task although the job has more: nobody would join.
  started_by_srun = (
    'SLURM_JOB_ID',
    'SLURM_STEP_NODELIST',
    'SLURM_NTASKS',
    'SLURM_PROCID',
    'SLURM_LOCALID',
  )
  if all(name in environment for name in started_by_srun):
    tasks = environment.get('SLURM_STEP_NUM_TASKS', environment['SLURM_NTASKS'])
    return {} if int(tasks) > 1 else None

  if _has_tpu(environment):
    return {}

  if {'KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX'} <= environment.keys():
    if importlib.util.find_spec('kubernetes') is None:
      raise ValueError(
        'this pod is one of an indexed job, and how many there are the API '
        'alone knows: give --coordinator_address, --num_processes and '
        "--process_id, or install 'jax[k8s]' and let the pod read jobs and "
        f'pods; {_ALONE}'
      )
    return {}
  return None


def _detect_open_mpi_5(environment: Mapping[str, str]) -> dict[str, Any]:
  """Returns arguments where `mpirun` does not say where process 0 is."""
  if address := environment.get('JAX_COORDINATOR_ADDRESS'):
    return {
      'coordinator_address': address,
      'num_processes': int(environment['OMPI_COMM_WORLD_SIZE']),
      'process_id': int(environment['OMPI_COMM_WORLD_RANK']),
      'local_device_ids': [int(environment['OMPI_COMM_WORLD_LOCAL_RANK'])],
      'cluster_detection_method': 'deactivate',
    }
  if importlib.util.find_spec('mpi4py') is not None:
    return {'cluster_detection_method': 'mpi4py'}
  raise ValueError(
    'this version of Open MPI does not say where process 0 is: set '
    'JAX_COORDINATOR_ADDRESS=host:port with `mpirun -x`, or install mpi4py; '
    f'{_ALONE}'
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
