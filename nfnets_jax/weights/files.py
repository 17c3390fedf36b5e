"""Reads and writes files of weights, with thorough checks.

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
import dataclasses
import errno
import functools
import json
import math
import mmap
import os
import pathlib
import pickle
import secrets
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from nfnets_jax import models, paths
from nfnets_jax.models import variants
from nfnets_jax.weights import pickles, sources, table, timm
from nfnets_jax.weights.table import AnyTree, Tree

FORMS = ('haiku', 'released', 'timm')

# In our own files: the key of the metadata, and the prefix of state.
_ABOUT = '__nfnets_jax__'
_STATE = 'state:'
_FLOATS = tuple(map(np.dtype, (np.float16, np.float32, ml_dtypes.bfloat16)))
_MAX_MEMBERS = 100_000
_SAFETENSORS_DTYPES = {
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F32': np.dtype(np.float32),
  'F64': np.dtype(np.float64),
  'I32': np.dtype(np.int32),
  'I64': np.dtype(np.int64),
}


@dataclasses.dataclass(frozen=True)
class Weights:
  """Weights of a network.

  Attributes:
    name: the variant, such as 'nfnet_f0'.
    params: Haiku parameters, `{module: {parameter: float32 array}}`.
    state: Haiku state, such as the statistics of batch normalisation.
    overrides: arguments of `models.create` besides the name; timm's NF-ResNets
      and NF-RegNets pad and pool differently.
    image_size: side of evaluation images in pixels; None is the test size of
      the variant.
    crop: evaluation crop, a name for `data.transforms.eval_transform`; None is
      its default.
    class_names: K names; None if unknown.
  """

  name: str
  params: Tree
  state: Tree = dataclasses.field(default_factory=dict)
  overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
  image_size: int | None = None
  crop: str | None = None
  class_names: tuple[str, ...] | None = None

  @property
  def num_classes(self) -> int:
    """Number of classes K of the classifier."""
    return table.num_classes(self.params, self.name)


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
    >>> from nfnets_jax import models
    >>> def forward(x):
    ...   return models.create('nfnet_tiny', 10)(x, is_training=False)
    >>> net = hk.transform(forward)
    >>> params = jax.jit(net.init)(jax.random.key(0), np.zeros((1, 32, 32, 3)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write(f'{folder}/tiny.npz', Weights('nfnet_tiny', params))
    ...   loaded = load(f'{folder}/tiny.npz', 'nfnet_tiny')
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
  path = sources.locate(path, name, 'path')
  if path.is_dir():
    raise IsADirectoryError(
      f'{path} is the folder of a run; training.init_from.load_average reads it'
    )
  try:
    with contextlib.ExitStack() as stack:
      file = stack.enter_context(path.open('rb'))
      # numpy parses array headers as Python, which may emit warnings.
      stack.enter_context(warnings.catch_warnings())
      warnings.simplefilter('ignore')
      about, arrays = stack.enter_context(_opened(path, file))
      weights = _parse(about, arrays, name, overrides)
      if 'model' in about:
        weights = _with_metadata(weights, about)
    _check_finite(weights)
  except _DAMAGE as error:
    raise ValueError(f'{path}: {error}') from error
  except OSError as error:
    if error.errno != errno.EINVAL:
      raise
    raise ValueError(f'{path}: it points outside itself') from error
  return weights


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
      like the authors' files; 'timm', a `.safetensors` for PyTorch.
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
  _check_finite(weights)
  _check_metadata(weights)
  save = _writer(weights, form, folded, path.suffix)
  with new_file(path) as partial:
    save(partial)


def check_target(
  path: str | os.PathLike, form: str = 'haiku', option: str = 'path'
) -> pathlib.Path:
  """Returns the expanded path of a file that `write` can create.

  Raises:
    FileExistsError: if the file exists.
    ValueError: if the suffix does not match the form.
  """
  path = paths.expand(path, option)
  if form not in FORMS:
    raise ValueError(f'form {form!r} is none of {", ".join(FORMS)}')
  endings = {
    'haiku': ('.npz', '.safetensors'),
    'released': ('.npz',),
    'timm': ('.safetensors',),
  }[form]
  if path.suffix not in endings:
    raise ValueError(
      f'{path}: weights in the form {form!r} are written into files that end '
      f'in {" or ".join(endings)}'
    )
  if path.exists():
    raise FileExistsError(f'{path} already exists; choose another name')
  return path


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
      os.link(partial, path)  # fails if the file exists by now
    except FileExistsError:
      raise
    except OSError:  # not all file systems support links
      path.touch(exist_ok=False)
      partial.replace(path)
  except FileExistsError:
    raise FileExistsError(
      f'{path} already exists; choose another name'
    ) from None
  finally:
    partial.unlink(missing_ok=True)


_DAMAGE = (
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


@dataclasses.dataclass(frozen=True)
class _Array:
  """An array that is read lazily."""

  shape: tuple[int, ...]
  dtype: np.dtype
  get: Callable[[], np.ndarray]

  def __array__(
    self, dtype: Any = None, copy: bool | None = None
  ) -> np.ndarray:
    return np.array(self.get(), dtype or self.dtype, copy=copy)


_Opened = tuple[Mapping[str, str], dict[str, Any]]


@contextlib.contextmanager
def _opened(path: pathlib.Path, file: BinaryIO) -> Iterator[_Opened]:
  """Yields the metadata of a file, and its arrays by name."""
  size = os.fstat(file.fileno()).st_size
  start = file.read(9)
  file.seek(0)
  if start.startswith(b'PK'):
    with zipfile.ZipFile(file) as archive:
      yield _members(archive)
  elif start[8:9] == b'{' and int.from_bytes(start[:8], 'little') < size:
    with safetensors.safe_open(os.fspath(path), 'numpy') as opened:
      yield opened.metadata() or {}, _tensors(opened)
  else:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      tree = pickles.read(data, size)  # type: ignore[arg-type]
    yield {}, _leaves(tree)


def _members(archive: zipfile.ZipFile) -> _Opened:
  infos = archive.infolist()
  names = [info.filename for info in infos]
  if len(names) > _MAX_MEMBERS or len(set(names)) < len(names):
    raise ValueError(f'the archive has {len(names)} members, or some twice')
  about: dict[str, str] = {}
  arrays: dict[str, Any] = {}
  for info in infos:
    if not info.filename.endswith('.npy'):
      raise ValueError(f'the archive has a member {info.filename[:80]!r}')
    name = info.filename.removesuffix('.npy')
    array = _member(archive, info)
    if name == _ABOUT:
      if array.shape or array.dtype.kind != 'S' or array.dtype.itemsize > 2**24:
        raise ValueError(f'{_ABOUT} is no short text')
      about = json.loads(bytes(array.get()[()]))
    else:
      arrays[name] = array
  return about, arrays


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Array:
  """Reads only the header of a member."""
  with archive.open(info) as file:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
      raise ValueError(f'{info.filename[:80]!r} has the format {version}')
    header = (
      np.lib.format.read_array_header_1_0
      if version == (1, 0)
      else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = header(file)
    start = file.tell()
  if dtype.hasobject:
    raise ValueError(f'{info.filename[:80]!r} holds Python objects')
  if dtype == np.dtype('V2'):  # numpy writes bfloat16 as V2
    dtype = np.dtype(ml_dtypes.bfloat16)
  size = math.prod(shape) * dtype.itemsize
  if min(shape, default=0) < 0 or start + size != info.file_size:
    raise ValueError(
      f'{info.filename[:80]!r} has {info.file_size} bytes, and its header says '
      f'{start + size}'
    )

  def get() -> np.ndarray:
    with archive.open(info) as file:
      file.read(start)
      data = file.read(size)
      # Reading past the last byte verifies the checksum.
      if len(data) != size or file.read(1):
        raise ValueError(f'{info.filename[:80]!r} is cut off')
    order = 'F' if fortran else 'C'
    return np.frombuffer(data, dtype).reshape(shape, order=order)  # type: ignore[call-overload]

  return _Array(shape, dtype, get)


def _tensors(opened: Any) -> dict[str, Any]:
  arrays = {}
  for key in opened.keys():  # noqa: SIM118, it is no mapping
    part = opened.get_slice(key)
    code = part.get_dtype()
    if code not in _SAFETENSORS_DTYPES:
      raise ValueError(f'{key[:80]} is {code}; weights are {_known_floats()}')
    arrays[key] = _Array(
      tuple(part.get_shape()),
      _SAFETENSORS_DTYPES[code],
      functools.partial(opened.get_tensor, key),
    )
  return arrays


def _leaves(tree: Any) -> dict[str, Any]:
  """Flattens a dict of dicts of arrays."""
  if not isinstance(tree, dict) or not tree:
    raise ValueError('it holds no dict of modules')
  arrays = {}
  for module, leaves in tree.items():
    if not isinstance(leaves, dict):
      raise ValueError(f'{str(module)[:80]!r} holds no dict of parameters')
    for leaf, x in leaves.items():
      if not isinstance(x, (np.ndarray, np.generic)):
        raise ValueError(f'{module} {leaf} is no array'[:200])
      arrays[f'{module}/{leaf}'] = x
  return arrays


def _parse(
  about: Mapping[str, str],
  arrays: dict[str, Any],
  name: str | None,
  overrides: dict[str, Any],
) -> Weights:
  """Assembles named arrays into the weights of a network."""
  for key, x in arrays.items():
    if x.dtype not in _FLOATS and not _is_counter(key):
      raise ValueError(
        f'{key[:200]} is {x.dtype}; weights are {_known_floats()}: convert it '
        'first, with x.astype(numpy.float32)'
      )
  if not any('/~/' in key for key in arrays):
    name = name or timm.identify(arrays)
    exact = _decoded(about.get('exact', '{}'))
    params, state = timm.from_timm(arrays, name, exact, **overrides)
    return Weights(name, params, state, timm.overrides(name) | overrides)
  if 'folded' in about:
    raise ValueError(
      'its weights are standardised once and for all, for inference elsewhere; '
      'use the file that it was made from'
    )
  if 'model' in about:
    stored = json.loads(about['overrides'])
    if name not in (None, about['model']):
      raise ValueError(f'it holds {about["model"]}, not {name}')
    name, stored = about['model'], _tuples(stored)
    theirs = {**models.arguments(name), **stored}
    for field, value in overrides.items():
      if field not in table.REGULARISATION and theirs.get(field) != value:
        raise ValueError(
          f'it holds {name} with {field}={theirs.get(field)!r}, not {value!r}'
        )
    overrides = stored
  trees: tuple[dict, dict] = ({}, {})
  for key, x in arrays.items():
    module, _, leaf = key.removeprefix(_STATE).rpartition('/')
    trees[key.startswith(_STATE)].setdefault(module, {})[leaf] = x
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


def _with_metadata(weights: Weights, about: Mapping[str, str]) -> Weights:
  """Adds the metadata of images and classes."""
  size, names = (
    json.loads(about.get(key, 'null')) for key in ('image_size', 'class_names')
  )
  weights = dataclasses.replace(
    weights,
    image_size=size,
    crop=about.get('crop'),
    class_names=tuple(names) if isinstance(names, list) else names,
  )
  _check_metadata(weights)
  return weights


def _check_metadata(weights: Weights) -> None:
  size, crop, names = weights.image_size, weights.crop, weights.class_names
  if size is not None and (type(size) is not int or size < 1):
    raise ValueError(f'image_size is {size!r}; it must be at least 1 pixel')
  if crop is not None and not (isinstance(crop, str) and crop):
    raise ValueError(f'crop is {crop!r}, not the name of one')
  if names is None:
    return
  if not isinstance(names, tuple) or not all(
    isinstance(name, str) and name.strip() for name in names
  ):
    raise ValueError(f'class_names are {str(names)[:80]}; each must be a text')
  if len(names) != weights.num_classes:
    raise ValueError(
      f'there are {len(names)} class names, and {weights.num_classes} classes'
    )


def _as_loaded(leaf: str, x: Any) -> np.ndarray:
  return np.asarray(x, np.int32 if leaf == 'counter' else np.float32)


def _is_counter(key: str) -> bool:
  return key.endswith(('/counter', '.num_batches_tracked'))


def _known_floats() -> str:
  return ', '.join(str(x) for x in _FLOATS)


def _check_finite(weights: Weights) -> None:
  for tree in (weights.params, weights.state):
    for module, leaves in tree.items():
      for leaf, x in leaves.items():
        bad = np.size(x) - np.count_nonzero(np.isfinite(x))
        if bad:
          raise ValueError(
            f'{module} {leaf} has {bad} of {np.size(x)} numbers that are not '
            'finite; fetch or convert the file again'
          )


def _writer(
  weights: Weights, form: str, folded: bool, suffix: str
) -> Callable[[pathlib.Path], None]:
  """Returns a function that writes the file."""
  params = {
    module: {leaf: np.asarray(x, order='C') for leaf, x in leaves.items()}
    for module, leaves in weights.params.items()
  }
  about = {'model': weights.name, 'overrides': json.dumps(weights.overrides)}
  if weights.image_size is not None:
    about['image_size'] = json.dumps(weights.image_size)
  if weights.crop is not None:
    about['crop'] = weights.crop
  if weights.class_names is not None:
    about['class_names'] = json.dumps(weights.class_names)
  if form == 'timm':
    expected = timm.overrides(weights.name)
    if weights.overrides != expected:
      raise ValueError(
        f"timm's {weights.name} computes what a net with {expected} computes, "
        f'and these weights are of one with {weights.overrides}: they cannot '
        'be had there'
      )
    if folded:
      tensors = timm.folded(params, weights.state, weights.name)
      return lambda path: _save_safetensors(path, tensors, about)
    tensors = timm.to_timm(params, weights.state, weights.name)
    exact = timm.originals(params, weights.state, tensors, weights.name)
    about['exact'] = _encoded(exact)
    return lambda path: _save_safetensors(path, tensors, about)
  if folded:
    params = _folded(params)
    about['folded'] = 'true'
  if form == 'released':
    if weights.state:
      raise ValueError(
        f"{weights.name} has state, which the authors' form does not hold"
      )

    def save_pickle(path: pathlib.Path) -> None:
      with path.open('wb') as file:
        pickle.dump(params, file, protocol=4)

    return save_pickle
  arrays = {
    f'{prefix}{module}/{leaf}': np.asarray(x, order='C')
    for prefix, tree in (('', params), (_STATE, weights.state))
    for module, leaves in tree.items()
    for leaf, x in leaves.items()
  }
  if suffix == '.safetensors':
    return lambda path: _save_safetensors(path, arrays, about)
  arrays[_ABOUT] = np.asarray(json.dumps(about).encode())

  def save(path: pathlib.Path) -> None:
    with path.open('wb') as file:
      np.savez(file, **arrays)  # type: ignore[arg-type]

  return save


def _folded(params: Tree) -> Tree:
  """Applies `models.fold` on the host."""
  return {
    module: {leaf: np.asarray(x) for leaf, x in leaves.items()}
    for module, leaves in models.fold(params).items()  # type: ignore[arg-type]
  }


def _save_safetensors(
  path: pathlib.Path, arrays: Mapping[str, np.ndarray], about: dict[str, str]
) -> None:
  # safetensors writes raw memory.
  contiguous = {key: np.asarray(x, order='C') for key, x in arrays.items()}
  safetensors.numpy.save_file(contiguous, path, about)


def _encoded(tree: AnyTree) -> str:
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


def _decoded(text: str) -> Tree:
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
