"""Locates weights by a path or 'released'."""

import difflib
import os
import pathlib
import re

from nfnets_jax import paths
from nfnets_jax.models import variants
from nfnets_jax.weights import download, recognize, timm

_ARE = (
  f"weights are a {recognize.FORMATS} file, the folder of a run, or 'released'"
)


def locate(
  source: str | os.PathLike, name: str | None = None, option: str = 'weights'
) -> pathlib.Path:
  """Returns the path of weights, after checks that read as little as possible.

  Args:
    source: a file, the folder of a run, or 'released'.
    name: the variant, required for 'released'.
    option: the flag, field or argument that holds `source`, for messages.

  Returns:
    The file or folder; for 'released', the path of `fetch`, which need not
    exist.

  Raises:
    ValueError: if the file is not weights, or none were released for `name`.
    FileNotFoundError: if the path does not exist, or the folder is not a run.
    FileNotFoundError: if there is no such file, or the folder holds no run.

  Example:
    >>> locate('released', 'nfnet_f0').name
    'nfnet_f0.npz'
  """
  if os.fspath(source) == 'released':
    if name is None:
      raise ValueError(f'{option}: released weights need the name of a model')
    return download.place(name)
  path = paths.expand(source, option)
  if not path.exists():
    try:
      paths.existing(path, option)
    except FileNotFoundError as error:
      hint = _hint(os.fspath(source))
      raise FileNotFoundError(f'{error}; {hint}') from None
  if path.is_dir():
    recognize.check_folder(path, option)
  else:
    recognize.check_file(path)
  return path


def _hint(source: str) -> str:
  """Returns advice about a name that is not a file."""
  bare = re.sub(r'^(hf[-_]hub:)?(timm/)?', '', source)
  word = bare.partition('.')[0]
  if '/' in bare or bare.endswith(('.safetensors', '.npz')):
    word = ''
  if re.fullmatch(r'F[0-6](_haiku)?(\.npz)?', bare):
    return (
      f"the authors' file of nfnet_f{bare[1]} is called 'released', with that "
      'model'
    )
  if word in variants.VARIANTS and bare == word:
    released = ', '.join(download.ADDRESSES)
    return f"that is the name of a model; {_ARE}, the authors' of {released}"
  ours = timm.counterpart(word)
  if ours is not None:
    return (
      f"that is timm's name of {ours}, and weights are a file: write it where "
      'timm is, with safetensors.torch.save_file(timm.create_model('
      f"'{bare}', pretrained=True).state_dict(), '{word}.safetensors')"
    )
  if difflib.get_close_matches(source.lower(), ['released', 'pretrained']):
    return "did you mean 'released', the authors' weights?"
  return _ARE
