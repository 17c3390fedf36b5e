"""The files of a checkpoint, on disk or in a bucket.

Bit flips on disk can go unnoticed by Orbax, so a checkpoint has a fingerprint
of its state. Orbax cannot read `s3://`, so there it is copied first.
"""

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from nfnets_jax import paths
from nfnets_jax.runtime import files, integrity

# Subfolders of a checkpoint.
STATE, LOADER, FINGERPRINT = 'state', 'loader', 'fingerprint'


class CorruptError(Exception):
  """A checkpoint is corrupt."""


def read(folder: paths.Path, template: Any) -> tuple[Any, dict[str, Any]]:
  """Reads the state, as numpy arrays, and the loader state.

  Raises:
    CorruptError: if the checkpoint is corrupt.
    ValueError: if its arrays differ from `template`; lists the differences.
  """
  with _local(folder) as copy:
    return _read(copy, template)


def array_shapes(folder: paths.Path) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the arrays by their dotted paths in the state."""
  with _local(folder) as copy:
    arrays = ocp.JsonCheckpointHandler().restore(copy / FINGERPRINT)['arrays']
  return {name: tuple(shape) for name, (_, shape) in arrays.items()}


def remove_partial(directory: paths.Path) -> None:
  """Removes the checkpoints that a killed run was writing."""
  if paths.in_bucket(directory):
    for path in directory.iterdir() if directory.is_dir() else ():
      if path.name.isdecimal() and not files.is_committed(path):
        files.remove(path)
    return
  # After an error, Orbax's other threads may still be adding files.
  for _ in range(100):
    folders = list(directory.glob('*.orbax-checkpoint-tmp*'))
    if not folders:
      return
    for folder in folders:
      shutil.rmtree(folder, ignore_errors=True)
    time.sleep(0.01)


def set_aside(folder: paths.Path) -> epath.Path:
  """Renames a corrupt checkpoint to the first free `<step>.corrupt[.n]`."""
  name = f'{folder}.corrupt'
  numbered = (f'{name}.{number}' for number in itertools.count(2))
  candidates = map(epath.Path, itertools.chain([name], numbered))
  moved = next(path for path in candidates if not path.exists())
  files.move(folder, moved)
  return moved


def brief(error: Exception) -> str:
  """Returns the first line of an error, or its type."""
  return (str(error) or type(error).__name__).splitlines()[0][:300]


def is_copied(folder: paths.Path) -> bool:
  """Returns whether Orbax cannot reach a folder."""
  return os.fspath(folder).startswith('s3://')


@contextlib.contextmanager
def _local(folder: paths.Path) -> Iterator[epath.Path]:
  """Yields a folder that Orbax can read, perhaps a copy."""
  if is_copied(folder):
    with files.downloaded(folder) as copy:
      yield copy
  else:
    yield epath.Path(folder)


def _read(folder: epath.Path, template: Any) -> tuple[Any, dict[str, Any]]:
  states, jsons = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
  with _reports_corruption(folder):
    fingerprint = jsons.restore(folder / FINGERPRINT)
    loader_state = jsons.restore(folder / LOADER)
    description = integrity.describe(states.metadata(folder / STATE).tree)
  stored, arrays = fingerprint.get('arrays'), integrity.describe(template)
  if fingerprint.get('description') != integrity.digest(stored):
    raise CorruptError('its description differs from what was written')
  _check_arrays(folder, stored, arrays)
  empty = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), template)
  packed = integrity.pack(empty)
  if description != integrity.describe(packed):
    raise CorruptError('its metadata differ from what was written')
  with _reports_corruption(folder):
    restore = ocp.args.StandardRestore(packed)
    packed = states.restore(folder / STATE, args=restore)
  content = integrity.fingerprint(arrays, packed, loader_state)
  if fingerprint.get('content') != content:
    raise CorruptError('its content differs from what was written')
  return integrity.unpack(packed, empty), loader_state


@contextlib.contextmanager
def _reports_corruption(folder: epath.Path) -> Iterator[None]:
  """Raises a CorruptError for whatever Orbax raises."""
  try:
    yield
  except MemoryError:
    raise
  except Exception as error:
    folder.exists()  # raises if the bucket cannot be reached
    raise CorruptError(brief(error)) from error


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
