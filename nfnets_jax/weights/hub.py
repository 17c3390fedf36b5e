"""Weights on the Hugging Face hub, `hf-hub:OWNER/NAME[@REVISION]`.

`huggingface_hub` downloads and caches them; its variables `HF_HUB_OFFLINE`,
`HF_HOME`, `HF_ENDPOINT` and `HF_TOKEN` apply. A repository holds
`model.safetensors` and, as those of timm, `config.json`.
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

from nfnets_jax import extras

PREFIX = 'hf-hub:'
_SOURCE = re.compile(r'hf[-_]hub:([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?')
_WEIGHTS, CONFIG = 'model.safetensors', 'config.json'
# The normalisation of pixels, on the scale of timm.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Repository:
  """A repository on the hub.

  Attributes:
    name: owner and name, such as 'timm/dm_nfnet_f0.dm_in1k'.
    revision: a branch, tag or commit; None is the main branch.
  """

  name: str
  revision: str | None = None


def parse(source: str, option: str = 'weights') -> Repository | None:
  """Returns the repository of a source, None if it is not of the hub.

  Raises:
    ValueError: if it begins with `hf-hub:` but does not name a repository.

  Example:
    >>> parse('hf-hub:timm/dm_nfnet_f0.dm_in1k@main')
    Repository(name='timm/dm_nfnet_f0.dm_in1k', revision='main')
  """
  if not source.startswith((PREFIX, 'hf_hub:')):
    return None
  match = _SOURCE.fullmatch(source)
  if match is None:
    raise ValueError(
      f'{option}={source} does not name a repository; write '
      f'{PREFIX}OWNER/NAME or {PREFIX}OWNER/NAME@REVISION'
    )
  return Repository(match[1], match[2])


def folder(repository: Repository) -> pathlib.Path:
  """Returns the folder of a repository in the cache; it need not exist.

  Raises:
    ModuleNotFoundError: if `huggingface_hub` is not installed.
  """
  _need(repository)
  from huggingface_hub import constants, file_download

  name = file_download.repo_folder_name(
    repo_id=repository.name, repo_type='model'
  )
  return pathlib.Path(constants.HF_HUB_CACHE) / name


def fetch(repository: Repository) -> pathlib.Path:
  """Returns the file of weights, downloaded unless it is cached.

  Raises:
    ModuleNotFoundError: if `huggingface_hub` is not installed.
    ValueError: if there is no such repository, revision or file.
    ConnectionError: if the download fails.
  """
  _need(repository)
  import huggingface_hub
  from huggingface_hub import errors

  where = f'{PREFIX}{repository.name}'
  if repository.revision:
    where += f'@{repository.revision}'
  try:
    # First, since the weights may come without it.
    config = _download(repository, CONFIG)
  except errors.RemoteEntryNotFoundError:
    config = None
  except errors.RepositoryNotFoundError as error:
    raise ValueError(
      f'{where}: there is no such repository at {_endpoint()}, or it is '
      'private; check the name, or set HF_TOKEN'
    ) from error
  except errors.RevisionNotFoundError as error:
    raise ValueError(
      f'{where}: the repository has no revision {repository.revision!r}'
    ) from error
  except (errors.LocalEntryNotFoundError, OSError) as error:
    config = None
    # The cache also records that a repository has no such file.
    cached = huggingface_hub.try_to_load_from_cache(
      repository.name, CONFIG, revision=repository.revision
    )
    if cached is not huggingface_hub._CACHED_NO_EXIST:
      raise ConnectionError(
        f'{where} is not in the cache {folder(repository)}, and cannot be '
        f'downloaded from {_endpoint()}; check the network and HF_HUB_OFFLINE, '
        f'or copy {_WEIGHTS} and {CONFIG} here and give the file'
      ) from error
  try:
    # The same commit, should the branch move meanwhile.
    commit = config.parent.name if config else repository.revision
    return _download(Repository(repository.name, commit), _WEIGHTS)
  except errors.RemoteEntryNotFoundError as error:
    raise ValueError(
      f'{where}: the repository has no {_WEIGHTS}; convert its weights with '
      'safetensors.torch.save_file, and give the file'
    ) from error
  except (
    errors.LocalEntryNotFoundError,
    errors.HfHubHTTPError,
    OSError,
  ) as error:
    raise ConnectionError(
      f'{where}: cannot download {_WEIGHTS}: {str(error)[:200]} (with '
      f'huggingface_hub {huggingface_hub.__version__}); try again'
    ) from error


def _need(repository: Repository) -> None:
  try:
    extras.need('hub', 'huggingface_hub')
  except ModuleNotFoundError as error:
    message = f'{PREFIX}{repository.name}: {error}'
    raise ModuleNotFoundError(message, name=error.name) from None


def _download(repository: Repository, name: str) -> pathlib.Path:
  import huggingface_hub

  file = huggingface_hub.hf_hub_download(
    repository.name, name, revision=repository.revision
  )
  return pathlib.Path(file)


def _endpoint() -> str:
  from huggingface_hub import constants

  return constants.ENDPOINT


def read_config(path: pathlib.Path) -> dict[str, Any]:
  """Returns image size, crop and class names in timm's `config.json`.

  Args:
    path: file of weights; `config.json` lies beside it, or there is none.

  Raises:
    ValueError: if the file is corrupt, or the network expects pixels that are
      normalised in another way.
    OSError: if it cannot be read.
  """
  file = path.with_name(CONFIG)
  if not file.is_file():
    return {}
  try:
    config = json.loads(file.read_bytes())
  except ValueError as error:
    raise ValueError(f'{file} is not JSON: {error}') from error
  if not isinstance(config, dict) or 'architecture' not in config:
    return {}
  # Older files of timm have these fields at the top.
  pretrained = config.get('pretrained_cfg') or config
  mean, std = (tuple(pretrained.get(k) or ()) for k in ('mean', 'std'))
  if (mean or MEAN, std or STD) != (MEAN, STD):
    raise ValueError(
      f'{file}: the network expects pixels normalised with mean {mean} and '
      f'standard deviation {std}; here they are {MEAN} and {STD}'
    )
  size = pretrained.get('test_input_size') or pretrained.get('input_size')
  fraction = pretrained.get('test_crop_pct') or pretrained.get('crop_pct')
  names = config.get('label_names') or pretrained.get('label_names')
  facts = {
    'image_size': size[1] if size else None,
    'crop': _crop(fraction, pretrained.get('crop_mode') or 'center'),
    'class_names': names if isinstance(names, list) else None,
  }
  return {key: value for key, value in facts.items() if value is not None}


def _crop(fraction: float | None, mode: str) -> str | None:
  """Returns the name of timm's evaluation crop."""
  names = {'center': 'crop_resize', 'squash': 'resize_crop'}
  if fraction is None or mode not in names:
    return None
  if (fraction, mode) == (1, 'squash'):
    return 'resize'
  return f'{names[mode]}_{float(fraction)}'
