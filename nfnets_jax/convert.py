r"""Converts weights: the authors' form, this package's, timm's, StableHLO.

    python -m nfnets_jax.convert F0_haiku.npz f0.safetensors --to=timm
    python -m nfnets_jax.convert dm_nfnet_f0.safetensors f0.npz
    python -m nfnets_jax.convert runs/digits digits.safetensors
    python -m nfnets_jax.convert F0_haiku.npz f0.stablehlo --batch=8

The source is a file, the folder of a run, whose moving average is taken, or
'released' with a --model. A StableHLO file maps uint8 photographs
`[B, px, px, 3]` to logits; jax runs it without this package:

    forward = jax.export.deserialize(open('f0.stablehlo', 'rb').read())
    logits = forward.call(images)
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.export
import numpy as np

from nfnets_jax import devices, predict, weights
from nfnets_jax.models import variants

_STABLEHLO = '.stablehlo'


def export(
  path: pathlib.Path,
  net_weights: weights.Weights,
  *,
  image_size: int | None = None,
  batch_size: int | None = None,
  precision: str = 'float32',
) -> None:
  """Writes a network with its weights, folded, as a StableHLO program.

  It is for the kind of device that jax uses here, for which the forms of the
  convolutions are chosen.

  Args:
    path: of the new file.
    net_weights: as of `weights.read`.
    image_size: side of the photographs in pixels; None is the test size.
    batch_size: photographs in a call; None is any number.
    precision: 'float32' or 'bfloat16'.

  Raises:
    FileExistsError: if there is such a file.
  """
  if path.exists():
    raise FileExistsError(f'{path} is there; give another name')
  px = image_size or variants.get(net_weights.name).test_size
  size = str(batch_size) if batch_size else 'b'
  shape = jax.export.symbolic_shape(f'{size}, {px}, {px}, 3')
  forward = jax.jit(predict.create_forward(net_weights, precision))
  program = jax.export.export(forward)(jax.ShapeDtypeStruct(shape, np.uint8))
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('xb') as file:
    file.write(program.serialize())


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command.

  Args:
    argv: arguments; None takes those of the process.
  """
  text = __doc__ or ''
  parser = argparse.ArgumentParser(
    prog='python -m nfnets_jax.convert',
    description=text,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('source', metavar='SRC')
  parser.add_argument('target', metavar='DST', type=pathlib.Path)
  parser.add_argument('--model', help='the variant; default: of the weights')
  parser.add_argument(
    '--to',
    choices=weights.FORMS,
    default='haiku',
    help='the form of .npz and .safetensors',
  )
  parser.add_argument(
    '--folded',
    action='store_true',
    help='standardise the weights once: plain convolutions, without gains',
  )
  parser.add_argument('--image_size', type=int, help='of a .stablehlo')
  parser.add_argument('--batch', type=int, help='of a .stablehlo; default: any')
  parser.add_argument(
    '--precision', choices=predict.PRECISIONS, default='float32'
  )
  args = parser.parse_args(argv)
  devices.start_or_exit()
  try:
    found = predict.read_weights(args.source, args.model)
    if args.target.suffix == _STABLEHLO:
      export(
        args.target,
        found,
        image_size=args.image_size,
        batch_size=args.batch,
        precision=args.precision,
      )
    else:
      weights.write(args.target, found, args.to, args.folded)
  except (OSError, ValueError) as error:
    sys.exit(f'error: {error}')
  count = sum(x.size for v in found.params.values() for x in v.values())
  print(
    f'{args.target}: {found.name}, {found.num_classes} classes, '
    f'{count:,} parameters, {args.target.stat().st_size / 1e6:,.1f} MB'
  )


if __name__ == '__main__':
  main()
