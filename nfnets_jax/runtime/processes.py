"""Runs over several processes, one per host or device.

Processes connect through the coordinator, process 0. Each reads its part of
every batch; only process 0 writes shared files. If a process fails, it exits at
once, the others within the heartbeat timeout. A restart resumes the run.
"""

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from nfnets_jax import devices as platforms
from nfnets_jax import paths
from nfnets_jax.runtime import interrupt, launchers

# Seconds to wait for the other processes at the start.
START_TIMEOUT = 300
# Seconds without a heartbeat until a process counts as dead. A separate thread
# sends heartbeats, also while jax compiles.
HEARTBEAT_TIMEOUT = 60

# Seconds to wait for a new file to appear in all processes; NFS is slow.
_SHARED_TIMEOUT = 30.0

# jax treats empty variables with these prefixes as set.
_PREFIXES = ('JAX_', 'SLURM_', 'OMPI_', 'TPU_', 'MEGASCALE_', 'KUBERNETES_')


def initialize(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  start_timeout: int = START_TIMEOUT,
  heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> None:
  """Connects to the other processes of the run, if any.

  Without the first three arguments, the environment decides; see
  `launchers.detect`. Call it once, before any use of jax devices, which it
  initializes.

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
    arguments = launchers.detect(os.environ)
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
    launchers.number(os.environ, 'JAX_COORDINATOR_PORT')
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
        f'jax finds none: {launchers.ALONE}'
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
  launchers.check_address(
    'coordinator_address', str(flags['coordinator_address'])
  )
  if not 0 <= flags['process_id'] < flags['num_processes']:
    raise ValueError(
      f'process_id {process_id} is not one of {num_processes} processes: give '
      'a number from 0'
    )
  # Do not mix flags with the environment.
  return {**flags, 'cluster_detection_method': 'deactivate'}


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
  digests = _gather(np.frombuffer(digest, np.uint8))
  if others := np.flatnonzero((digests != digests[0]).any(axis=1)).tolist():
    shown = text if len(text) <= 200 else f'{text[:200]}...'
    raise ValueError(
      f'{what} is not the same in all processes: {others} differ from process '
      f'0; in process {jax.process_index()} it is {shown}'
    )


def of_first(number: int) -> int:
  """Returns the number of process 0, below 2^31; all must call this."""
  if jax.process_count() == 1:
    return number
  return int(_gather(np.int32(number))[0])


def all_agree(yes: bool) -> bool:
  """Returns the logical and over all processes, which must all call this."""
  if jax.process_count() == 1:
    return yes
  return bool(_gather(np.uint8(yes)).all())


def _gather(value: np.ndarray | np.generic) -> np.ndarray:
  """Returns the values of all processes, stacked."""
  devices = np.array(jax.devices()).reshape(jax.process_count(), -1)
  mesh = jax.sharding.Mesh(devices, ('process', 'device'))
  spec = jax.sharding.PartitionSpec
  values = jax.make_array_from_process_local_data(
    jax.sharding.NamedSharding(mesh, spec('process')),
    np.asarray(value)[np.newaxis],
  )
  replicated = jax.sharding.NamedSharding(mesh, spec())
  gathered = jax.jit(_identity, out_shardings=replicated)(values)
  # On all local devices. process_allgather waits for the first only: a process
  # that ended next would leave the others' collectives without their partners.
  return np.asarray(jax.block_until_ready(gathered))


def _identity(x: jax.Array) -> jax.Array:
  return x


def check_shared(folder: paths.Path) -> None:
  """Checks that all processes, which must all call this, share a folder.

  If there are several, process 0 creates the folder and, for a moment, a file
  in it. Call it under the run's lock: another run would remove the file. A
  ValueError is raised in every process if any sees another folder.
  """
  if jax.process_count() == 1:
    return
  number = np.frombuffer(os.urandom(4), np.uint32)[0]
  mark = f'.shared-{_gather(number)[0]:08x}'
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob('.shared-*'):
      stale.unlink(missing_ok=True)
    (folder / mark).touch()
  all_agree(True)  # wait for process 0 to write
  deadline = time.monotonic() + _SHARED_TIMEOUT
  # Listing refreshes the cached view of the whole folder.
  while not (seen := folder.is_dir() and folder / mark in folder.iterdir()):
    if time.monotonic() > deadline:
      break
    time.sleep(0.2)
  shared = _gather(np.uint8(seen))
  if jax.process_index() == 0:
    (folder / mark).unlink()
  if not shared.all():
    raise ValueError(
      f'{folder} is not one folder for all processes: what process 0 writes '
      f'there, {np.flatnonzero(shared == 0).tolist()} do not see. Give a '
      '--workdir on a file system that all hosts share'
    )
