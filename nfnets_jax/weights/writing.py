"""Writes files of weights: ours, the authors' form and timm's."""

import contextlib
import json
import os
import pathlib
import pickle
import secrets
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from nfnets_jax import models, paths
from nfnets_jax.weights import archives, metadata, reading, table, timm
from nfnets_jax.weights.metadata import Weights
from nfnets_jax.weights.table import Tree

FORMS = ('haiku', 'released', 'timm')
_ENDINGS = {
  'haiku': ('.npz', '.safetensors'),
  'released': ('.npz',),
  'timm': ('.safetensors',),
}


def write(
  path: str | os.PathLike,
  weights: Weights,
  form: str = 'haiku',
  folded: bool = False,
) -> None:
  """Writes weights to a new file.

  Args:
    path: ending in `.npz` or `.safetensors`.
    weights: checked before anything is written.
    form: 'haiku', with our names; 'released', a pickle of the parameters alone,
      like the authors' files, with other metadata in JSON beside it; or
      'timm', a `.safetensors` for PyTorch.
    folded: whether to standardise and scale the weights once, so that
      convolutions are plain, without gains. For inference elsewhere; such a
      file cannot be read back.

  Raises:
    FileExistsError: if the file exists.
    ValueError: if the suffix does not match the form, the arrays do not match
      the network, or there are not K class names.
  """
  path = check_target(path, form)
  table.check((weights.params, weights.state), weights.name, weights.overrides)
  reading.check_finite(weights)
  metadata.check(weights)
  save = _writer(weights, form, folded, path.suffix)
  facts = metadata.describe(weights)
  with new_file(path) as partial:
    save(partial)
    if form == 'released' and (weights.overrides or len(facts) > 2):
      write_sidecar(path, facts)


def check_target(
  path: str | os.PathLike, form: str = 'haiku', option: str = 'path'
) -> pathlib.Path:
  """Returns the expanded path of a file that `write` can create.

  Raises:
    FileExistsError: if the file exists.
    ValueError: if the suffix does not match the form.
  """
  path = paths.local(path, option)
  if form not in FORMS:
    raise ValueError(f'form {form!r} is none of {", ".join(FORMS)}')
  if path.suffix not in _ENDINGS[form]:
    raise ValueError(
      f'{path}: a file in the form {form!r} must end in '
      f'{" or ".join(_ENDINGS[form])}'
    )
  check_new(path)
  return path


def check_new(path: pathlib.Path) -> None:
  """Raises a FileExistsError if a file or the JSON beside it exists."""
  for file in (path, metadata.sidecar(path)):
    if file.exists():
      raise FileExistsError(f'{file} already exists; choose another name')


def write_sidecar(path: pathlib.Path, facts: Mapping[str, Any]) -> None:
  """Writes the JSON file beside a file without metadata."""
  with new_file(metadata.sidecar(path)) as partial:
    partial.write_text(json.dumps(facts, indent=2) + '\n')


@contextlib.contextmanager
def new_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields an empty temporary file in the same folder, renamed at the end.

  The folder is created if necessary. Nothing is overwritten, and no other
  process sees a partial file.

  Raises:
    FileExistsError: if the file exists at the end.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'.{secrets.token_hex(8)}.part')
  partial.touch(exist_ok=False)
  mode = partial.stat().st_mode
  try:
    yield partial
    partial.chmod(mode)  # safetensors restricts it to the owner
    try:
      _rename(partial, path)
    except FileExistsError:
      raise FileExistsError(
        f'{path} already exists; choose another name'
      ) from None
  finally:
    partial.unlink(missing_ok=True)


def _rename(partial: pathlib.Path, path: pathlib.Path) -> None:
  """Renames a file, and fails if there is one of the new name."""
  try:
    os.link(partial, path)
  except FileExistsError:
    raise
  except OSError:  # not all file systems support links
    path.touch(exist_ok=False)
    partial.replace(path)


def _writer(
  weights: Weights, form: str, folded: bool, suffix: str
) -> Callable[[pathlib.Path], None]:
  """Returns a function that writes the file."""
  params = {
    module: {leaf: np.asarray(x, order='C') for leaf, x in leaves.items()}
    for module, leaves in weights.params.items()
  }
  texts = metadata.encode(metadata.describe(weights))
  if form == 'timm':
    texts['format'] = 'pt'  # as PyTorch's
    if theirs := timm.differences(weights.name, weights.overrides):
      fields = [f'--config.model.{k}={v}' for k, v in theirs.items()]
      raise ValueError(
        f"timm's {weights.name} is another net than that of these weights; "
        f'train with {shlex.join(fields)}'
      )
    if folded:
      tensors = timm.folded(params, weights.state, weights.name)
    else:
      tensors = timm.to_timm(params, weights.state, weights.name)
      exact = timm.originals(params, weights.state, tensors, weights.name)
      texts['exact'] = reading.encode_arrays(exact)
    return lambda path: _save_safetensors(path, tensors, texts)
  if folded:
    params = _fold(params)
    texts['folded'] = 'true'
  if form == 'released':
    if weights.state:
      raise ValueError(
        f"{weights.name} has state, which the authors' form cannot hold"
      )

    def save_pickle(path: pathlib.Path) -> None:
      with path.open('wb') as file:
        pickle.dump(params, file, protocol=4)

    return save_pickle
  arrays = {
    f'{prefix}{module}/{leaf}': np.asarray(x, order='C')
    for prefix, tree in (('', params), (reading.STATE, weights.state))
    for module, leaves in tree.items()
    for leaf, x in leaves.items()
  }
  if suffix == '.safetensors':
    return lambda path: _save_safetensors(path, arrays, texts)
  arrays[archives.METADATA] = np.asarray(json.dumps(texts).encode())

  def save(path: pathlib.Path) -> None:
    with path.open('wb') as file:
      np.savez(file, **arrays)  # type: ignore[arg-type]

  return save


def _fold(params: Tree) -> Tree:
  """Applies `models.fold` on the host."""
  return {
    module: {leaf: np.asarray(x) for leaf, x in leaves.items()}
    for module, leaves in models.fold(params).items()  # type: ignore[arg-type]
  }


def _save_safetensors(
  path: pathlib.Path, arrays: Mapping[str, np.ndarray], texts: dict[str, str]
) -> None:
  # safetensors writes raw memory.
  contiguous = {key: np.asarray(x, order='C') for key, x in arrays.items()}
  safetensors.numpy.save_file(contiguous, path, texts)
