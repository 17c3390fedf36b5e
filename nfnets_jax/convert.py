r"""Converts weights, and exports programs and model cards.

    python -m nfnets_jax.convert F0_haiku.npz f0.safetensors --to=timm
    python -m nfnets_jax.convert dm_nfnet_f0.safetensors f0.npz
    python -m nfnets_jax.convert hf-hub:timm/dm_nfnet_f0.dm_in1k f0.npz
    python -m nfnets_jax.convert runs/digits digits.safetensors
    python -m nfnets_jax.convert F0_haiku.npz f0.stablehlo --batch=8
    python -m nfnets_jax.convert F0_haiku.npz f0.onnx --batch=8
    python -m nfnets_jax.convert runs/mine upload --to=hub --license=apache-2.0

The source is a file, the folder of a run (its moving average is used),
'released' with a --model, or 'hf-hub:OWNER/NAME[@REVISION]'. The target ends in
.npz, .safetensors, .stablehlo or .onnx, or is a folder for --to=hub. Model,
image size, crop and class names are kept: in .npz and .safetensors, and in JSON
beside programs and the authors' form.

A StableHLO file maps uint8 photographs `[B, px, px, 3]` to logits. jax and
flatbuffers run it without this package, on CPU, GPU and TPU:

    forward = jax.export.deserialize(open('f0.stablehlo', 'rb').read())
    logits = forward.call(images)
"""

import argparse
import dataclasses
import io
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from nfnets_jax import extras

# ruff: noqa: E402
extras.need('train', 'haiku')

from nfnets_jax import devices, exported, inference, paths, weights
from nfnets_jax.runtime import workdir as workdirs
from nfnets_jax.weights import card, metadata, recognize, writing

_ENDINGS = ('.npz', '.safetensors', *exported.SUFFIXES)
# Flags that only some targets have.
_PROGRAM_FLAGS = ('batch', 'image_size', 'precision')
_WEIGHT_FLAGS = ('to', 'folded')


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
    choices=[*weights.FORMS, 'hub'],
    help='the form of .npz and .safetensors (default: haiku), or a folder to '
    'upload to the Hugging Face hub',
  )
  parser.add_argument(
    '--folded',
    action='store_true',
    help='standardise the weights once: plain convolutions, without gains',
  )
  parser.add_argument(
    '--image_size',
    type=int,
    help='of a program; default: of the run that the weights are of, or the '
    'test size',
  )
  parser.add_argument(
    '--batch', type=int, help='of a program; default: any, and 1 for .onnx'
  )
  parser.add_argument(
    '--precision',
    choices=inference.PRECISIONS,
    help='of a program (default: float32)',
  )
  parser.add_argument(
    '--license', help='of the weights on the hub, such as apache-2.0'
  )
  args = parser.parse_args(argv)
  if isinstance(sys.stdout, io.TextIOWrapper):
    # File names may have characters that the terminal lacks.
    sys.stdout.reconfigure(errors='backslashreplace')
  devices.start_or_exit()
  try:
    # Checked first, since it is slow to read or initialise weights.
    target = _check_target(args)
    net_weights = inference.read_weights(args.source, args.model, 'SRC')
    px, crop = metadata.evaluation_of(net_weights)
    if args.to == 'hub':
      described = dataclasses.replace(net_weights, image_size=px, crop=crop)
      card.write(target, described, args.license, **_facts_of_run(args.source))
    elif target.suffix in exported.SUFFIXES:
      exported.write(
        target,
        net_weights,
        image_size=args.image_size,
        batch_size=args.batch,
        precision=args.precision or 'float32',
      )
    else:
      weights.write(target, net_weights, args.to or 'haiku', args.folded)
  except (ImportError, OSError, ValueError) as error:
    sys.exit(f'error: {error}')
  count = sum(x.size for v in net_weights.params.values() for x in v.values())
  files = list(target.iterdir()) if target.is_dir() else [target]
  print(
    f'{target}: {net_weights.name}, {net_weights.num_classes} classes, '
    f'{count:,} parameters, {sum(x.stat().st_size for x in files) / 1e6:,.1f} '
    f'MB; images of {args.image_size or px} px, crop {crop}'
  )


def _check_target(args: argparse.Namespace) -> pathlib.Path:
  """Returns the target path after checking it against the flags."""
  target = paths.local(args.target, 'DST')
  to_hub = args.to == 'hub'
  if not to_hub and target.suffix not in _ENDINGS:
    raise ValueError(
      f'{target}: the name must end in {", ".join(_ENDINGS[:-1])} or '
      f'{_ENDINGS[-1]}, which is the format; --to=hub writes a folder'
    )
  for flag in ('batch', 'image_size'):
    value = getattr(args, flag)
    if value is not None and value < 1:
      raise ValueError(f'--{flag} must be at least 1, got {value}')
  is_program = not to_hub and target.suffix in exported.SUFFIXES
  unused = _WEIGHT_FLAGS if is_program else _PROGRAM_FLAGS
  for flag in (*unused, *(() if to_hub else ('license',))):
    if getattr(args, flag):
      raise ValueError(
        f'--{flag} has no effect on a {target.suffix or "folder"}; omit it'
      )
  if to_hub:
    if not args.license:
      raise ValueError(
        '--to=hub needs the license of the weights, such as '
        '--license=apache-2.0; --license=other for any other'
      )
    if args.folded:
      raise ValueError('--folded weights cannot be read back; omit it')
    card.check_folder(target)
    return target
  if not is_program:
    return writing.check_target(target, args.to or 'haiku', 'DST')
  writing.check_new(target)
  if target.suffix == exported.ONNX:
    exported.check_onnx()
  return target


def _facts_of_run(source: str) -> dict[str, Any]:
  """Returns the data set and report of a run, for the card."""
  run = paths.expand(source, 'SRC')
  if not run.is_dir() or not recognize.is_run(run):
    return {}
  facts: dict[str, Any] = {}
  if recorded := workdirs.read_config(run):
    facts['dataset'] = recorded['data'].get('name')
  if report := workdirs.read_report(run):
    facts['report'] = report
  return facts


if __name__ == '__main__':
  main()
