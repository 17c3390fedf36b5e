"""Checkpoints of the whole state of a run, through Orbax."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from nfnets_jax.training import train_step


class Checkpointer:
  """Writes and reads `<directory>/<step>/`.

  A checkpoint holds the train state (parameters, optimiser, moving average,
  step and random key) and the position of the input pipeline. It is written in
  the background to a temporary folder and renamed when complete, so whatever
  bears a step's name is whole. The newest `keep` stay.
  """

  def __init__(self, directory: pathlib.Path, keep: int):
    """Opens `directory`, which is made if it is not there.

    Args:
      directory: of the checkpoints.
      keep: how many to keep, at least 1.

    Raises:
      ValueError: if `keep` is below 1.
    """
    if keep < 1:
      raise ValueError(f'keep_checkpoints must be at least 1, got {keep}')
    self._manager = ocp.CheckpointManager(
      directory.absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True
      ),
      # Named, so that what a checkpoint holds can be asked before it is read.
      item_handlers={
        'state': ocp.StandardCheckpointHandler(),
        'loader': ocp.JsonCheckpointHandler(),
      },
    )

  @property
  def latest_step(self) -> int | None:
    """The step of the newest complete checkpoint, None if there is none."""
    return self._manager.latest_step()

  def save(
    self,
    step: int,
    state: train_step.TrainState,
    loader_state: dict[str, Any],
  ) -> None:
    """Copies the state to the host and writes it in the background.

    Args:
      step: number of updates made.
      state: replicated.
      loader_state: JSON-serialisable position of the input pipeline.
    """
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        loader=ocp.args.JsonSave(loader_state),
      ),
    )

  def restore(
    self, template: train_step.TrainState
  ) -> tuple[train_step.TrainState, dict[str, Any]]:
    """Reads the newest checkpoint.

    Args:
      template: a replicated state with the shapes and dtypes to expect.

    Returns:
      The state, replicated like `template`, and the loader's state.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      ValueError: if it holds another state than `template`; the message lists
        what is missing, left over and of another shape.
    """
    step = self.latest_step
    if step is None:
      raise FileNotFoundError(
        f'there is no checkpoint in {self._manager.directory}; train first'
      )
    self._check_shapes(step, template)
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      template,
    )
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract),
        loader=ocp.args.JsonRestore(),
      ),
    )
    return restored['state'], restored['loader']

  def _check_shapes(self, step: int, template: train_step.TrainState) -> None:
    folder = self._manager.directory / str(step)
    stored = _shapes(self._manager.item_metadata(step)['state'].tree)
    wanted = _shapes(template)
    problems = [
      *(f'missing: {name}' for name in wanted.keys() - stored.keys()),
      *(f'left over: {name}' for name in stored.keys() - wanted.keys()),
      *(
        f'shape: {name} is {stored[name]}, not {wanted[name]}'
        for name in wanted.keys() & stored.keys()
        if stored[name] != wanted[name]
      ),
    ]
    if problems:
      shown = sorted(problems)[:20]
      raise ValueError(
        f'{folder} is not of this model and optimiser:\n  '
        + '\n  '.join(shown)
        + f'\n{len(problems)} differences, {len(shown)} shown'
      )

  def wait(self) -> None:
    """Returns when what was saved is on disk; raises if it could not be."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for what is being written and releases the directory."""
    self._manager.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): tuple(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
