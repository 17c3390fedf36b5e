r"""Converts weights between the authors' form, ours, timm's and StableHLO.

    python -m nfnets_jax.convert F0_haiku.npz f0.safetensors --to=timm
    python -m nfnets_jax.convert dm_nfnet_f0.safetensors f0.npz
    python -m nfnets_jax.convert runs/digits digits.safetensors
    python -m nfnets_jax.convert F0_haiku.npz f0.stablehlo --batch=8

The source is a file, the folder of a run (its moving average is used), or
'released' with a --model. The target ends in .npz, .safetensors or .stablehlo.
The image size, crop and class names of a run are stored in .npz and
.safetensors, but not in the authors' form, which holds only parameters.

A StableHLO file maps uint8 photographs `[B, px, px, 3]` to logits. jax and
flatbuffers run it without this package, on CPU, GPU and TPU:

    forward = jax.export.deserialize(open('f0.stablehlo', 'rb').read())
    logits = forward.call(images)
"""

import argparse
import io
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.export
import numpy as np

from nfnets_jax import devices, paths, predict, weights
from nfnets_jax.weights import files

_STABLEHLO = '.stablehlo'
# Platforms of an exported program, by jax's names.
PLATFORMS = ('cpu', 'cuda', 'tpu')
_ENDINGS = ('.npz', '.safetensors', _STABLEHLO)


def export(
  path: pathlib.Path,
  net_weights: weights.Weights,
  *,
  image_size: int | None = None,
  batch_size: int | None = None,
  precision: str = 'float32',
) -> None:
  """Writes a network with its folded weights as a StableHLO program.

  One file supports all `PLATFORMS`, with the convolution form that suits each.

  Args:
    path: the new file.
    net_weights: as returned by `weights.read`.
    image_size: side of the photographs in pixels, by default that of
      `predict.evaluation_of`.
    batch_size: photographs per call; None allows any number.
    precision: 'float32' or 'bfloat16'.

  Raises:
    FileExistsError: if the file exists.
  """
  if path.exists():
    raise FileExistsError(f'{path} already exists; choose another name')
  px = image_size or predict.evaluation_of(net_weights)[0]
  size = str(batch_size) if batch_size else 'b'
  shape = jax.export.symbolic_shape(f'{size}, {px}, {px}, 3')
  forward = jax.jit(predict.create_forward(net_weights, precision))
  program = jax.export.export(forward, platforms=PLATFORMS)(
    jax.ShapeDtypeStruct(shape, np.uint8)
  )
  with files.new_file(path) as partial:
    partial.write_bytes(program.serialize())


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  text = __doc__ or ''
  parser = argparse.ArgumentParser(
    prog='python -m nfnets_jax.convert',
    description=text,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('source', metavar='SRC')
  parser.add_argument('target', metavar='DST')
  parser.add_argument('--model', help='the variant; default: of the weights')
  parser.add_argument(
    '--to',
    choices=weights.FORMS,
    help='the form of .npz and .safetensors (default: haiku)',
  )
  parser.add_argument(
    '--folded',
    action='store_true',
    help='standardise the weights once: plain convolutions, without gains',
  )
  parser.add_argument(
    '--image_size',
    type=int,
    help='of a .stablehlo; default: of the run that the weights are of, or the '
    'test size',
  )
  parser.add_argument('--batch', type=int, help='of a .stablehlo; default: any')
  parser.add_argument(
    '--precision',
    choices=predict.PRECISIONS,
    help='of a .stablehlo (default: float32)',
  )
  args = parser.parse_args(argv)
  if isinstance(sys.stdout, io.TextIOWrapper):
    # File names may have characters that the terminal lacks.
    sys.stdout.reconfigure(errors='backslashreplace')
  devices.start_or_exit()
  try:
    # Checked before weights are read or initialised, which is slow.
    target = _check_target(args)
    net_weights = predict.read_weights(args.source, args.model, 'SRC')
    if target.suffix == _STABLEHLO:
      export(
        target,
        net_weights,
        image_size=args.image_size,
        batch_size=args.batch,
        precision=args.precision or 'float32',
      )
    else:
      weights.write(target, net_weights, args.to or 'haiku', args.folded)
  except (OSError, ValueError) as error:
    sys.exit(f'error: {error}')
  count = sum(x.size for v in net_weights.params.values() for x in v.values())
  print(
    f'{target}: {net_weights.name}, {net_weights.num_classes} classes, '
    f'{count:,} parameters, {target.stat().st_size / 1e6:,.1f} MB'
    + _notes(args, net_weights, target)
  )


def _check_target(args: argparse.Namespace) -> pathlib.Path:
  """Returns the target path after checking it against the flags."""
  target = paths.expand(args.target, 'DST')
  if target.suffix not in _ENDINGS:
    raise ValueError(
      f'{target}: the name must end in {", ".join(_ENDINGS[:-1])} or '
      f'{_STABLEHLO}, which say what is written'
    )
  for flag in ('batch', 'image_size'):
    value = getattr(args, flag)
    if value is not None and value < 1:
      raise ValueError(f'--{flag} must be at least 1, got {value}')
  exported = target.suffix == _STABLEHLO
  flags = ('to', 'folded') if exported else ('batch', 'image_size', 'precision')
  for flag in flags:
    if getattr(args, flag):
      raise ValueError(f'--{flag} has no effect on a {target.suffix}; omit it')
  if not exported:
    return files.check_target(target, args.to or 'haiku', 'DST')
  if target.exists():
    raise FileExistsError(f'{target} already exists; choose another name')
  return target


def _notes(
  args: argparse.Namespace, net_weights: weights.Weights, target: pathlib.Path
) -> str:
  """Returns further notes about the file."""
  px, crop = predict.evaluation_of(net_weights)
  if target.suffix == _STABLEHLO:
    return (
      f'; for {", ".join(PLATFORMS)}; images of '
      f'{args.image_size or px} px, crop {crop}'
    )
  known = (net_weights.image_size, net_weights.crop, net_weights.class_names)
  if args.to == 'released' and known != (None, None, None):
    return (
      '; this form does not hold names of classes, image size and crop: give '
      f'--classes, --image_size={px} and --crop={crop} to predict'
    )
  return ''


if __name__ == '__main__':
  main()
