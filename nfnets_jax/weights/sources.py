"""Locates weights: a path, 'released' or 'hf-hub:OWNER/NAME'."""

import atexit
import difflib
import functools
import os
import pathlib
import re
import tempfile

from etils import epath

from nfnets_jax import paths
from nfnets_jax.models import variants
from nfnets_jax.weights import download, hub, recognize, timm

_ARE = (
  f"weights are a {recognize.FORMATS} file, the folder of a run, 'released' or "
  f"'{hub.PREFIX}OWNER/NAME'"
)

# timm's tag of the weights, part of a repository's name.
_TAGS = {
  **{f'dm_nfnet_f{n}': 'dm_in1k' for n in range(7)},
  'nf_regnet_b1': 'ra2_in1k',
  'nf_resnet50': 'ra2_in1k',
  'tf_efficientnet_b0': 'in1k',
}


def locate(
  source: str | os.PathLike, name: str | None = None, option: str = 'weights'
) -> paths.Path:
  """Returns the path of weights, after checks that read as little as possible.

  Args:
    source: a file or the folder of a run, both perhaps in a bucket,
      'released', or a repository of the Hugging Face hub,
      'hf-hub:OWNER/NAME[@REVISION]'.
    name: the variant, required for 'released'.
    option: the flag, field or argument that holds `source`, for messages.

  Returns:
    The file or folder; of a file in a bucket, a temporary copy; for weights to
    download, the path in the cache, which need not exist.

  Raises:
    ValueError: if the file is not weights, or none were released for `name`.
    FileNotFoundError: if the path does not exist, or the folder is not a run.
    ModuleNotFoundError: if the hub needs a package that is not installed.

  Example:
    >>> locate('released', 'nfnet_f0').name
    'nfnet_f0.npz'
  """
  if os.fspath(source) == 'released':
    if name is None:
      raise ValueError(f'{option}: released weights need the name of a model')
    return download.cache_path(name)
  repository = hub.parse(os.fspath(source), option)
  if repository is not None:
    return hub.folder(repository)
  if paths.in_bucket(source):
    return _from_bucket(os.fspath(source), option)
  path = paths.local(source, option)
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


def fetch(
  source: str | os.PathLike, name: str | None = None, option: str = 'weights'
) -> paths.Path:
  """Calls `locate`, and downloads the weights if necessary.

  Raises:
    ValueError: as in `locate`, or if the server has no such weights.
    ConnectionError: if a download fails.
    OSError: as in `locate`.
  """
  path = locate(source, name, option)
  if os.fspath(source) == 'released':
    return download.fetch(name or '')
  repository = hub.parse(os.fspath(source), option)
  return path if repository is None else hub.fetch(repository)


def _from_bucket(source: str, option: str) -> paths.Path:
  """Returns the folder of a run, or a temporary copy of a file."""
  path = paths.expand(source, option)
  if not path.exists():
    raise FileNotFoundError(f'{option}: there is no {path}; {_ARE}')
  if path.is_dir():
    recognize.check_folder(path, option)
    return path
  copy = _copy(path)
  recognize.check_file(copy)
  return copy


@functools.cache
def _copy(path: epath.Path) -> pathlib.Path:
  """Copies a file and the JSON beside it to local disk, once a process."""
  folder = tempfile.TemporaryDirectory(prefix='nfnets_jax-')
  atexit.register(folder.cleanup)
  for name in (path.name, f'{path.name}.json', hub.CONFIG):
    file = path.with_name(name)
    if file.exists():
      file.copy(epath.Path(folder.name) / file.name)
  return pathlib.Path(folder.name) / path.name


def _hint(source: str) -> str:
  """Returns advice about a name that is not a file."""
  bare = source.removeprefix('timm/')
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
    return f"that is the name of a model; {_ARE} (the authors', of {released})"
  ours = timm.counterpart(word)
  if ours is not None:
    tag = bare if '.' in bare else f'{bare}.{_TAGS.get(word, "")}'
    guess = '' if tag[-1] == '.' else f'; did you mean {hub.PREFIX}timm/{tag}?'
    return f"that is timm's name of {ours}{guess or f'; {_ARE}'}"
  if difflib.get_close_matches(source.lower(), ['released', 'pretrained']):
    return "did you mean 'released', the authors' weights?"
  return _ARE
