"""Times checkpoints of a replicated state, written by one or all processes.

  python -m experiments.benchmarks.checkpoints --gigabytes=1 --processes=4

`one`: process 0 writes all of it, as in a run. `all`: each process writes a
slice of every array by Orbax's replica-parallel saving, which synchronizes the
processes. Local processes share a disk and cores, so compare the bytes and CPU
seconds of each process; seconds are an upper bound.
"""

import argparse
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np


def _state(gigabytes: float) -> dict[str, np.ndarray]:
  """Returns float32 arrays of 64 MiB of noise, which compresses badly."""
  rng = np.random.default_rng(0)
  count = max(1, round(gigabytes * 1e9 / 2**26))
  return {
    f'array_{i}': rng.standard_normal((2**12, 2**12), np.float32)
    for i in range(count)
  }


def _written() -> int:
  """Returns the bytes that this process has written."""
  lines = pathlib.Path('/proc/self/io').read_text().splitlines()
  return int(dict(line.split(': ') for line in lines)['wchar'])


def _save(
  writers: str, folder: pathlib.Path, gigabytes: float
) -> dict[str, float]:
  """Saves and restores in this process; returns seconds and gigabytes."""
  import jax
  import orbax.checkpoint as ocp

  from nfnets_jax.runtime import checkpoint, parallel, processes

  state = parallel.replicate(_state(gigabytes))
  processes.all_agree(True)  # start together
  cpu, begun, before = time.process_time(), time.monotonic(), _written()
  if writers == 'one':
    saver = checkpoint.Checkpointer(folder, keep=1)
    saver.save(1, state, {})
    blocked = time.monotonic() - begun
    saver.close()
  else:
    manager = ocp.CheckpointManager(folder)
    manager.save(1, args=ocp.args.StandardSave(state))
    blocked = time.monotonic() - begun
    manager.close()
  took, cpu = time.monotonic() - begun, time.process_time() - cpu
  written = _written() - before
  state = jax.tree.map(_abstract, state)
  processes.all_agree(True)
  begun = time.monotonic()
  if writers == 'one':
    checkpoint.Checkpointer(folder, keep=1).restore(state)
  else:
    ocp.CheckpointManager(folder).restore(
      1, args=ocp.args.StandardRestore(state)
    )
  restored = time.monotonic() - begun
  processes.all_agree(True)
  return {
    'blocked_s': blocked,
    'saved_s': took,
    'cpu_s': cpu,
    'written_gb': written / 1e9,
    'restored_s': restored,
  }


def _abstract(x):
  import jax

  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _measure(writers: str, processes: int, gigabytes: float) -> list[dict]:
  """Starts the processes, and returns the measurements of each."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix='checkpoints-'))
  with socket.socket() as listener:
    listener.bind(('localhost', 0))
    address = f'localhost:{listener.getsockname()[1]}'
  words = [sys.executable, '-m', 'experiments.benchmarks.checkpoints']
  words += [f'--gigabytes={gigabytes}', f'--processes={processes}']
  words += [f'--writers={writers}', f'--folder={folder}']
  started = [
    subprocess.Popen(
      [*words, f'--process={i}', f'--address={address}'],
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, 'XLA_FLAGS': ''},
    )
    for i in range(processes)
  ]
  try:
    printed = [process.communicate()[0] for process in started]
  finally:
    for process in started:
      process.kill()
    shutil.rmtree(folder)
  return [json.loads(text.splitlines()[-1]) for text in printed]


def main(argv: Sequence[str] | None = None) -> None:
  """Prints a line for each number of processes and writers."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.benchmarks.checkpoints',
    description='Times checkpoints.',
  )
  parser.add_argument('--gigabytes', type=float, default=1.0)
  parser.add_argument('--processes', type=int, default=4)
  for name in ('writers', 'folder', 'address', 'process'):
    parser.add_argument(f'--{name}', help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.process:
    from nfnets_jax.runtime import processes

    processes.initialize(args.address, args.processes, int(args.process))
    folder = pathlib.Path(args.folder)
    print(json.dumps(_save(args.writers, folder, args.gigabytes)))
    return
  for count, writers in (
    (1, 'one'),
    (args.processes, 'one'),
    (args.processes, 'all'),
  ):
    for index, row in enumerate(_measure(writers, count, args.gigabytes)):
      text = ', '.join(f'{name} {value:.2f}' for name, value in row.items())
      print(f'{writers} of {count}, process {index}: {text}', flush=True)


if __name__ == '__main__':
  main()
