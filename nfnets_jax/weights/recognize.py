"""Identifies files and folders given as weights.

Files are identified by their first bytes, folders by the names in them. Errors
say what was found and what to do instead.
"""

import json
import os
import pathlib
import re
import zipfile

import safetensors

from nfnets_jax import paths

FORMATS = '.npz or .safetensors'

_FROM_PYTORCH = 'save its weights with safetensors.torch.save_file'
_ELSEWHERE = f'weights are {FORMATS}; convert it with the tool that wrote it'
_UNPACK = 'unpack it and give the file inside'
# Offset, signature, description and remedy.
_KINDS = (
  (
    0,
    b'version https://git-lfs',
    'a git-lfs pointer, not the file itself',
    'run `git lfs pull` in its repository, or download the file',
  ),
  (
    0,
    b'/annex/objects/',
    'a git-annex pointer, not the file itself',
    'run `git annex get` in its repository, or download the file',
  ),
  (
    0,
    b'\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.',
    'a PyTorch checkpoint',
    _FROM_PYTORCH,
  ),
  (0, b'\x89HDF\r\n\x1a\n', 'an HDF5 file, such as a Keras model', _ELSEWHERE),
  (4, b'TFL3', 'a TensorFlow Lite model', _ELSEWHERE),
  (0, b'GGUF', 'a GGUF file', _ELSEWHERE),
  (
    0,
    b'\x93NUMPY',
    'a single NumPy array',
    'save all arrays to one file with numpy.savez',
  ),
  (0, b'\x1f\x8b', 'compressed with gzip', _UNPACK),
  (0, b'BZh', 'compressed with bzip2', _UNPACK),
  (0, b'\xfd7zXZ\0', 'compressed with xz', _UNPACK),
  (0, b'\x28\xb5\x2f\xfd', 'compressed with zstd', _UNPACK),
  (0, b'7z\xbc\xaf\x27\x1c', 'a 7z archive', _UNPACK),
  (257, b'ustar', 'a tar archive', _UNPACK),
  (0, b'\xff\xd8\xff', 'an image', f'weights are {FORMATS}'),
  (0, b'\x89PNG', 'an image', f'weights are {FORMATS}'),
)
# Kinds without a signature.
_ENDINGS = (
  (r'\.onnx', 'an ONNX model', _ELSEWHERE),
  (r'\.(index|meta|data-\d+-of-\d+)', 'part of a TensorFlow checkpoint', ''),
  (r'\.pb', 'a TensorFlow graph', _ELSEWHERE),
  (
    r'\.msgpack',
    'a Flax checkpoint',
    'restore it in Flax and save the parameters with weights.write',
  ),
  (
    r'\.stablehlo',
    'an exported program, which cannot be read back',
    'use the weights it was exported from',
  ),
)
_PICKLE = re.compile(rb'\x80[\x00-\x05]|\(d|\}[q(.U]|c[\w.]+\n')
# ONNX and TensorFlow files begin with a version number and a string.
_PROTOBUF = re.compile(rb'\x08[\x01-\x20]\x12')
_SIZE = 512


def check_file(path: pathlib.Path) -> None:
  """Raises an error if a file is not in a supported weights format.

  Reads only its beginning, or the directory of an archive.

  Raises:
    ValueError: if it is empty, truncated, or something else; the message says
      what it is, and the remedy.
    OSError: if it cannot be read.
  """
  if not path.is_file():
    raise ValueError(
      f'{path}: it is not a regular file; copy its contents to one'
    )
  with path.open('rb') as file:
    start = file.read(_SIZE)
  problem = _problem(path, start)
  if problem is not None:
    raise ValueError(f'{path}: {problem}')


def _problem(path: pathlib.Path, start: bytes) -> str | None:
  """Returns what is wrong with a file, None if it may be weights."""
  if not start:
    return 'the file is empty; download it again'
  if start.startswith(b'PK'):
    return _problem_of_archive(path)
  length = int.from_bytes(start[:8], 'little')
  if start[8:9] == b'{' and length < 2**32:
    try:
      with safetensors.safe_open(os.fspath(path), 'numpy'):
        return None
    except safetensors.SafetensorError as error:
      text = str(error).rpartition(': ')[2]
      return (
        f'this .safetensors is truncated or corrupt: {text}; download it again'
      )
  for offset, mark, what, remedy in _KINDS:
    if start[offset:].startswith(mark):
      return f'this is {what}; {remedy}'
  if _PICKLE.match(start):
    return None
  text = _text(start)
  answer = _answer(text)
  if answer is not None:
    return answer
  for ending, what, remedy in _ENDINGS:
    if re.search(f'{ending}$', path.name):
      return f'this is {what}; {remedy or _ELSEWHERE}'
  if _PROTOBUF.match(start):
    return f'this is an ONNX or TensorFlow model; {_ELSEWHERE}'
  # The last character may be truncated.
  if re.fullmatch(r'[^\x00-\x08\x0e-\x1f\ufffd]+\ufffd?', text):
    return f'this is text: {_brief(text)}; weights are {FORMATS}'
  return (
    f'not a recognized weights format; it begins with '
    f'{start[:8]!r}; weights are {FORMATS}'
  )


def check_answer(path: pathlib.Path) -> None:
  """Raises an error if a server sent a web page instead of a file.

  Raises:
    ValueError: if it is a web page, XML or JSON.
    OSError: if it cannot be read.
  """
  with path.open('rb') as file:
    answer = _answer(_text(file.read(_SIZE)))
  if answer is not None:
    raise ValueError(answer)


def _text(start: bytes) -> str:
  """Decodes UTF-8, or UTF-16 with a byte-order mark, and strips the start."""
  utf_16 = start.startswith((b'\xff\xfe', b'\xfe\xff'))
  text = start.decode('utf-16' if utf_16 else 'utf-8', 'replace')
  return text.lstrip('\ufeff\t\r\n ')


def _answer(text: str) -> str | None:
  if re.match('<[a-zA-Z!?]', text):
    return (
      'this is a web page or XML, perhaps an error page of a server: '
      f'{_brief(text)}; download the file itself; it may need a login'
    )
  if re.match(r'\{\s*["}]|\[\s*[]["{\d]', text):
    return f'this is JSON: {_brief(text)}; weights are {FORMATS}'
  return None


def _problem_of_archive(path: pathlib.Path) -> str | None:
  try:
    with zipfile.ZipFile(path) as archive:
      names = archive.namelist()
  except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
    return f'this .npz is truncated or corrupt: {error}; download it again'
  if any(name.endswith('data.pkl') for name in names):
    return f'this is a PyTorch checkpoint; {_FROM_PYTORCH}'
  if 'model.weights.h5' in names:
    return f'this is a Keras model; {_ELSEWHERE}'
  if not any(name.endswith('.npy') for name in names):
    some = ', '.join(name[:80] for name in names[:3]) or 'nothing'
    return f'this is a zip archive of {some}; {_UNPACK}'
  return None


def _brief(text: str) -> str:
  first = ' '.join(text[:200].split())
  return repr(first[:60] + ('…' if len(first) > 60 else ''))


def is_run(folder: paths.Path) -> bool:
  """Returns whether a folder has the `config.json` of a run.

  Raises:
    ValueError: if that file is corrupt and there are checkpoints.
    OSError: if it cannot be read.
  """
  path = folder / 'config.json'
  if not path.is_file():
    return False
  try:
    config = json.loads(path.read_bytes())
  except ValueError as error:
    if not (folder / 'checkpoints').is_dir():
      return False
    raise ValueError(f'{path} is corrupt: {error}') from error
  model = config.get('model') if isinstance(config, dict) else None
  return isinstance(model, dict) and {'data', 'optimizer'} <= config.keys()


def check_folder(folder: paths.Path, option: str = 'path') -> None:
  """Raises an error unless a folder is a run with a checkpoint.

  Reads only names and `config.json`. `option` names the folder in messages.

  Raises:
    FileNotFoundError: if it is not; the message says what it is, and the
      remedy.
    ValueError: if its name has characters that checkpoints do not allow.
    OSError: if it cannot be read.
  """
  if is_run(folder):
    paths.expand_literal(folder, option)
    saved = folder / 'checkpoints'
    if not any(x.name.isdecimal() for x in _inside(saved)):
      raise FileNotFoundError(
        f'{option}: the run in {folder} has no checkpoint yet; train first'
      )
    return
  raise FileNotFoundError(
    f'{option}: {folder} holds no run: {_what_else(folder)}'
  )


def _inside(folder: paths.Path) -> list[paths.Path]:
  return sorted(folder.iterdir()) if folder.is_dir() else []


def _what_else(folder: paths.Path) -> str:
  """Describes a folder that is not a run, with the remedy."""
  in_bucket = paths.in_bucket(folder)
  full = folder if in_bucket else folder.resolve()
  # The last two of a URL are the root and the scheme.
  for parent in list(full.parents)[: -2 if in_bucket else None]:
    if is_run(parent):
      return f'it is part of the run in {parent}; give that folder'
  inside = _inside(folder)
  names = {x.name for x in inside}
  if not names:
    return 'it is empty'
  files = [x for x in inside if x.suffix in ('.npz', '.safetensors')]
  if files:
    return f'it contains the weights {_some(files)}; give the file'
  folders = [x for x in inside if x.is_dir()]
  runs = [x for x in folders[:1000] if is_run(x)]
  if runs:
    return f'it contains runs; give one, such as {_some(runs)}'
  if any(re.search(r'\.(bin|ckpt|pth?)$', name) for name in names):
    return f'it is a PyTorch model; {_FROM_PYTORCH} and give the file'
  if 'saved_model.pb' in names:
    return f'it is a TensorFlow SavedModel; {_ELSEWHERE}'
  if any(name.endswith('.index') for name in names):
    return f'it is a TensorFlow checkpoint; {_ELSEWHERE}'
  ours = {'fingerprint', 'loader', 'state'}
  if any(ours <= {y.name for y in _inside(x)} for x in [folder, *folders]):
    return (
      'it contains checkpoints without the config.json of their run; give the '
      'folder of the run'
    )
  if any(_is_orbax(x) for x in [folder, *folders]):
    return (
      'it is an Orbax checkpoint of another program; restore it there and save '
      'the parameters with weights.write'
    )
  if _is_data(names):
    return 'it is a data set, not weights'
  return f'it has no config.json of a run, but {_some(inside)}'


def _is_orbax(folder: paths.Path) -> bool:
  names = {x.name for x in _inside(folder)}
  marks = {'_CHECKPOINT_METADATA', '_METADATA', 'manifest.ocdbt', '_sharding'}
  return bool(marks & names)


def _is_data(names: set[str]) -> bool:
  known = {'dataset_info.json', 'features.json', 'test', 'train', 'validation'}
  images = r'(?i)\.(jpe?g|png|tfrecord|array_record)\b'
  return bool(known & names or any(re.search(images, x) for x in names))


def _some(entries: list[paths.Path]) -> str:
  shown = ', '.join(x.name for x in entries[:3])
  return shown + (f' and {len(entries) - 3} more' if len(entries) > 3 else '')
