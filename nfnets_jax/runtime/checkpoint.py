"""Checkpoints of the full state of a run, through Orbax.

A checkpoint is a folder named after its step. Process 0 writes it
asynchronously under a temporary name and renames it when complete, so a killed
run leaves only complete checkpoints. All processes read.

A bucket has no rename: there a checkpoint is complete once it has the object
`commit_success.txt`, which is written last. Orbax writes to `gs://` itself. It
cannot write to `s3://`, so there a checkpoint is written to local disk and
copied in the background.

Bit flips on disk can go unnoticed by Orbax, so each checkpoint stores a
fingerprint of the state, which `restore` verifies. A corrupt checkpoint is
reported, and the previous one is used.

Orbax takes about a millisecond per array, and most arrays of a net are gains
and biases: small arrays of the same dtype are stored as one.
"""

import concurrent.futures
import contextlib
import itertools
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from nfnets_jax import paths
from nfnets_jax.runtime import (
  files,
  integrity,
  parallel,
  processes,
  progress,
)

# Subfolders of a checkpoint.
_STATE, _LOADER, _FINGERPRINT = 'state', 'loader', 'fingerprint'


class CorruptError(Exception):
  """A checkpoint is corrupt."""


def steps(directory: paths.Path) -> list[int]:
  """Returns the steps of the complete checkpoints in a folder, sorted.

  The folder need not exist, and is empty if a run was killed early.
  """
  # Not `is_dir` first: a folder in a bucket may vanish with its last object.
  try:
    found = [x for x in directory.iterdir() if x.name.isdecimal()]
  except (FileNotFoundError, NotADirectoryError):
    return []
  return sorted(int(x.name) for x in found if files.is_committed(x))


class Checkpointer:
  """Writes and reads `<directory>/<step>/`.

  A checkpoint holds the train state (parameters, optimizer, moving average,
  step and random key) and the position of the input pipeline. The newest `keep`
  are kept. Nothing is written before the first `save`: until then the directory
  may belong to another process.
  """

  def __init__(self, directory: paths.Path, keep: int):
    """Lists the checkpoints; call it in all processes.

    Raises a ValueError if `keep` is below 1 or the directory is not shared.
    """
    if keep < 1:
      raise ValueError(f'keep_checkpoints must be at least 1, got {keep}')
    self._directory = paths.absolute(directory)
    self._keep = keep
    self._corrupt: list[int] = []
    self._step: int | None = None
    self._template: Any = None
    self._failed = False
    self._manager: ocp.CheckpointManager | None = None
    self._stack = contextlib.ExitStack()
    # Where Orbax writes, and what copies from there.
    self._written = self._directory
    self._copying: concurrent.futures.Future | None = None
    self._copier: concurrent.futures.Executor | None = None
    processes.check_shared(self._directory)
    processes.agree(f'what is in {self._directory}', self._steps())

  @property
  def latest_step(self) -> int | None:
    """Newest complete step, or None; excludes steps that failed to restore."""
    return max(self._steps(), default=None)

  def _steps(self) -> list[int]:
    return [x for x in steps(self._directory) if x not in self._corrupt]

  def shape_of(self, name: str) -> tuple[int, ...]:
    """Returns the shape of an array in the newest checkpoint.

    `name` is its dotted path in the state or a suffix of it. Raises a
    FileNotFoundError if there is no checkpoint or no such array.
    """
    if self.latest_step is not None:
      step = self._directory / str(self.latest_step)
      with _local(step) as folder:
        jsons = ocp.JsonCheckpointHandler()
        arrays = jsons.restore(folder / _FINGERPRINT)['arrays']
      for path, (_, shape) in arrays.items():
        if path.endswith(name):
          return tuple(shape)
    raise FileNotFoundError(
      f'there is no checkpoint with {name} in {self._directory}; train first'
    )

  def save(
    self,
    step: int,
    state: Any,
    loader_state: dict[str, Any],
  ) -> None:
    """Copies the replicated state to the host and writes it asynchronously.

    Does nothing if the step exists. `loader_state` is JSON-serialisable.

    Raises:
      OSError: if this checkpoint or the previous one could not be written; the
        message has the reason and the newest intact checkpoint.
    """
    if jax.process_index() != 0:
      return
    self.wait()  # errors from here on are this step's
    arrays = integrity.describe(state)
    packed = integrity.pack(state)
    fingerprint = {
      'arrays': arrays,
      'description': integrity.digest(arrays),
      'content': integrity.fingerprint(arrays, packed, loader_state),
    }
    self._template = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state
    )
    self._step = step
    with self._explain_errors():
      if self._manager is None:
        self._manager = self._open()
      self._manager.save(
        step,
        args=ocp.args.Composite(
          **{
            # Single-process Orbax needs numpy arrays in a multi-process run.
            _STATE: ocp.args.StandardSave(jax.device_get(packed)),
            _LOADER: ocp.args.JsonSave(loader_state),
            _FINGERPRINT: ocp.args.JsonSave(fingerprint),
          }
        ),
      )
      if self._copier is not None:
        self._copying = self._copier.submit(self._copy, step)

  def _copy(self, step: int) -> None:
    """Copies a checkpoint to the bucket once it is written."""
    assert self._manager is not None
    self._manager.wait_until_finished()
    target = self._directory / str(step)
    if not files.is_committed(target):
      files.upload(self._written / str(step), target)
    for old in self._steps()[: -self._keep]:
      files.remove(self._directory / str(old))

  def _open(self) -> ocp.CheckpointManager:
    """Renames corrupt checkpoints and removes partial ones."""
    self._directory.mkdir(parents=True, exist_ok=True)
    if _is_copied(self._directory):
      name = tempfile.TemporaryDirectory(prefix='nfnets_jax-')
      self._written = epath.Path(self._stack.enter_context(name))
      self._copier = concurrent.futures.ThreadPoolExecutor(1)
      self._stack.callback(self._copier.shutdown)
    for step in self._corrupt:
      folder = self._directory / str(step)
      if folder.is_dir():
        moved = _free_name(f'{folder}.corrupt')
        files.move(folder, moved)
        progress.say(f'renamed the corrupt checkpoint {folder} to {moved.name}')
    self._corrupt = []
    self._remove_partial()
    # A single process for Orbax, so that it waits for no other.
    alone = ocp.options.MultiprocessingOptions(
      primary_host=0, active_processes={0}, barrier_sync_key_prefix='process_0'
    )
    return ocp.CheckpointManager(
      self._written,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=1 if self._copier else self._keep,
        create=False,
        enable_async_checkpointing=True,
        lightweight_initialize=True,  # does not read old checkpoints
        multiprocessing_options=alone,
      ),
      item_handlers={
        _STATE: ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        _LOADER: ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        _FINGERPRINT: ocp.JsonCheckpointHandler(multiprocessing_options=alone),
      },
    )

  def _remove_partial(self) -> None:
    if paths.in_bucket(self._directory):
      for path in self._directory.iterdir() if self._directory.is_dir() else ():
        if path.name.isdecimal() and not files.is_committed(path):
          files.remove(path)
      return
    # After an error, Orbax's other threads may still be adding files.
    for _ in range(100):
      folders = list(self._directory.glob('*.orbax-checkpoint-tmp*'))
      if not folders:
        return
      for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
      time.sleep(0.01)

  @contextlib.contextmanager
  def _explain_errors(self) -> Iterator[None]:
    """Adds the newest intact checkpoint to a write error."""
    try:
      yield
    except Exception as error:
      self._failed = True
      with contextlib.suppress(Exception):  # the next run tries again
        self._remove_partial()
      needed = sum(
        math.prod(x.shape) * x.dtype.itemsize
        for x in jax.tree.leaves(self._template)
      )
      free = ''
      if not paths.in_bucket(self._written):
        size = shutil.disk_usage(self._written).free
        free = f', and {size / 1e6:,.1f} MB are free'
      raise OSError(
        f'cannot write the checkpoint of step {self._step} into '
        f'{self._directory}: {error}\nIt takes up to {needed / 1e6:,.1f} MB'
        f'{free}. {self._describe_earlier()}'
      ) from error

  def _describe_earlier(self) -> str:
    """Names the newest intact checkpoint, for a message."""
    try:
      for step in reversed(self._steps()):
        with contextlib.suppress(CorruptError):
          self._read(step, self._template)
          return (
            f'The checkpoint of step {step} is intact; the run goes on from '
            'there when it is started again'
          )
    except Exception as error:  # must not hide the write error
      return f'Earlier checkpoints cannot be read now: {_brief(error)}'
    return 'There is no earlier checkpoint'

  def check(self) -> None:
    """Raises like `save` if the last write failed; does not block."""
    if self._manager is None:
      return
    if self._copying is not None:
      busy = not self._copying.done()
    else:
      busy = self._manager.is_saving_in_progress()
    if not busy:
      self.wait()

  def wait(self) -> None:
    """Waits until the last checkpoint is on disk; raises like `save`."""
    if self._manager is not None:
      with self._explain_errors():
        if self._copying is not None:
          self._copying.result()
        self._manager.wait_until_finished()
        # Orbax only logs some errors of its background threads.
        if self._step is not None and self._step not in self._steps():
          raise FileNotFoundError('its folder is not there')
      self._step = None

  def close(self) -> None:
    """Waits for pending writes and closes Orbax; raises like `save`."""
    try:
      if not self._failed:  # else it was already reported
        self.wait()
    finally:
      manager, self._manager = self._manager, None
      if manager is not None:
        with contextlib.suppress(Exception):
          manager.close()
        if self._failed:
          with contextlib.suppress(Exception):  # as above
            self._remove_partial()
      self._stack.close()

  def restore(self, template: Any) -> tuple[Any, dict[str, Any]]:
    """Reads the newest intact checkpoint; call it in all processes.

    Corrupt checkpoints are reported and left in place, and renamed to
    `<step>.corrupt` if the run reaches their step again.

    Returns:
      The state, replicated over all devices, and the loader state.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      ValueError: if the arrays differ from `template`, with a list; if all
        checkpoints are corrupt, or the processes see different ones.
    """
    if not self._steps():
      raise FileNotFoundError(
        f'there is no checkpoint in {self._directory}; train first'
      )
    reports = []
    for step in reversed(self._steps()):
      folder = self._directory / str(step)
      try:
        state, loader_state = self._read(step, template)
        problem = None
      except CorruptError as error:
        problem = str(error)
      if processes.all_agree(problem is None):
        return parallel.replicate(state), loader_state
      if not processes.all_agree(folder.is_dir()):
        continue  # removed meanwhile by the run that writes here
      self._corrupt.append(step)
      reports.append(f'{folder}: {problem or "another process cannot read it"}')
      progress.say(f'skipped a corrupt checkpoint: {reports[-1]}')
    raise ValueError(
      'all checkpoints are corrupt; move them away to start over:\n  '
      + '\n  '.join(reports)
    )

  def _read(self, step: int, template: Any) -> tuple[Any, dict[str, Any]]:
    """Reads a checkpoint into numpy arrays, in this process only."""
    with _local(self._directory / str(step)) as folder:
      return self._read_from(folder, template)

  def _read_from(
    self, folder: epath.Path, template: Any
  ) -> tuple[Any, dict[str, Any]]:
    states, jsons = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
    try:
      fingerprint = jsons.restore(folder / _FINGERPRINT)
      loader_state = jsons.restore(folder / _LOADER)
      description = integrity.describe(states.metadata(folder / _STATE).tree)
    except MemoryError:
      raise
    except Exception as error:
      folder.exists()  # raises if the bucket cannot be reached
      raise CorruptError(_brief(error)) from error
    stored, arrays = fingerprint.get('arrays'), integrity.describe(template)
    if fingerprint.get('description') != integrity.digest(stored):
      raise CorruptError('its description differs from what was written')
    _check_arrays(folder, stored, arrays)
    empty = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), template)
    packed = integrity.pack(empty)
    if description != integrity.describe(packed):
      raise CorruptError('its metadata differ from what was written')
    try:
      packed = states.restore(
        folder / _STATE, args=ocp.args.StandardRestore(packed)
      )
    except MemoryError:
      raise
    except Exception as error:
      folder.exists()  # raises if the bucket cannot be reached
      raise CorruptError(_brief(error)) from error
    content = integrity.fingerprint(arrays, packed, loader_state)
    if fingerprint.get('content') != content:
      raise CorruptError('its content differs from what was written')
    return integrity.unpack(packed, empty), loader_state


def _check_arrays(
  folder: paths.Path, stored: dict[str, list], wanted: dict[str, list]
) -> None:
  """Raises a ValueError that lists the differences, if any."""

  def text(name: str, arrays: dict[str, list]) -> str:
    dtype, shape = arrays[name]
    return f'{dtype} {tuple(shape)}'

  problems = [
    *(f'missing: {name}' for name in wanted.keys() - stored.keys()),
    *(f'unexpected: {name}' for name in stored.keys() - wanted.keys()),
    *(
      f'shape: {name} is {text(name, stored)}, not {text(name, wanted)}'
      for name in wanted.keys() & stored.keys()
      if stored[name] != wanted[name]
    ),
  ]
  if problems:
    shown = sorted(problems)[:20]
    raise ValueError(
      f'{folder} is of another model or optimizer:\n  '
      + '\n  '.join(shown)
      + f'\n{len(problems)} differences, {len(shown)} shown'
    )


def _is_copied(folder: paths.Path) -> bool:
  """Returns whether Orbax cannot reach a folder."""
  return os.fspath(folder).startswith('s3://')


@contextlib.contextmanager
def _local(folder: epath.Path) -> Iterator[epath.Path]:
  """Yields a folder that Orbax can read, perhaps a copy."""
  if _is_copied(folder):
    with files.downloaded(folder) as copy:
      yield copy
  else:
    yield folder


def _free_name(name: str) -> epath.Path:
  """Returns the name, with a numeric suffix if it exists."""
  candidates = (f'{name}.{number}' for number in itertools.count(2))
  names = map(epath.Path, itertools.chain([name], candidates))
  return next(path for path in names if not path.exists())


def _brief(error: Exception) -> str:
  return (str(error) or type(error).__name__).splitlines()[0][:300]
