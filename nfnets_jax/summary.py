"""Prints what networks cost: parameters, arithmetic, memory of a training step.

    python -m nfnets_jax.summary
    python -m nfnets_jax.summary nfnet_f1 --batch=64 --remat=block --memory=80

The second prints the network's modules besides. Nothing is computed: the
networks and their training steps are only traced, with the paper's optimiser
and 1000 classes. The memory is the estimate of
`training/memory.py`, which says what it was checked against. Kernels are chosen
by the backend, so it is that of the backend on which it is traced.
"""

import argparse
import math
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

from nfnets_jax import devices, models
from nfnets_jax.models import cost, published, variants
from nfnets_jax.training import memory
from nfnets_jax.training import optimizer as optimizers

_DEFAULT = tuple(f'nfnet_f{n}' for n in range(7))
_NUM_CLASSES = 1000
_MIB = 2**20


class Summary(NamedTuple):
  """What a network costs.

  Attributes:
    name: of the variant.
    train_size: side of the training images in pixels.
    test_size: side of the test images in pixels.
    params: number of parameters.
    train_macs: multiply-accumulates of a forward pass of one training image.
    test_macs: the same for one test image.
    need: memory of a training step.
  """

  name: str
  train_size: int
  test_size: int
  params: int
  train_macs: int
  test_macs: int
  need: memory.MemoryEstimate


def count(name: str, image_size: int) -> tuple[int, int]:
  """Counts a network's parameters and its arithmetic for one image.

  Args:
    name: a variant.
    image_size: side of the image in pixels.

  Returns:
    The number of parameters, and of multiply-accumulates of a forward pass.

  Raises:
    ValueError: if there is no such variant.

  Example:
    >>> params, macs = count('nfnet_tiny', image_size=32)
    >>> params < macs
    True
  """

  def forward(images: jax.Array) -> dict[str, jax.Array]:
    return models.create(name, _NUM_CLASSES)(images, is_training=False)

  # `jit`, so that it is traced once for both.
  init = jax.jit(hk.transform_with_state(forward).init)
  key = jax.eval_shape(lambda: jax.random.key(0))
  image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  params, _ = jax.eval_shape(init, key, image)
  macs = models.count_macs(init, key, image)
  return hk.data_structures.tree_size(params), macs


def summarize(
  name: str,
  image_size: int | None = None,
  compute_dtype: str = 'bfloat16',
  remat: str | None = None,
) -> Summary:
  """Traces a network and its training step.

  Args:
    name: a variant.
    image_size: side of the training images in pixels; the variant's if None.
    compute_dtype: 'bfloat16' or 'float32'.
    remat: what the backward pass computes again: 'block', 'stage', or None.

  Returns:
    The summary, for 1000 classes.

  Raises:
    ValueError: if there is no such variant, or `remat` is unknown.
  """
  variant = variants.get(name)
  train_size = variant.train_size if image_size is None else image_size
  config = _config(train_size, compute_dtype)

  def forward(images: jax.Array, is_training: bool) -> dict[str, jax.Array]:
    return models.create(name, _NUM_CLASSES, remat=remat)(images, is_training)

  need = memory.estimate(
    hk.transform_with_state(forward),
    optimizers.create_optimizer(config.optimizer, lambda step: 0.0),
    config,
    _NUM_CLASSES,
  )
  params, test_macs = count(name, variant.test_size)
  _, train_macs = count(name, train_size)
  return Summary(
    name, train_size, variant.test_size, params, train_macs, test_macs, need
  )


def _config(image_size: int, compute_dtype: str) -> config_dict.ConfigDict:
  """The paper's values of what the memory of a step depends on."""
  return config_dict.ConfigDict(
    {
      'data': {'image_size': image_size},
      'optimizer': {
        'name': 'sgd',
        'momentum': 0.9,
        'weight_decay': 2e-5,
        'clip': 'agc',
        'clipping': 0.01,
        'clip_eps': 1e-3,
        'unclipped': r'^[^/]+/~/linear/w$',
        'skip_nonfinite': 0,
        'learning_rate_groups': None,
        'sam_rho': None,
        'sam_fraction': 0.2,
      },
      'label_smoothing': 0.1,
      'compute_dtype': compute_dtype,
    }
  )


def state_bytes(need: memory.MemoryEstimate) -> int:
  """Returns the bytes that do not depend on the batch.

  Args:
    need: of the training step.

  Returns:
    The sum of parameters, gradients, optimiser's state, moving average and the
    network's state.
  """
  return need.total(share=0, micro_batches=1)


def main(argv: Sequence[str] | None = None) -> None:
  """Prints a table with a row for each variant named on the command line.

  Args:
    argv: the command line without the program; that of the process by default.
  """
  parser = argparse.ArgumentParser(
    prog='python -m nfnets_jax.summary',
    description='Prints what networks cost; only traces them.',
  )
  parser.add_argument(
    'names',
    nargs='*',
    metavar='NAME',
    help='a variant, such as nfnet_f1; of one alone, the modules are shown '
    'as well (default: nfnet_f0 to nfnet_f6)',
  )
  parser.add_argument(
    '--image_size',
    type=int,
    help="side of the training images in pixels (default: the variant's)",
  )
  parser.add_argument(
    '--batch',
    type=int,
    default=32,
    help='images on each device in a step (default: 32)',
  )
  parser.add_argument(
    '--compute_dtype',
    choices=('bfloat16', 'float32'),
    default='bfloat16',
    help='precision of the pass (default: bfloat16)',
  )
  parser.add_argument(
    '--remat',
    choices=('block', 'stage'),
    help='what the backward pass computes again (default: nothing)',
  )
  parser.add_argument(
    '--memory',
    type=float,
    help='GiB of a device: also prints how many micro-batches it takes',
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
  """Raises a ValueError for what cannot be, before anything is traced."""
  for name in args.names:
    variants.get(name)
  if args.image_size is not None and args.image_size < 1:
    raise ValueError(f'--image_size is {args.image_size}; give 1 or more')
  if args.batch < 1:
    raise ValueError(f'--batch is {args.batch}; give 1 or more')
  if args.memory is not None and not 0 < args.memory < math.inf:
    raise ValueError(
      f'--memory is {args.memory:g}; give the GiB of a device, more than 0'
    )


def _print_modules(args: argparse.Namespace) -> None:
  """Prints a row for each module of the network, and the totals."""
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

  print(f'{name}, {size} px: modules, forwards\n')
  show('module', 'output', 'params', 'MMACs', 'output MiB')
  show('', 'of an image', '', 'an image', 'of a batch')
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
    print('no size of it is published\n')
    return
  parts = []
  if reported.params is not None:
    parts.append(f'{reported.params:g} M parameters')
  if reported.macs is not None:
    parts.append(f'{reported.macs:g} GMACs at {variant.test_size} px')
  print(f'published: {", ".join(parts)}\n')


def _print_table(args: argparse.Namespace) -> None:
  again = f', remat {args.remat}' if args.remat else ''
  print(
    f'{args.batch} images a device, {args.compute_dtype}{again}, '
    f'{_NUM_CLASSES} classes; estimated for {jax.default_backend()}\n'
  )
  parts = ('micro-', 'batches') if args.memory else ('', '')
  for line in (
    ('', 'train', 'test', 'params', 'train', 'test', 'state', 'MiB an', 'step'),
    ('variant', 'px', 'px', 'M', 'GMACs', 'GMACs', 'GiB', 'image', 'GiB'),
  ):
    _print_row(*line, parts[line[0] == 'variant'])
  remarks = []
  for name in args.names or _DEFAULT:
    summary = summarize(name, args.image_size, args.compute_dtype, args.remat)
    need, chosen = summary.need, ''
    if args.memory:
      try:
        device = round(args.memory * memory.GIB)
        chosen = str(memory.choose_micro_batches(args.batch, need, device))
      except ValueError as error:
        chosen = 'none'
        remarks.append(f'{name}: {error}')
    _print_row(
      name,
      str(summary.train_size),
      str(summary.test_size),
      f'{summary.params / 1e6:.2f}',
      f'{summary.train_macs / 1e9:.2f}',
      f'{summary.test_macs / 1e9:.2f}',
      f'{state_bytes(need) / memory.GIB:.2f}',
      f'{need.activations / _MIB:.1f}',
      f'{need.total(args.batch, 1) / memory.GIB:.2f}',
      chosen,
    )
  print(
    '\nGMACs: multiply-accumulates of one image, forwards, 10⁹; state: '
    'parameters,\ngradients, momentum and average; MiB an image: activations; '
    'step: all that a\nstep needs with the whole batch at once'
  )
  for remark in remarks:
    print(remark)


def _print_row(name: str, *cells: str) -> None:
  widths = (6, 5, 8, 8, 8, 7, 8, 7, 8)
  row = ''.join(f'{x:>{n}}' for x, n in zip(cells, widths, strict=True))
  # At once, since the next may take ten seconds.
  print(f'{name:13}{row}'.rstrip(), flush=True)


if __name__ == '__main__':
  main()
