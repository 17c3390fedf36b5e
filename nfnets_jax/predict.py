r"""Names what is in photographs.

    python -m nfnets_jax.predict --weights=F0_haiku.npz cat.jpg photographs/
    python -m nfnets_jax.predict --model=nfnet_f0 --weights=released *.jpg
    python -m nfnets_jax.predict --weights=runs/digits digit.png

Photographs are prepared as in the evaluation of the run that the weights are
of. Files of others do not tell; then it is the published evaluation: at the
test size of the variant, both sides resized to 32 pixels more, and the central
square taken.
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
from nfnets_jax.training import init_from

# ruff: noqa: E402
extras.need('train', 'haiku')

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from nfnets_jax import devices, models, paths, weights
from nfnets_jax.data import folder, transforms
from nfnets_jax.models import layers, variants
from nfnets_jax.training.normalize import normalize

PRECISIONS = ('float32', 'bfloat16')
_CROP = 'resize_crop_32'
_CLASSES = pathlib.Path(__file__).parent / 'data' / 'imagenet_classes.txt'

Forward = Callable[[jax.Array], jax.Array]


def create_forward(
  net_weights: weights.Weights, precision: str = 'float32'
) -> Forward:
  """Returns a function from pixels to logits, with weights folded into it.

  Args:
    net_weights: as of `weights.read`.
    precision: that the network computes in, 'float32' or 'bfloat16'.

  Returns:
    A pure function of images `[B, px, px, 3]`, 0 to 255, that returns logits
    `[B, K]`, float32. Weights are standardised once, here.

  Raises:
    ValueError: for another precision.

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
  params = jax.jit(layers.fold)(net_weights.params)
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
    # By default a TPU multiplies float32 in bfloat16, and a GPU in TF32.
    with jax.default_matmul_precision(precision):
      outputs, _ = net.apply(params, net_weights.state, None, inputs)
    return outputs['logits'].astype(jnp.float32)

  return forward


def random_weights(
  name: str, num_classes: int = 1000, seed: int = 0
) -> weights.Weights:
  """Returns untrained weights, to try what does not need trained ones.

  Args:
    name: the variant.
    num_classes: K.
    seed: of the weights.

  Returns:
    Weights as at the beginning of a training.
  """

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
  """Returns the names of the classes.

  Args:
    num_classes: K.
    file: a name a line.
    recorded: the names that come with the weights, taken if there is no file.
      Without either they are ImageNet's, if there are 1000 classes, or else
      their numbers.

  Returns:
    K names.

  Raises:
    ValueError: if the file is no text, has an empty line, or another number of
      lines.
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
  """Returns the image size and the crop that weights are evaluated with.

  Args:
    net_weights: as of `read_weights`.

  Returns:
    What comes with the weights, or else the published: the test size of the
    variant, and 'resize_crop_32'.

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
  """Yields the probabilities of the classes for each photograph.

  Args:
    files: of photographs, in one of `data.decode.FORMATS`; they are turned by
      their EXIF orientation.
    net_weights: as of `weights.read`.
    image_size: side in pixels; None is that of `evaluation_of`.
    crop: as in `data.transforms.eval_transform`; None likewise.
    batch_size: photographs that go through the network together.
    precision: as for `create_forward`.

  Yields:
    The file, probabilities `[K]`, and an empty text; or for one that is no
    whole photograph, the file, None, and why.
  """
  usual_size, usual_crop = evaluation_of(net_weights)
  px = image_size or usual_size
  transform = transforms.eval_transform(px, crop or usual_crop)
  forward = jax.jit(create_forward(net_weights, precision))
  for start in range(0, len(files), batch_size):
    share = files[start : start + batch_size]
    batch = np.zeros((batch_size, px, px, 3), np.uint8)
    problems = [''] * len(share)
    for i, file in enumerate(share):
      try:
        example = {'image': file.read_bytes(), 'label': 0, 'orient': True}
        batch[i] = transform(example)['image']
      except (MemoryError, OSError, ValueError) as error:
        problems[i] = str(error) or type(error).__name__
    probabilities = np.asarray(jax.nn.softmax(forward(batch)))
    for file, found, problem in zip(
      share, probabilities, problems, strict=False
    ):
      yield file, None if problem else found, problem


def find_images(images: Sequence[paths.PathLike]) -> list[pathlib.Path]:
  """Returns the files named, and those of photographs in the folders named.

  Args:
    images: files and folders; a folder's folders count too. As in the data set
      `folder`, links are followed, and a warning names what is passed over.

  Returns:
    Files, those of a folder in the order of their names.

  Raises:
    FileNotFoundError: if there is no such file, or no photograph in a folder.
  """
  files = []
  for image in images:
    path = paths.existing(image, 'IMAGE')
    if not path.is_dir():
      files.append(path)
      continue
    passed_over: folder.PassedOver = {}
    inside = folder.walk(path, passed_over)
    folder.warn(path, passed_over)
    if not inside:
      raise FileNotFoundError(
        f'there is no photograph in {path}, no {", ".join(folder.SUFFIXES)}'
      )
    files += [path / name for name in inside]
  return files


def read_weights(
  source: str, name: str | None, option: str = 'weights'
) -> weights.Weights:
  """Returns weights from a file, a run, the authors, or none at all.

  Args:
    source: a file; the folder of a run; 'released'; or 'random'.
    name: the variant; None finds out from a file or a run.
    option: the flag or argument that the source was given as.

  Returns:
    The weights; of a run, the moving average.

  Raises:
    ValueError: as `weights.read`, or if the name is needed.
    OSError: if there are no weights, or they cannot be read.
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
    # The training needs more than prediction does; only a run asks for it.

    found = init_from.load_average(path)
    if name not in (None, found.name):
      raise ValueError(f'the run in {source} is of {found.name}, not of {name}')
    return found
  return weights.read(path, name)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command.

  Args:
    argv: arguments; None takes those of the process.
  """
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
    # Names of files and classes may have what the terminal does not.
    sys.stdout.reconfigure(errors='backslashreplace')
  devices.start_or_exit()
  try:
    # Before weights are read or drawn, which takes its time.
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
    found = predict(
      files,
      net_weights,
      image_size=args.image_size,
      crop=args.crop,
      batch_size=min(args.batch, len(files)),
      precision=args.precision,
    )
    failed = _print(found, names, args.top, args.json)
  except (OSError, ValueError) as error:
    sys.exit(f'error: {error}')
  if failed:
    sys.exit(f'{failed} of {len(files)} files could not be decoded')


def _print(
  found: Iterator[tuple[pathlib.Path, np.ndarray | None, str]],
  names: Sequence[str],
  top: int,
  as_json: bool,
) -> int:
  """Prints what was found; returns how many files could not be read."""
  failed = 0
  for file, probabilities, problem in found:
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
      line = {'file': folder.printable(file), 'top': best}
      print(json.dumps(line | ({'error': problem} if problem else {})))
    elif problem:
      print(f'{folder.printable(file)}: {problem}', file=sys.stderr)
    else:
      print(folder.printable(file))
      for x in best:
        print(f'  {100 * x["probability"]:5.1f} %  {x["name"]}')
  return failed


if __name__ == '__main__':
  main()
