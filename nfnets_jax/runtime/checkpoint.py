"""Checkpoints of the full state of a run, through Orbax.

A checkpoint is a folder named after its step. Process 0 writes it
asynchronously under a temporary name and renames it when complete, so a killed
run leaves only complete checkpoints. All processes read.

A bucket has no rename: there a checkpoint is complete once it has the object
`commit_success.txt`, which is written last. Orbax writes to `gs://` itself. It
cannot write to `s3://`, so there a checkpoint is written to local disk and
copied in the background.

Each checkpoint stores a fingerprint of the state, which `restore` verifies. A
corrupt checkpoint is reported, and the previous one is used.

Orbax takes about a millisecond per array, and most arrays of a net are gains
and biases: small arrays of the same dtype are stored as one.
"""

import contextlib
import math
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from nfnets_jax import paths
from nfnets_jax.runtime import checkpoint_files as stored
from nfnets_jax.runtime import (
  files,
  integrity,
  parallel,
  processes,
  progress,
  uploads,
)


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
    """Raises a ValueError if `keep` is below 1; reads and writes nothing."""
    if keep < 1:
      raise ValueError(f'keep_checkpoints must be at least 1, got {keep}')
    self._directory = paths.absolute(directory)
    self._keep = keep
    self._corrupt: list[int] = []
    self._step: int | None = None
    self._template: Any = None
    self._failed = False
    self._manager: ocp.CheckpointManager | None = None
    self._written = self._directory  # where Orbax writes
    self._uploader: uploads.Uploader | None = None

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
      shapes = stored.array_shapes(self._directory / str(self.latest_step))
      for path, shape in shapes.items():
        if path.endswith(name):
          return shape
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
            stored.STATE: ocp.args.StandardSave(jax.device_get(packed)),
            stored.LOADER: ocp.args.JsonSave(loader_state),
            stored.FINGERPRINT: ocp.args.JsonSave(fingerprint),
          }
        ),
      )
      if self._uploader is not None:
        self._uploader.start(step, self._manager.wait_until_finished)

  def _open(self) -> ocp.CheckpointManager:
    """Renames corrupt checkpoints and removes partial ones."""
    self._directory.mkdir(parents=True, exist_ok=True)
    for step in self._corrupt:
      folder = self._directory / str(step)
      if folder.is_dir():
        moved = stored.set_aside(folder)
        progress.say(f'renamed the corrupt checkpoint {folder} to {moved.name}')
    self._corrupt = []
    stored.remove_partial(self._directory)
    if stored.is_copied(self._directory):
      self._uploader = uploads.Uploader(
        self._directory, self._keep, self._steps
      )
      self._written = self._uploader.local
    # A single process for Orbax, so that it waits for no other.
    alone = ocp.options.MultiprocessingOptions(
      primary_host=0, active_processes={0}, barrier_sync_key_prefix='process_0'
    )
    return ocp.CheckpointManager(
      self._written,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=1 if self._uploader else self._keep,
        create=False,
        enable_async_checkpointing=True,
        lightweight_initialize=True,  # does not read old checkpoints
        multiprocessing_options=alone,
      ),
      item_handlers={
        stored.STATE: ocp.StandardCheckpointHandler(
          multiprocessing_options=alone
        ),
        stored.LOADER: ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        stored.FINGERPRINT: ocp.JsonCheckpointHandler(
          multiprocessing_options=alone
        ),
      },
    )

  @contextlib.contextmanager
  def _explain_errors(self) -> Iterator[None]:
    """Adds the newest intact checkpoint to a write error."""
    try:
      yield
    except Exception as error:
      self._failed = True
      with contextlib.suppress(Exception):  # the next run tries again
        stored.remove_partial(self._directory)
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
        with contextlib.suppress(stored.CorruptError):
          stored.read(self._directory / str(step), self._template)
          return (
            f'The checkpoint of step {step} is intact; the run goes on from '
            'there when it is started again'
          )
    except Exception as error:  # must not hide the write error
      return f'Earlier checkpoints cannot be read now: {stored.brief(error)}'
    return 'There is no earlier checkpoint'

  def check(self) -> None:
    """Raises like `save` if the last write failed; does not block."""
    if self._manager is None:
      return
    busy = (
      self._uploader.is_busy()
      if self._uploader
      else self._manager.is_saving_in_progress()
    )
    if not busy:
      self.wait()

  def wait(self) -> None:
    """Waits until the last checkpoint is on disk; raises like `save`."""
    if self._manager is not None:
      with self._explain_errors():
        if self._uploader is not None:
          self._uploader.wait()
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
            stored.remove_partial(self._directory)
      if self._uploader is not None:
        self._uploader.close()

  def restore(self, template: Any) -> tuple[Any, dict[str, Any]]:
    """Reads the newest intact checkpoint; call it in all processes.

    Corrupt checkpoints are reported and left in place, and renamed to
    `<step>.corrupt` if the run reaches their step again.

    Returns:
      The state, replicated over all devices, and the loader state.

    Raises:
      FileNotFoundError: if there is no checkpoint that all processes can read.
      ValueError: if the arrays differ from `template`, with a list; or if all
        checkpoints are corrupt.
    """

    def newest() -> int:  # as process 0 sees it: the run may write meanwhile
      return processes.of_first(max({*self._steps()} - tried, default=-1))

    reports, tried = [], set[int]()
    while (step := newest()) >= 0:
      tried.add(step)
      folder = self._directory / str(step)
      try:
        state, loader_state = stored.read(folder, template)
        problem = None
      except (stored.CorruptError, FileNotFoundError) as error:
        problem = str(error)
      if processes.all_agree(problem is None):
        return parallel.replicate(state), loader_state
      if not processes.all_agree(folder.is_dir()):
        # Removed meanwhile by the run that writes here, or not seen yet.
        progress.say(f'skipped {folder}, which not all processes see')
        continue
      self._corrupt.append(step)
      reports.append(f'{folder}: {problem or "another process cannot read it"}')
      progress.say(f'skipped a corrupt checkpoint: {reports[-1]}')
    if not reports:
      raise FileNotFoundError(
        f'there is no checkpoint in {self._directory} that can be read; train '
        'first'
      )
    raise ValueError(
      'all checkpoints are corrupt; move them away to start over:\n  '
      + '\n  '.join(reports)
    )
