r"""Core-days of pre-training, of compiled steps and of the paper's table 5.

  make -s compile CONFIG=experiments/pretrain.py:nfnet_f4plus,imagenet2012 \
    TOPOLOGY=v3:8x8 ARGS='--json --noevaluation' > f4plus.json
  python -m experiments.benchmarks.core_days f4plus.json

reads estimates of `nfnets_jax.compile --json`, for any epochs and batch size,
and scales them to --images, by default those of JFT-300M. Collectives, input
and evaluation are not included. Devices are cores on TPU v2 and v3, chips on
later TPUs.

Source: Brock et al. 2021, table 5 and appendix A.5.
"""

import argparse
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from experiments.benchmarks import estimates
from experiments.figures import markdown
from nfnets_jax import command_line

# The paper's JFT-300M, and 32 images on each of 128 cores.
IMAGES = 300_000_000
_BATCH_SIZE, _CORES = 4096, 128
_DAY = 86_400


class Row(NamedTuple):
  """A row of table 5.

  Attributes:
    top_1: on ImageNet, in %.
    core_days: TPUv3-core-days; None if not given.
    epochs: epochs of pre-training, if the paper gives the time of a step.
    step_ms: milliseconds of a step.
  """

  top_1: float
  core_days: float | None
  epochs: float | None = None
  step_ms: float | None = None


TABLE_5: Mapping[str, Row] = {
  'nfnet_f4plus': Row(89.2, 1860, 20, 830),
  'nfnet_f4': Row(89.2, 3700, 40, 830),
  'EfficientNet-L2, Meta Pseudo Labels': Row(90.2, 22_500),
  'EfficientNet-L2, Noisy Student and SAM': Row(88.6, 12_300),
  'ViT-H/14': Row(88.55, 2500),
  'ViT-L/16': Row(87.76, 680),
  'BiT-L, ResNet152x4': Row(87.54, 9900),
  'ResNeXt-101 32x48d': Row(86.4, None),
}


def core_days(
  images: int, epochs: float, batch_size: int, seconds: float, devices: int
) -> float:
  """Returns the device-days of `epochs` of `images` in steps of `seconds`.

  Example:
    >>> round(core_days(IMAGES, 20, batch_size=4096, seconds=0.83, devices=128))
    1801
  """
  return images * epochs / batch_size * seconds * devices / _DAY


def table(results: Iterable[Mapping[str, Any]], images: int) -> str:
  """Formats estimates and the paper's rows as Markdown.

  Args:
    results: estimates.
    images: number of training images.
  """
  head = (
    *('net', 'by', 'top-1, %', 'devices', 'images a step', 'epochs'),
    *('step, ms', 'core-days'),
  )
  lines = []
  for x in results:
    seconds, devices = x['training']['seconds'], x['devices']
    days = core_days(images, x['epochs'], x['batch_size'], seconds, devices)
    lines.append(
      (
        f'{x["model"]}, {x["image_size"]} px',
        x['compiler'],
        '',
        f'{devices:,} of {x["topology"]}',
        f'{x["batch_size"]:,}',
        f'{x["epochs"]:g}',
        f'{1e3 * seconds:,.1f}',
        f'{days:,.0f}',
      )
    )
  for name, row in TABLE_5.items():
    title = (name, 'the paper', f'{row.top_1:g}')
    given = '' if row.core_days is None else f'{row.core_days:,.0f}'
    if row.epochs is None or row.step_ms is None:
      lines.append((*title, '', '', '', '', given))
      continue
    same = core_days(IMAGES, row.epochs, _BATCH_SIZE, row.step_ms / 1e3, _CORES)
    lines.append(
      (
        *title,
        f'{_CORES} of v3',
        f'{_BATCH_SIZE:,}',
        f'{row.epochs:g}',
        f'about {row.step_ms:g}',
        f'{given}; {same:,.0f} from its step',
      )
    )
  return markdown.table(head, lines)


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog='python -m experiments.benchmarks.core_days',
    description="Core-days of pre-training, and the paper's table 5.",
  )
  parser.add_argument(
    'files', nargs='*', help='output of nfnets_jax.compile --json'
  )
  parser.add_argument(
    '--images', type=int, default=IMAGES, help='training images (%(default)s)'
  )
  args = parser.parse_args(argv)
  if args.images < 1:
    parser.error(f'--images must be at least 1, got {args.images}')
  with command_line.telling():
    results = [estimates.read(x) for x in args.files]
  print(f'{args.images:,} images; the paper has {IMAGES:,}\n')
  print(table(results, args.images))


if __name__ == '__main__':
  main()
