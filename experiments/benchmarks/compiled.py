"""Compares a net with its released form by estimates of TPU and GPU compilers.

    python -m experiments.benchmarks.compiled --topology=v3:2x2 h100

Compiles the forward and backward pass for one device of each topology. The
figures are estimates of the compiler, the same on every machine. `make
bench-compiled` installs the compilers.
"""

import argparse
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from experiments.benchmarks import released
from experiments.figures import markdown
from nfnets_jax import command_line, hlo, models, topologies
from nfnets_jax.models import variants
from nfnets_jax.training import figures, fit, losses, train_step

_NUM_CLASSES = 1000
# Figures with their headings and units.
_COLUMNS = (
  ('seconds', 'time, ms', 1e-3),
  ('cycles_seconds', 'cycles, ms', 1e-3),
  ('bytes', 'bytes, GB', 1e9),
  ('traffic', 'traffic, GB', 1e9),
  ('temporaries', 'temp., GiB', 2**30),
  ('compiling', 'compiled in, s', 1.0),
)


def measure(
  name: str,
  topology: topologies.Topology,
  *,
  form: str,
  batch: int,
  image_size: int,
  compute_dtype: str,
) -> dict[str, Any]:
  """Compiles the gradient of a net's mean loss for one device.

  Args:
    name: a variant.
    topology: the devices, of which the first is compiled for.
    form: 'ours', or 'released' for `released.formulation` with parameters cast
      to the dtype of the images, as in the released code.
    batch: number of images.
    image_size: side in pixels.
    compute_dtype: 'bfloat16' or 'float32'.

  Returns:
    Estimates, None where the compiler has none: `seconds`, with each operation
    at the larger of its compute and memory time, and `cycles_seconds`, from the
    cycles of all instructions; `bytes` of its cost analysis, and `traffic`,
    operands and results of all instructions; `temporaries` in bytes. Measured:
    `compiling` in seconds.
  """
  policy = train_step.create_policy(compute_dtype)
  net = hk.transform_with_state(
    lambda images: models.create(name, _NUM_CLASSES)(images, is_training=True)
  )

  def loss(params, state, key, images, labels):
    if form == 'released':
      params = policy.cast_to_compute(params)
    key = jax.random.wrap_key_data(key)
    outputs, state = net.apply(params, state, key, images)
    targets = jax.nn.one_hot(labels, _NUM_CLASSES, dtype=jnp.float32)
    return jnp.mean(losses.cross_entropy(outputs['logits'], targets)), state

  size = (image_size, image_size, 3)
  shapes = (
    *jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, *size))),
    jax.ShapeDtypeStruct((2,), jnp.uint32),
    jax.ShapeDtypeStruct((batch, *size), policy.compute_dtype),
    jax.ShapeDtypeStruct((batch,), jnp.int32),
  )
  device = SingleDeviceSharding(topology.devices[0])
  arguments = jax.tree.map(lambda x: x.update(sharding=device), shapes)
  gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
  began = time.monotonic()
  with (
    released.formulation() if form == 'released' else contextlib.nullcontext()
  ):
    lowered = gradient.trace(*arguments).lower(
      lowering_platforms=(topology.platform,)
    )
  compiled = lowered.compile(compiler_options=topology.options or None)
  seconds = time.monotonic() - began
  program = hlo.read(compiled.as_text())
  costs: Any = compiled.cost_analysis() or {}  # a GPU's compiler has none
  clock = topology.kind and topology.kind.clock
  return {
    'seconds': figures.optimal_seconds(costs),
    'cycles_seconds': program.cycles / clock if clock else None,
    'bytes': costs.get('bytes accessed'),
    'traffic': program.traffic,
    'temporaries': fit.need(compiled).temporaries,
    'compiling': seconds,
  }


def table(released: dict[str, Any], ours: dict[str, Any]) -> str:
  """Formats the figures of both forms, and our figures over the released."""
  rows: list[list[str]] = [['released'], ['ours'], ['ratio']]
  for key, _, unit in _COLUMNS:
    a, b = released[key], ours[key]
    for row, value in zip(rows, (a, b), strict=False):
      row.append('' if value is None else f'{value / unit:.2f}')
    rows[2].append(f'{b / a:.3f}' if a and b else '')
  return markdown.table(['', *(heading for _, heading, _ in _COLUMNS)], rows)


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog='python -m experiments.benchmarks.compiled',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--name', default='nfnet_f0', help='a variant')
  parser.add_argument('--batch', type=int, default=32, help='number of images')
  parser.add_argument(
    '--image_size', type=int, help="pixels (default: variant's training size)"
  )
  parser.add_argument(
    '--dtype', default='bfloat16', choices=('bfloat16', 'float32')
  )
  parser.add_argument('--topology', nargs='+', default=['v3:2x2'])
  args = parser.parse_args(argv)
  with command_line.telling():
    size = args.image_size
    if size is None:
      size = variants.get(args.name).train_size
    for flag, value in (('batch', args.batch), ('image_size', size)):
      if value < 1:
        raise ValueError(f'--{flag} must be at least 1, got {value}')
    for name in args.topology:
      topology = topologies.get(name)
      print(
        f'{args.name}, {args.batch} images of {size} px, {args.dtype}, one '
        f'device of {name}, jax {jax.__version__}: estimates\n',
        flush=True,
      )
      found = {
        form: measure(
          args.name,
          topology,
          form=form,
          batch=args.batch,
          image_size=size,
          compute_dtype=args.dtype,
        )
        for form in ('released', 'ours')
      }
      print(f'{table(**found)}\n', flush=True)


if __name__ == '__main__':
  main()
