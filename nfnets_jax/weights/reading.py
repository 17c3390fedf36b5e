"""Reads files of weights, with thorough checks.

Three formats, recognized by their first bytes:

* the authors' files, `F0_haiku.npz` to `F6_haiku.npz`: pickles, which are read
  as data and never run (see `pickles`);
* real `.npz` archives of numpy arrays, named `module/parameter`;
* `.safetensors`, with such names or those of timm.

Errors say what any other file is (see `recognize`). Headers come first: no
array is read before all shapes are verified. Arrays are float16, bfloat16 or
float32 in files, and float32 once loaded.
"""

import base64
import contextlib
import errno
import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors

from nfnets_jax import models
from nfnets_jax.models import variants
from nfnets_jax.weights import (
  archives,
  hub,
  metadata,
  sources,
  table,
  timm,
)
from nfnets_jax.weights.metadata import Weights
from nfnets_jax.weights.table import AnyTree, Tree

# The prefix of state in our own files.
STATE = 'state:'

# What the libraries raise for corrupt files.
_CORRUPT = (
  AttributeError,  # JSON that is not an object
  ValueError,
  EOFError,
  KeyError,
  MemoryError,
  NotImplementedError,
  RecursionError,
  RuntimeError,
  SyntaxError,
  TypeError,
  zipfile.BadZipFile,
  zlib.error,
  safetensors.SafetensorError,
)


def load(
  path: str | os.PathLike, name: str | None = None, **overrides: Any
) -> Tree:
  """Returns the parameters in a file, for `net.apply`.

  Takes the arguments of `read`.

  Returns:
    `{module: {parameter: float32 array}}`.

  Raises:
    ValueError: as in `read`; or if the network has state or needs overrides,
      which only `read` returns.
    OSError: if the file cannot be read.

  Example:
    >>> import haiku as hk, jax, tempfile
    >>> from nfnets_jax import models, weights
    >>> def forward(x):
    ...   return models.create('nfnet_tiny', 10)(x, is_training=False)
    >>> net = hk.transform(forward)
    >>> params = jax.jit(net.init)(jax.random.key(0), np.zeros((1, 32, 32, 3)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = f'{folder}/tiny.npz'
    ...   weights.write(path, weights.Weights('nfnet_tiny', params))
    ...   loaded = load(path, 'nfnet_tiny')
    >>> loaded['NFNet/~/linear']['b'].shape
    (10,)
  """
  weights = read(path, name, **overrides)
  if weights.state:
    raise ValueError(
      f'{weights.name} has state besides parameters; use weights.read({path!r})'
    )
  if weights.overrides != overrides:
    raise ValueError(
      f'{weights.name} in {path} must be created with {weights.overrides}; use '
      f'weights.read({str(path)!r}), which returns them too'
    )
  return weights.params


def read(
  path: str | os.PathLike, name: str | None = None, **overrides: Any
) -> Weights:
  """Reads weights with their metadata.

  Metadata come from the file, the JSON file beside it (`net.npz.json`), or the
  `config.json` of the Hugging Face hub beside it.

  Args:
    path: a released `.npz`, a real one, or a `.safetensors` of ours or timm's.
    name: the expected variant; None infers it.
    **overrides: of the variant, as in `models.create`.

  Returns:
    The weights, float32 and finite.

  Raises:
    ValueError: if the file is corrupt or not weights, or the arrays do not
      match the network; the message lists those that are missing, surplus, of
      the wrong shape or dtype, or not finite.
    OSError: if the file cannot be read.
  """
  if name is not None:
    variants.get(name)
  found = sources.locate(path, name, 'path')
  if found.is_dir():
    raise IsADirectoryError(
      f'{found} is the folder of a run; training.init_from.load_average reads '
      'it'
    )
  try:
    with contextlib.ExitStack() as stack:
      file = stack.enter_context(found.open('rb'))
      # numpy parses array headers as Python, which may emit warnings.
      stack.enter_context(warnings.catch_warnings())
      warnings.simplefilter('ignore')
      texts, arrays = stack.enter_context(archives.opened(found, file))
      weights = _read(found, texts, arrays, name, overrides)
    check_finite(weights)
  except _CORRUPT as error:
    raise ValueError(f'{found}: {error}') from error
  except OSError as error:
    if error.errno != errno.EINVAL:
      raise
    raise ValueError(f'{found}: an array lies outside the file') from error
  return weights


def _read(
  path: Any,
  texts: Mapping[str, str],
  arrays: dict[str, Any],
  name: str | None,
  overrides: dict[str, Any],
) -> Weights:
  facts = metadata.decode(texts) if 'model' in texts else {}
  facts = facts or metadata.read_sidecar(path)
  for key, x in arrays.items():
    if x.dtype not in archives.FLOATS and not _is_counter(key):
      raise ValueError(
        f'{key[:200]} is {x.dtype}; weights are {archives.float_names()}: '
        'convert it first, with x.astype(numpy.float32)'
      )
  if any('/~/' in key for key in arrays):
    if 'folded' in texts:
      raise ValueError(
        'these are folded weights, for inference elsewhere; use the file that '
        'they were made from'
      )
    weights = _from_ours(facts, arrays, name, overrides)
  else:
    facts = facts or hub.read_config(path)
    name = name or timm.identify(arrays)
    exact = _decode_arrays(texts.get('exact', '{}'))
    params, state = timm.from_timm(arrays, name, exact, **overrides)
    weights = Weights(name, params, state, timm.overrides(name) | overrides)
  return metadata.add(weights, facts) if facts else weights


def _from_ours(
  facts: Mapping[str, Any],
  arrays: dict[str, Any],
  name: str | None,
  overrides: dict[str, Any],
) -> Weights:
  if facts:
    if name not in (None, facts['model']):
      raise ValueError(f'it holds {facts["model"]}, not {name}')
    name = facts['model']
    stored = _tuples(facts['overrides'])
    actual = {**models.arguments(facts['model']), **stored}
    for field, value in overrides.items():
      if field not in table.REGULARISATION and actual.get(field) != value:
        raise ValueError(
          f'it holds {name} with {field}={actual.get(field)!r}, not {value!r}'
        )
    overrides = stored
  trees: tuple[dict, dict] = ({}, {})
  for key, x in arrays.items():
    module, _, leaf = key.removeprefix(STATE).rpartition('/')
    trees[key.startswith(STATE)].setdefault(module, {})[leaf] = x
  name = name or table.identify(*trees)
  table.check(trees, name, overrides)
  params, state = (
    {
      module: {leaf: _as_loaded(leaf, x) for leaf, x in leaves.items()}
      for module, leaves in tree.items()
    }
    for tree in trees
  )
  return Weights(name, params, state, overrides)


def _as_loaded(leaf: str, x: Any) -> np.ndarray:
  return np.asarray(x, np.int32 if leaf == 'counter' else np.float32)


def _is_counter(key: str) -> bool:
  return key.endswith(('/counter', '.num_batches_tracked'))


def check_finite(weights: Weights) -> None:
  """Raises a ValueError if an array is not finite."""
  for tree in (weights.params, weights.state):
    for module, leaves in tree.items():
      for leaf, x in leaves.items():
        bad = np.size(x) - np.count_nonzero(np.isfinite(x))
        if bad:
          raise ValueError(
            f'{module} {leaf} has {bad} of {np.size(x)} numbers that are not '
            'finite; fetch or convert the file again'
          )


def encode_arrays(tree: AnyTree) -> str:
  """Returns arrays as text, for metadata; `read` decodes them."""
  return json.dumps(
    {
      module: {
        leaf: [
          x.shape,
          base64.b64encode(np.asarray(x, '<f4').tobytes()).decode(),
        ]
        for leaf, x in leaves.items()
      }
      for module, leaves in tree.items()
    }
  )


def _decode_arrays(text: str) -> Tree:
  return {
    module: {
      leaf: np.frombuffer(base64.b64decode(data), '<f4').reshape(shape)
      for leaf, (shape, data) in leaves.items()
    }
    for module, leaves in json.loads(text).items()
  }


def _tuples(overrides: dict[str, Any]) -> dict[str, Any]:
  """Converts the lists of JSON to tuples."""
  return {
    k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()
  }
