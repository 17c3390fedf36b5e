r"""Classifies photographs.

    python -m nfnets_jax.predict --weights=F0_haiku.npz cat.jpg photographs/
    python -m nfnets_jax.predict --model=nfnet_f0 --weights=released *.jpg
    python -m nfnets_jax.predict --weights=runs/digits digit.png

Images are preprocessed as in the evaluation of the run. For other weights the
published evaluation is used: at the test size of the variant, both sides
resized to 32 pixels more, then the central square.
"""

import argparse
import io
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nfnets_jax import extras

# ruff: noqa: E402
extras.need('train', 'haiku')

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from nfnets_jax import devices, models, paths, weights
from nfnets_jax.data import image_files, transforms
from nfnets_jax.models import variants
from nfnets_jax.training.normalize import normalize

PRECISIONS = ('float32', 'bfloat16')
_CROP = 'resize_crop_32'
_CLASSES = pathlib.Path(__file__).parent / 'data' / 'imagenet_classes.txt'

Forward = Callable[[jax.Array], jax.Array]


def create_forward(
  net_weights: weights.Weights, precision: str = 'float32'
) -> Forward:
  """Returns a function from pixels to logits with folded weights.

  Args:
    net_weights: as returned by `weights.read`.
    precision: of the computation, 'float32' or 'bfloat16'.

  Returns:
    A pure function from images `[B, px, px, 3]`, 0 to 255, to float32 logits
    `[B, K]`. Weights are standardised once, here.

  Raises:
    ValueError: if the precision is unknown.

  Example:
    >>> forward = jax.jit(create_forward(random_weights('nfnet_tiny', 10)))
    >>> forward(np.zeros((2, 32, 32, 3), np.uint8)).shape
    (2, 10)
  """
  if precision not in PRECISIONS:
    raise ValueError(
      f'precision {precision!r} is none of {", ".join(PRECISIONS)}'
    )

  def apply(images: jax.Array) -> dict[str, jax.Array]:
    net = models.create(
      net_weights.name,
      net_weights.num_classes,
      standardized=True,
      **net_weights.overrides,
    )
    return net(images, is_training=False)

  net = hk.transform_with_state(apply)
  params = jax.jit(models.fold)(net_weights.params)
  # Biases and the classifier stay float32, as in training.
  dtype = jnp.dtype(precision)
  params = {
    module: {
      leaf: x.astype(dtype) if leaf == 'w' and x.ndim == 4 else x
      for leaf, x in leaves.items()
    }
    for module, leaves in params.items()
  }

  def forward(images: jax.Array) -> jax.Array:
    inputs = normalize(images, dtype=dtype)
    # The default precision is bfloat16 on TPU and TF32 on GPU.
    with jax.default_matmul_precision(precision):
      outputs, _ = net.apply(params, net_weights.state, None, inputs)
    return outputs['logits'].astype(jnp.float32)

  return forward


def random_weights(
  name: str, num_classes: int = 1000, seed: int = 0
) -> weights.Weights:
  """Returns untrained weights, for tests and benchmarks."""

  def apply(images: jax.Array) -> dict[str, jax.Array]:
    return models.create(name, num_classes)(images, is_training=False)

  net = hk.transform_with_state(apply)
  init = jax.jit(lambda key: net.init(key, jnp.zeros((1, 32, 32, 3))))
  params, state = jax.device_get(init(jax.random.key(seed)))
  return weights.Weights(name, dict(params), dict(state))


def class_names(
  num_classes: int,
  file: str | os.PathLike | None = None,
  recorded: Sequence[str] | None = None,
) -> list[str]:
  """Returns the K class names.

  Args:
    num_classes: K.
    file: text file with one name per line.
    recorded: names stored with the weights, used if there is no file. By
      default the names of ImageNet if K is 1000, else numbers.

  Raises:
    ValueError: if the file is not text, or has an empty line or another number
      of lines.
    OSError: if it cannot be read.

  Example:
    >>> class_names(1000)[0], class_names(3)
    ('tench, Tinca tinca', ['class 0', 'class 1', 'class 2'])
  """
  if file is not None:
    names = _read_names(file)
    if len(names) != num_classes:
      raise ValueError(
        f'{file} has {len(names)} names, and the network {num_classes} classes'
      )
    return names
  if recorded is not None:
    return list(recorded)
  if num_classes == 1000:
    lines = paths.read_text_lines(_CLASSES)
    return [line.partition(' ')[2] for line in lines]
  return [f'class {i}' for i in range(num_classes)]


def _read_names(file: str | os.PathLike) -> list[str]:
  names = [x.strip() for x in paths.read_text_lines(file, 'classes')]
  for number, name in enumerate(names, start=1):
    if not name:
      raise ValueError(f'{file}:{number} is empty; each line names a class')
  return names


def evaluation_of(net_weights: weights.Weights) -> tuple[int, str]:
  """Returns the image size in pixels and the crop to evaluate weights with.

  They are stored with the weights; by default they are the published ones, the
  test size of the variant and 'resize_crop_32'.

  Example:
    >>> evaluation_of(weights.Weights('nfnet_f1', {}, image_size=400))
    (400, 'resize_crop_32')
  """
  size = variants.get(net_weights.name).test_size
  return net_weights.image_size or size, net_weights.crop or _CROP


def predict(
  files: Sequence[pathlib.Path],
  net_weights: weights.Weights,
  *,
  image_size: int | None = None,
  crop: str | None = None,
  batch_size: int = 8,
  precision: str = 'float32',
) -> Iterator[tuple[pathlib.Path, np.ndarray | None, str]]:
  """Yields the class probabilities of each photograph.

  Args:
    files: photographs in one of `data.decode.FORMATS`; their EXIF orientation
      is applied.
    net_weights: as returned by `weights.read`.
    image_size: side in pixels, by default that of `evaluation_of`.
    crop: as in `data.transforms.eval_transform`, by default that of
      `evaluation_of`.
    batch_size: photographs per forward pass.
    precision: as in `create_forward`.

  Yields:
    The file, probabilities `[K]` and ''; or the file, None and the reason, if
    it cannot be decoded.
  """
  default_size, default_crop = evaluation_of(net_weights)
  px = image_size or default_size
  transform = transforms.eval_transform(px, crop or default_crop)
  forward = jax.jit(create_forward(net_weights, precision))
  for start in range(0, len(files), batch_size):
    chunk = files[start : start + batch_size]
    batch = np.zeros((batch_size, px, px, 3), np.uint8)
    problems = [''] * len(chunk)
    for i, file in enumerate(chunk):
      try:
        example = {'image': file.read_bytes(), 'label': 0, 'orient': True}
        batch[i] = transform(example)['image']
      except (MemoryError, OSError, ValueError) as error:
        problems[i] = str(error) or type(error).__name__
    probabilities = np.asarray(jax.nn.softmax(forward(batch)))
    for file, row, problem in zip(chunk, probabilities, problems, strict=False):
      yield file, None if problem else row, problem


def find_images(images: Sequence[paths.PathLike]) -> list[pathlib.Path]:
  """Returns the given files, and all images in the given folders.

  Args:
    images: files and folders, which are searched recursively. As in the data
      set `folder`, links are followed, and a warning names what is skipped.

  Returns:
    Files; those of a folder are sorted by name.

  Raises:
    FileNotFoundError: if a file does not exist, or a folder has no images.
  """
  files = []
  for image in images:
    path = paths.existing(image, 'IMAGE')
    if not path.is_dir():
      files.append(path)
      continue
    skipped: image_files.Skipped = {}
    inside = image_files.walk(path, skipped)
    image_files.warn(path, skipped)
    if not inside:
      raise FileNotFoundError(
        f'there is no photograph in {path}, no '
        f'{", ".join(image_files.SUFFIXES)}'
      )
    files += [path / name for name in inside]
  return files


def read_weights(
  source: str, name: str | None, option: str = 'weights'
) -> weights.Weights:
  """Returns weights from a file, a run, the authors' release or at random.

  Args:
    source: a file; the folder of a run; 'released'; or 'random'.
    name: the variant; None infers it from a file or a run.
    option: the flag or argument that holds `source`, for messages.

  Returns:
    The weights; for a run, the moving average.

  Raises:
    ValueError: as in `weights.read`, or if the name is required.
    OSError: if the weights do not exist or cannot be read.
  """
  if source in ('released', 'random') and name is None:
    raise ValueError(f'{source} weights need a --model')
  if name is not None:
    variants.get(name)
  if source == 'random':
    return random_weights(name or '')
  path = weights.locate(source, name, option)
  if source == 'released':
    return weights.read(weights.fetch(name or ''), name)
  if path.is_dir():
    # Training needs more packages than prediction; only a run takes them.
    from nfnets_jax.training import init_from

    average = init_from.load_average(path)
    if name not in (None, average.name):
      raise ValueError(
        f'the run in {source} is of {average.name}, not of {name}'
      )
    return average
  return weights.read(path, name)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  parser = argparse.ArgumentParser(
    prog='python -m nfnets_jax.predict',
    description=(__doc__ or '').split('\n')[0],
  )
  parser.add_argument('images', nargs='+', metavar='IMAGE')
  parser.add_argument('--model', help='the variant; default: of the weights')
  parser.add_argument(
    '--weights',
    required=True,
    help='a file, the folder of a run, "released" to download them, or '
    '"random" to try',
  )
  parser.add_argument(
    '--image_size',
    type=int,
    help='default: of the run that the weights are of, or the test size',
  )
  parser.add_argument(
    '--crop', help=f'default: of the run that the weights are of, or {_CROP}'
  )
  parser.add_argument('--batch', type=int, default=8, help='images at a time')
  parser.add_argument('--precision', choices=PRECISIONS, default='float32')
  parser.add_argument('--top', type=int, default=5, help='classes to name')
  parser.add_argument(
    '--classes',
    metavar='FILE',
    help='with the name of a class a line; default: those of the run',
  )
  parser.add_argument(
    '--json', action='store_true', help='print a JSON object a photograph'
  )
  args = parser.parse_args(argv)
  for flag in ('batch', 'top', 'image_size'):
    value = getattr(args, flag)
    if value is not None and value < 1:
      parser.error(f'--{flag} must be at least 1, got {value}')
  if isinstance(sys.stdout, io.TextIOWrapper):
    # Files and classes may have characters that the terminal lacks.
    sys.stdout.reconfigure(errors='backslashreplace')
  devices.start_or_exit()
  try:
    # Checked before weights are read or initialised, which is slow.
    if args.crop is not None:
      transforms.eval_transform(args.image_size or 32, args.crop)
    if args.classes is not None:
      _read_names(args.classes)
    files = find_images([paths.expand(x, 'IMAGE') for x in args.images])
    net_weights = read_weights(args.weights, args.model, '--weights')
    names = class_names(
      net_weights.num_classes, args.classes, net_weights.class_names
    )
    px, crop = evaluation_of(net_weights)
    print(
      f'{net_weights.name}, {net_weights.num_classes} classes; images of '
      f'{args.image_size or px} px, crop {args.crop or crop}',
      file=sys.stderr,
    )
    results = predict(
      files,
      net_weights,
      image_size=args.image_size,
      crop=args.crop,
      batch_size=min(args.batch, len(files)),
      precision=args.precision,
    )
    failed = _print(results, names, args.top, args.json)
  except (OSError, ValueError) as error:
    sys.exit(f'error: {error}')
  if failed:
    sys.exit(f'{failed} of {len(files)} files could not be decoded')


def _print(
  results: Iterator[tuple[pathlib.Path, np.ndarray | None, str]],
  names: Sequence[str],
  top: int,
  as_json: bool,
) -> int:
  """Prints the results; returns the number of files that failed."""
  failed = 0
  for file, probabilities, problem in results:
    best: list[dict[str, Any]] = []
    if probabilities is not None:
      order = np.argsort(-probabilities, kind='stable')[:top]
      best = [
        {
          'class': int(k),
          'name': names[k],
          'probability': float(probabilities[k]),
        }
        for k in order
      ]
    failed += bool(problem)
    if as_json:
      line = {'file': image_files.printable(file), 'top': best}
      print(json.dumps(line | ({'error': problem} if problem else {})))
    elif problem:
      print(f'{image_files.printable(file)}: {problem}', file=sys.stderr)
    else:
      print(image_files.printable(file))
      for x in best:
        print(f'  {100 * x["probability"]:5.1f} %  {x["name"]}')
  return failed


if __name__ == '__main__':
  main()
