"""What TPUs' and GPUs' compilers say of a net, ours beside the released form.

    python -m experiments.benchmarks.compiled --topology=v3:2x2 h100

The forward and the backward pass on one device of each topology, compiled
without the device. All figures are the compiler's estimates, and the same on
every machine. `make bench-compiled` installs the compilers.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from experiments.benchmarks import released
from nfnets_jax import command_line, hlo, models, paths, topologies
from nfnets_jax.models import variants
from nfnets_jax.training import figures, losses, train_step

_NUM_CLASSES = 1000
_FORMS = ('released', 'ours')
# Of the table: the figure, its heading and the unit that it is printed in.
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
    name: of the variant.
    topology: whose first device it is compiled for.
    form: 'ours', or 'released' for `released.formulation` with parameters that
      are cast to the dtype of the images, as the released code does.
    batch: images on the device.
    image_size: their side in pixels.
    compute_dtype: 'bfloat16' or 'float32'.

  Returns:
    The estimates, None where the compiler makes none: `seconds`, each operation
    at the larger of its arithmetic's and its memory's time, and
    `cycles_seconds`, by the cycles of all instructions; `bytes` of its cost
    analysis, and `traffic`, operands and results of all instructions;
    `temporaries`, in bytes; and the measured time of `compiling`, in seconds.
  """
  policy = train_step.create_policy(compute_dtype)

  def forward(images: jax.Array) -> dict[str, jax.Array]:
    return models.create(name, _NUM_CLASSES)(images, is_training=True)

  net = hk.transform_with_state(forward)

  def loss(params, state, key, images, labels):
    if form == 'released':
      params = policy.cast_to_compute(params)
    outputs, state = net.apply(params, state, key, images)
    targets = jax.nn.one_hot(labels, _NUM_CLASSES, dtype=jnp.float32)
    return jnp.mean(losses.cross_entropy(outputs['logits'], targets)), state

  def gradient(params, state, key, images, labels):
    key = jax.random.wrap_key_data(key)
    return jax.value_and_grad(loss, has_aux=True)(
      params, state, key, images, labels
    )

  shape = (batch, image_size, image_size, 3)
  params, state = jax.eval_shape(
    net.init, jax.random.key(0), jnp.zeros((1, *shape[1:]))
  )
  arguments = (
    params,
    state,
    jax.ShapeDtypeStruct((2,), jnp.uint32),
    jax.ShapeDtypeStruct(shape, policy.compute_dtype),
    jax.ShapeDtypeStruct((batch,), jnp.int32),
  )
  device = SingleDeviceSharding(topology.devices[0])
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), arguments
  )
  began = time.monotonic()
  with (
    released.formulation() if form == 'released' else contextlib.nullcontext()
  ):
    traced = jax.jit(gradient).trace(*arguments)
    lowered = traced.lower(lowering_platforms=(topology.platform,))
  compiled = lowered.compile(compiler_options=topology.options or None)
  compiling = time.monotonic() - began
  program = hlo.read(compiled.as_text())
  # A GPU's compiler makes no analysis of costs.
  costs: Any = compiled.cost_analysis() or {}
  clock = topology.kind and topology.kind.clock
  memory: Any = compiled.memory_analysis()
  return {
    'seconds': figures.optimal_seconds(costs),
    'cycles_seconds': program.cycles / clock if clock else None,
    'bytes': costs.get('bytes accessed'),
    'traffic': program.traffic,
    'temporaries': memory.temp_size_in_bytes,
    'compiling': compiling,
  }


def row(name: str, figures: dict[str, Any], ratio: bool = False) -> str:
  """Returns a line of the table."""
  cells = []
  for key, heading, unit in _COLUMNS:
    value = figures[key]
    if value is None:
      text = ''
    elif ratio:
      text = f'{value:.3f}'
    else:
      text = f'{value / unit:.2f}'
    cells.append(f'{text:>{len(heading) + 2}}')
  return f'{name:10}' + ''.join(cells)


def ratios(figures: dict[str, dict[str, Any]]) -> dict[str, float | None]:
  """Returns our figures divided by the released form's."""
  ours, peer = figures['ours'], figures['released']
  return {
    key: ours[key] / peer[key] if ours[key] and peer[key] else None
    for key, _, _ in _COLUMNS
  }


def main(argv: Sequence[str] | None = None) -> None:
  """Prints a table for each topology."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--name', default='nfnet_f0')
  parser.add_argument('--batch', type=int, default=32, help='on one device')
  parser.add_argument(
    '--image_size', type=int, help='in pixels; default: the training size'
  )
  parser.add_argument(
    '--dtype', default='bfloat16', choices=('bfloat16', 'float32')
  )
  parser.add_argument('--topology', nargs='+', default=['v3:2x2'])
  parser.add_argument('--output', help='a JSON file for the figures')
  args = parser.parse_args(argv)
  with command_line.telling():
    size = variants.get(args.name).train_size
    if args.image_size is not None:
      size = args.image_size
    for flag, value in (('batch', args.batch), ('image_size', size)):
      if value < 1:
        raise ValueError(f'--{flag} must be at least 1, got {value}')
    output = args.output and paths.expand(args.output, '--output')
    if output:
      paths.existing(output.parent, '--output', 'folder')
    results = {}
    for name in args.topology:
      topology = topologies.get(name)
      print(
        f'{args.name}, {args.batch} images of {size} px, {args.dtype}, one '
        f'device of {name}, jax {jax.__version__}: estimates\n'
        f'{"":10}' + ''.join(f'  {heading}' for _, heading, _ in _COLUMNS)
      )
      figures = {}
      for form in _FORMS:
        figures[form] = measure(
          args.name,
          topology,
          form=form,
          batch=args.batch,
          image_size=size,
          compute_dtype=args.dtype,
        )
        print(row(form, figures[form]), flush=True)
      print(row('ratio', ratios(figures), ratio=True) + '\n', flush=True)
      results[name] = figures
    if output:
      output.write_text(json.dumps(results, indent=2) + '\n')


if __name__ == '__main__':
  main()
