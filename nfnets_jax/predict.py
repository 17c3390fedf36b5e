r"""Classifies photographs.

    python -m nfnets_jax.predict --weights=F0_haiku.npz cat.jpg photographs/
    python -m nfnets_jax.predict --model=nfnet_f0 --weights=released *.jpg
    python -m nfnets_jax.predict --weights=runs/digits digit.png
    python -m nfnets_jax.predict --weights=hf-hub:timm/dm_nfnet_f0.dm_in1k *.jpg
    python -m nfnets_jax.predict --weights=digits.stablehlo digit.png

Images are preprocessed as in the evaluation of the run, which its weights and
programs record. By default the published evaluation is used: at the test size
of the variant, both sides resized to 32 pixels more, then the central square.

`--features=FILE.npz` writes `pool`, the pooled features `[N, C]`, and
`file_name`, the N names.
"""

import argparse
import io
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from nfnets_jax import extras

# ruff: noqa: E402
extras.need('train', 'haiku')

import jax
import jax.numpy as jnp
import numpy as np

from nfnets_jax import devices, exported, inference, paths, weights
from nfnets_jax.data import image_files, transforms
from nfnets_jax.inference import (
  class_names,
  create_forward,
  random_weights,
  read_weights,
)
from nfnets_jax.weights import metadata, writing
from nfnets_jax.weights.metadata import evaluation_of

__all__ = [
  'class_names',
  'create_forward',
  'evaluation_of',
  'find_images',
  'predict',
  'random_weights',
  'read_weights',
]

Network = weights.Weights | exported.Program
# The file, its outputs by name if it was decoded, and else the reason.
Outputs = tuple[pathlib.Path, dict[str, np.ndarray] | None, str]


def predict(
  files: Sequence[pathlib.Path],
  net_weights: Network,
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
    net_weights: as returned by `weights.read`, or a program, whose image size,
      precision and perhaps batch size are fixed.
    image_size: side in pixels, by default that of `evaluation_of`.
    crop: as in `data.transforms.eval_transform`, by default that of
      `evaluation_of`.
    batch_size: photographs per forward pass.
    precision: as in `create_forward`.

  Yields:
    The file, probabilities `[K]` and ''; or the file, None and the reason, if
    it cannot be decoded.

  Raises:
    ValueError: if a program takes images of another size.
  """
  default_size, default_crop = evaluation_of(net_weights)
  px = image_size or default_size
  results = _outputs(
    files, net_weights, px, crop or default_crop, batch_size, precision
  )
  for file, outputs, problem in results:
    yield file, None if outputs is None else outputs['probabilities'], problem


def _outputs(
  files: Sequence[pathlib.Path],
  net_weights: Network,
  px: int,
  crop: str,
  batch_size: int,
  precision: str,
) -> Iterator[Outputs]:
  """Yields `probabilities` and, except of a program, `pool` of each file."""
  transform = transforms.eval_transform(px, crop)
  if isinstance(net_weights, exported.Program):
    program = net_weights.forward
    batch_size = net_weights.batch_size or batch_size
    _check_size(net_weights, px)

    def forward(images: np.ndarray) -> dict[str, jax.Array]:
      return {'logits': program(jnp.asarray(images))}
  else:
    forward = jax.jit(inference.create_outputs(net_weights, precision))
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
    outputs = dict(forward(batch))
    outputs['probabilities'] = jax.nn.softmax(outputs.pop('logits'))
    outputs = jax.device_get(outputs)
    for i, (file, problem) in enumerate(zip(chunk, problems, strict=True)):
      row = {key: x[i] for key, x in outputs.items()}
      yield file, None if problem else row, problem


def _check_size(program: exported.Program, px: int) -> None:
  if px != program.image_size:
    raise ValueError(
      f'the program takes images of {program.image_size} px, not {px}; export '
      f'it with --image_size={px}'
    )


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


def _read(args: argparse.Namespace) -> Network:
  """Reads weights, or a program that agrees with the flags."""
  if not args.weights.endswith(exported.STABLEHLO):
    return read_weights(args.weights, args.model, '--weights')
  for flag in ('features', 'precision'):
    if getattr(args, flag) is not None:
      raise ValueError(
        f'--{flag} needs the weights; a program has fixed precision and outputs'
      )
  program = exported.read(args.weights, '--weights')
  if args.model not in (None, program.name):
    raise ValueError(f'{args.weights} is of {program.name}, not {args.model}')
  _check_size(program, args.image_size or program.image_size)
  return program


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  parser = argparse.ArgumentParser(
    prog='python -m nfnets_jax.predict',
    description=(__doc__ or '').split('\n')[0],
  )
  parser.add_argument(
    'images', nargs='+', metavar='IMAGE', help='photographs, or folders of them'
  )
  parser.add_argument('--model', help='the variant; default: of the weights')
  parser.add_argument(
    '--weights',
    required=True,
    help='a file (.npz, .safetensors, .stablehlo), the folder of a run, '
    '"released" or "hf-hub:OWNER/NAME" to download them, or "random" to try',
  )
  parser.add_argument(
    '--image_size',
    type=int,
    help='default: of the run that the weights are of, or the test size',
  )
  parser.add_argument(
    '--crop',
    help=f'default: of the run that the weights are of, or {metadata.CROP}',
  )
  parser.add_argument(
    '--batch', type=int, default=8, help='images per forward pass'
  )
  parser.add_argument(
    '--precision', choices=inference.PRECISIONS, help='default: float32'
  )
  parser.add_argument(
    '--top', type=int, default=5, help='number of classes to print'
  )
  parser.add_argument(
    '--classes',
    metavar='FILE',
    help='with one class name per line; default: those of the run',
  )
  parser.add_argument(
    '--features',
    metavar='FILE.npz',
    help='also write the pooled features [N, C] and the names of the files',
  )
  parser.add_argument(
    '--json', action='store_true', help='print one JSON object per photograph'
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
      inference.read_names(args.classes)
    features = None
    if args.features is not None:
      features = _check_features(args.features)
    files = find_images(args.images)
    net_weights = _read(args)
    names = class_names(
      net_weights.num_classes, args.classes, net_weights.class_names
    )
    px, crop = evaluation_of(net_weights)
    px, crop = args.image_size or px, args.crop or crop
    print(
      f'{net_weights.name}, {net_weights.num_classes} classes; images of '
      f'{px} px, crop {crop}',
      file=sys.stderr,
    )
    results = _outputs(
      files,
      net_weights,
      px,
      crop,
      min(args.batch, len(files)),
      args.precision or 'float32',
    )
    if features is not None:
      results = _recorded(results, features)
    failed = _print(results, names, args.top, args.json)
  except (ImportError, OSError, ValueError) as error:
    sys.exit(f'error: {error}')
  if failed:
    sys.exit(f'{failed} of {len(files)} files could not be decoded')


def _check_features(name: str) -> pathlib.Path:
  path = paths.local(name, '--features')
  if path.suffix != '.npz':
    raise ValueError(f'--features={name} must end in .npz')
  if path.exists():
    raise FileExistsError(
      f'--features: {path} already exists; choose another name'
    )
  return path


def _recorded(
  results: Iterator[Outputs], path: pathlib.Path
) -> Iterator[Outputs]:
  """Yields the results, and writes the features of decoded files at the end."""
  names, pools = [], []
  for file, outputs, problem in results:
    if outputs is not None:
      names.append(image_files.printable(file))
      pools.append(outputs['pool'])
    yield file, outputs, problem
  with writing.new_file(path) as partial, partial.open('wb') as target:
    np.savez(target, pool=np.array(pools), file_name=np.array(names))


def _print(
  results: Iterator[Outputs],
  names: Sequence[str],
  top: int,
  as_json: bool,
) -> int:
  """Prints the results; returns the number of files that failed."""
  failed = 0
  for file, outputs, problem in results:
    best: list[dict[str, Any]] = []
    if outputs is not None:
      probabilities = outputs['probabilities']
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
