"""The process that holds a lock, as recorded in the lock file."""

import datetime
import json
import os
import pathlib
import socket
import uuid
from typing import Any

# Size of a record; constant, so that one write replaces it.
SIZE = 512

_FIELDS = {'owner', 'host', 'pid', 'since', 'kernel', 'pids', 'started'}

Holder = dict[str, Any]


def this_process() -> Holder:
  """Returns a new record of this process, with a random `owner`."""
  now = datetime.datetime.now().astimezone()
  return {
    'owner': uuid.uuid4().hex,
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'since': now.isoformat(sep=' ', timespec='seconds'),
    'kernel': kernel(),
    'pids': _namespace(),
    'started': _started(os.getpid()),
  }


def encode(holder: Holder, beat: float) -> bytes:
  """Returns the `SIZE` bytes of a lock file; `beat` differs in each."""
  text = json.dumps({**holder, 'beat': beat})
  return f'{text:{SIZE - 1}}\n'.encode()


def decode(data: bytes) -> Holder:
  """Returns the holder, or {} if the data are empty or corrupt.

  They are empty before the first heartbeat, and corrupt after a host crash.
  """
  try:
    holder = json.loads(data)
  except ValueError:
    return {}
  valid = isinstance(holder, dict) and holder.keys() >= _FIELDS
  return holder if valid else {}


def same(one: Holder, other: Holder) -> bool:
  """Returns whether two records are of one holder, at any heartbeat."""
  return bool(one and other) and one['owner'] == other['owner']


def is_dead(holder: Holder) -> bool:
  """Returns whether the holder is known to have ended, on this host.

  A later process with its ID has another start time.
  """
  here = holder['kernel'] == kernel() and holder['pids'] == _namespace()
  return here and holder['started'] != _started(holder['pid'])


def kernel() -> str:
  """Returns an ID of this boot of this host."""
  path = pathlib.Path('/proc/sys/kernel/random/boot_id')
  return path.read_text().strip() if path.exists() else socket.gethostname()


def _namespace() -> str:
  """Returns the namespace of process IDs; containers have their own."""
  path = pathlib.Path('/proc/self/ns/pid')
  return str(path.readlink()) if path.exists() else ''


def _started(pid: int) -> str | None:
  """Returns the start of a process in ticks since boot; None if it is dead."""
  try:
    text = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except (FileNotFoundError, ProcessLookupError):
    if pathlib.Path('/proc/self/stat').exists():
      return None
    return 'unknown'  # no Linux: only silence shows that it is dead
  state, *fields = text.rpartition(')')[2].split()
  return None if state in 'ZX' else fields[18]


def describe(holder: Holder) -> str:
  """Names the holder in a message."""
  if not holder:
    return 'a process that is starting'
  return f'process {holder["pid"]} on {holder["host"]}, since {holder["since"]}'
