"""Prints parameters, MACs and training memory of networks.

    python -m nfnets_jax.summary
    python -m nfnets_jax.summary nfnet_f1 --batch=64 --remat=block --compile

A single network is printed by module. `--compile` adds the compiler's estimate
of the memory of a training step on the local devices, with the paper's
optimizer and 1000 classes; otherwise networks are only traced.
`python -m nfnets_jax.compile` gives more details, also for other devices.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

from nfnets_jax import extras

# ruff: noqa: E402
extras.need('train', 'haiku', 'ml_collections')

import haiku as hk
import jax
import jax.numpy as jnp
from ml_collections import config_dict

from nfnets_jax import devices, models, topologies
from nfnets_jax.data import imagenet
from nfnets_jax.models import cost, published, variants
from nfnets_jax.training import config as configs
from nfnets_jax.training import estimates, fit

_DEFAULT = tuple(f'nfnet_f{n}' for n in range(7))
_NUM_CLASSES = 1000
_EPOCH_STEPS = imagenet.SPLITS['train'] / 4096
_MIB = 2**20


class Summary(NamedTuple):
  """The cost of a network.

  Sizes are the sides of images in pixels; `params` counts parameters, and MACs
  are multiply-accumulates of a forward pass of one image.
  """

  name: str
  train_size: int
  test_size: int
  params: int
  train_macs: int
  test_macs: int


def count(name: str, image_size: int) -> tuple[int, int]:
  """Counts the parameters, and the MACs of a forward pass of one image.

  Raises:
    ValueError: if the variant does not exist.

  Example:
    >>> params, macs = count('nfnet_tiny', image_size=32)
    >>> params < macs
    True
  """

  def forward(images: jax.Array) -> dict[str, jax.Array]:
    return models.create(name, _NUM_CLASSES)(images, is_training=False)

  # `jit` caches the trace, which both counts use.
  init = jax.jit(hk.transform_with_state(forward).init)
  key = jax.eval_shape(lambda: jax.random.key(0))
  image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  params, _ = jax.eval_shape(init, key, image)
  macs = models.count_macs(init, key, image)
  return hk.data_structures.tree_size(params), macs


def summarize(name: str, image_size: int | None = None) -> Summary:
  """Counts the parameters and MACs of a network with 1000 classes.

  `image_size` is the side of training images, by default the variant's.

  Raises:
    ValueError: if the variant does not exist.
  """
  variant = variants.get(name)
  train_size = variant.train_size if image_size is None else image_size
  params, test_macs = count(name, variant.test_size)
  _, train_macs = count(name, train_size)
  return Summary(
    name, train_size, variant.test_size, params, train_macs, test_macs
  )


def compiled_need(
  name: str,
  batch: int,
  image_size: int | None = None,
  compute_dtype: str = 'bfloat16',
  remat: str | None = None,
) -> fit.Need:
  """Returns the compiler's memory estimate of a training step, per device.

  Args:
    name: a variant.
    batch: per-device batch size, on the local devices.
    image_size: side of training images in pixels, by default the variant's.
    compute_dtype: 'bfloat16' or 'float32'.
    remat: granularity of rematerialisation: 'block', 'stage', or None.

  Raises:
    ValueError: if the variant does not exist, or compilation fails.
  """
  topology = topologies.get('local')
  size = image_size or variants.get(name).train_size
  config = _config(name, size, batch * len(topology.devices))
  config.compute_dtype, config.remat = compute_dtype, remat
  training = estimates.fit_training(
    config, topology, None, _NUM_CLASSES, epoch_steps=_EPOCH_STEPS
  )
  return fit.need(training.compiled)


def _config(
  name: str, image_size: int, batch_size: int
) -> config_dict.ConfigDict:
  """Returns the paper's config with another network."""
  config = configs.get_config()
  config.model = configs.model(name)
  config.batch_size, config.micro_batches = batch_size, 1
  config.data.image_size = image_size
  config.data.eval_image_size = variants.get(name).test_size
  config.augment.rand_augment = variants.get(name).rand_augment
  return config


def main(argv: Sequence[str] | None = None) -> None:
  """Prints a table with a row for each variant named on the command line."""
  parser = argparse.ArgumentParser(
    prog='python -m nfnets_jax.summary',
    description='Prints parameters, MACs and training memory of networks.',
  )
  parser.add_argument(
    'names',
    nargs='*',
    metavar='NAME',
    help='variants, such as nfnet_f1; a single one is printed by module '
    '(default: nfnet_f0 to nfnet_f6)',
  )
  parser.add_argument(
    '--image_size',
    type=int,
    help="training image size in pixels (default: the variant's)",
  )
  parser.add_argument(
    '--batch',
    type=int,
    default=32,
    help='per-device batch size (default: 32)',
  )
  parser.add_argument(
    '--compute_dtype',
    choices=('bfloat16', 'float32'),
    default='bfloat16',
    help='dtype of activations (default: bfloat16)',
  )
  parser.add_argument(
    '--remat',
    choices=('block', 'stage'),
    help='granularity of rematerialisation (default: none)',
  )
  parser.add_argument(
    '--compile',
    action='store_true',
    help='compile the training step and print its memory',
  )
  args = parser.parse_args(argv)
  try:
    _check(args)
    devices.start()
    if len(args.names) == 1:
      _print_modules(args)
    _print_table(args)
  except ValueError as error:
    sys.exit(f'error: {error}')


def _check(args: argparse.Namespace) -> None:
  """Raises a ValueError for invalid arguments."""
  for name in args.names:
    variants.get(name)
  if args.image_size is not None and args.image_size < 1:
    raise ValueError(f'--image_size is {args.image_size}; give 1 or more')
  if args.batch < 1:
    raise ValueError(f'--batch is {args.batch}; give 1 or more')


def _print_modules(args: argparse.Namespace) -> None:
  """Prints the cost of each module, and the totals."""
  (name,) = args.names
  variant = variants.get(name)
  size = args.image_size or variant.train_size
  images = jax.ShapeDtypeStruct(
    (args.batch, size, size, 3), jnp.dtype(args.compute_dtype)
  )
  costs = cost.module_costs(lambda: models.create(name, _NUM_CLASSES), images)

  def show(*cells: str) -> None:
    first, shape, *numbers = cells
    print(f'{first:24}{shape:18}' + ''.join(f'{x:>12}' for x in numbers))

  print(f'{name}, {size} px: modules, forward pass\n')
  show('module', 'output', 'params', 'MMACs', 'output MiB')
  show('', 'per image', '', 'per image', 'per batch')
  for row in costs:
    show(
      row.name,
      '×'.join(map(str, row.out_shape[1:])),
      f'{row.params:,}',
      f'{row.macs / args.batch / 1e6:,.1f}',
      f'{row.out_bytes / _MIB:,.1f}',
    )
  show(
    'total',
    '',
    f'{sum(row.params for row in costs):,}',
    f'{sum(row.macs for row in costs) / args.batch / 1e6:,.1f}',
    f'{sum(row.out_bytes for row in costs) / _MIB:,.1f}',
  )
  reported = published.SIZES.get(name)
  if reported is None:
    print('published: none\n')
    return
  parts = []
  if reported.params is not None:
    parts.append(f'{reported.params:g} M parameters')
  if reported.macs is not None:
    parts.append(f'{reported.macs:g} GMACs at {variant.test_size} px')
  print(f'published: {", ".join(parts)}\n')


def _print_table(args: argparse.Namespace) -> None:
  columns = [
    ('train', 'px'),
    ('test', 'px'),
    ('params', 'M'),
    ('train', 'GMACs'),
    ('test', 'GMACs'),
  ]
  if args.compile:
    remat = f', remat {args.remat}' if args.remat else ''
    print(
      f'per-device batch {args.batch}, {args.compute_dtype}{remat}, '
      f'compiled for {jax.devices()[0].device_kind}\n'
    )
    columns += [('state', 'GiB'), ('temp.', 'GiB'), ('total', 'GiB')]
  for title, line in (('', 0), ('variant', 1)):
    _print_row(title, *(column[line] for column in columns))
  for name in args.names or _DEFAULT:
    summary = summarize(name, args.image_size)
    cells = [
      str(summary.train_size),
      str(summary.test_size),
      f'{summary.params / 1e6:.2f}',
      f'{summary.train_macs / 1e9:.2f}',
      f'{summary.test_macs / 1e9:.2f}',
    ]
    if args.compile:
      need = compiled_need(
        name, args.batch, args.image_size, args.compute_dtype, args.remat
      )
      cells += [
        f'{x / fit.GIB:.2f}'
        for x in (need.arguments, need.temporaries, need.total)
      ]
    _print_row(name, *cells)
  print('\nGMACs: multiply-accumulates of a forward pass of one image in 10⁹')
  if args.compile:
    print(
      'state: parameters, momentum, EMA and the batch; temp.: temporaries, as '
      'of\nactivations and gradients; total: with the outputs'
    )


def _print_row(name: str, *cells: str) -> None:
  widths = (6, 5, 8, 8, 8, 7, 8, 7)
  row = ''.join(f'{x:>{n}}' for x, n in zip(cells, widths, strict=False))
  # Flushed, since the next row takes seconds, or minutes to compile.
  print(f'{name:13}{row}'.rstrip(), flush=True)


if __name__ == '__main__':
  main()
