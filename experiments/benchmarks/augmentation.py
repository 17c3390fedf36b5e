r"""Says what share of a training step mixing, RandAugment and normalising take.

  python -m experiments.benchmarks.augmentation
  python -m experiments.benchmarks.augmentation --measure

By default an estimate, made anywhere in a minute: the time of each part is the
larger of its arithmetic at the device's peak and its bytes at the bandwidth of
the memory. For the step only convolutions and matrix products count, forwards
and backwards, as if all else were free and the matrix units always at their
full speed: real steps take longer (the paper's F1 158.5 ms on TPUv3), so the
share is too large rather than too small. For the augmentation it is what XLA
counts once it has fused the elementwise work, on the vector units in float32.
Gathers and scatters are hard to judge: they count once as bytes that follow one
another, and once as a memory transaction of 32 bytes for each place that they
touch.

On an accelerator, and with `--measure` on a CPU too, both then run in turn: the
augmentation of one device's batch on the first device, and a step of all
devices with such a batch each. The share is taken round by round. All batches
lie on the devices before.
"""

import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jax.extend import core
from ml_collections import config_dict

from nfnets_jax import command_line, devices, paths
from nfnets_jax.models import cost
from nfnets_jax.training import optimizer as optimizers
from nfnets_jax.training import parallel, train
from nfnets_jax.training import train_step as steps

_CONFIG = command_line.define_config(
  str(pathlib.Path(__file__).parents[1] / 'nfnet_imagenet.py:F1')
)
_BATCH = flags.DEFINE_integer('batch', 32, 'Images of a step on one device.')
_MEASURE = flags.DEFINE_bool(
  'measure',
  False,
  'Time both on a CPU too; on an accelerator it is always done.',
)
_REPEATS = flags.DEFINE_integer('repeats', 10, 'Timed rounds.')
_OUTPUT = flags.DEFINE_string('output', None, 'A JSON file for the figures.')

_NUM_CLASSES = 1000
_SECTOR = 32  # bytes

# 10¹² operations a second of the matrix units in bfloat16 (V100: float16) and
# of the vector units in float32, 10⁹ bytes a second. The vector unit of a TPUv3
# core is taken to make two operations in each of 1,024 lanes at 0.94 GHz.
DEVICES = {
  'TPUv3 core': (61.5, 1.9, 450),
  'V100': (125, 15.7, 900),
  'A100 40 GB': (312, 19.5, 1555),
  'H100 SXM': (989, 67, 3350),
}


def raw_batch(config: config_dict.ConfigDict) -> dict[str, jax.Array]:
  """Returns raw images and labels for one step on one device."""
  count, px = (
    _BATCH.value * config.augment.raw_per_image,
    config.data.image_size,
  )
  shape = (count, px, px, 3)
  images = jax.random.randint(jax.random.key(0), shape, 0, 256, jnp.int32)
  labels = jnp.arange(count, dtype=jnp.int32) % _NUM_CLASSES
  return {'image': images.astype(jnp.uint8), 'label': labels}


def augment(batch: dict[str, jax.Array], config: config_dict.ConfigDict) -> Any:
  """Augments a batch as the training step does; takes the `augment` part."""
  first_image = jnp.zeros((), jnp.int32)
  return steps.augment_batch(
    jax.random.key(1), batch, first_image, config, _NUM_CLASSES
  )


def augment_cost(config: config_dict.ConfigDict) -> tuple[float, float, float]:
  """Counts operations, bytes and irregular accesses of one augmentation."""
  batch = jax.eval_shape(lambda: raw_batch(config))

  def count(policy: str | None) -> list[float]:
    changed = config_dict.ConfigDict({**config.augment, 'rand_augment': policy})
    traced = jax.jit(lambda batch: augment(batch, changed)).trace(batch)
    found = traced.lower().compile().cost_analysis()
    places = irregular_accesses(traced.jaxpr.jaxpr)
    return [found['flops'], found['bytes accessed'], places]

  none = count(None)
  if config.augment.rand_augment is None:
    return none[0], none[1], none[2]
  # XLA counts the body of a loop once, so the layers are multiplied here.
  layers, _, magnitude = config.augment.rand_augment.partition('x')
  one = count(f'1x{magnitude}')
  flops, size, places = (
    a + int(layers) * (b - a) for a, b in zip(none, one, strict=True)
  )
  return flops, size, places


def irregular_accesses(jaxpr: core.Jaxpr) -> int:
  """Counts the places that gathers read and scatters write."""
  return sum(
    times * math.prod(eqn.invars[1].aval.shape[:-1])
    for eqn, times in equations(jaxpr, ('gather', 'scatter-add'))
  )


def product_bytes(jaxpr: core.Jaxpr) -> int:
  """Counts the bytes that convolutions and matrix products read and write."""
  return sum(
    times * x.aval.size * x.aval.dtype.itemsize
    for eqn, times in equations(jaxpr, ('conv_general_dilated', 'dot_general'))
    for x in (*eqn.invars, *eqn.outvars)
  )


def equations(
  jaxpr: core.Jaxpr, names: tuple[str, ...], times: int = 1
) -> Iterator[tuple[Any, int]]:
  """Yields the equations of these primitives, and how often each runs."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in names:
      yield eqn, times
    for inner in core.jaxprs_in_params(eqn.params):
      yield from equations(inner, names, times * eqn.params.get('length', 1))


def create_step(
  config: config_dict.ConfigDict,
) -> tuple[Callable, hk.TransformedWithState, optax.GradientTransformation]:
  """Returns the training step, its net and its optimizer."""
  net = train.create_net(config, _NUM_CLASSES)
  schedule = optax.constant_schedule(0.0)
  optimizer = optimizers.create_optimizer(config.optimizer, schedule)
  step = steps.create_train_step(
    net, optimizer, schedule, config, _NUM_CLASSES, parallel.AXIS
  )
  return parallel.parallel_train_step(step), net, optimizer


def shares_of_devices(batch: steps.Batch) -> steps.Batch:
  """Puts the same share of a batch on each device, as the step takes it."""
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()), (parallel.AXIS,))
  sharding = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(parallel.AXIS)
  )
  copies = jax.tree.map(lambda x: np.stack([x] * jax.device_count()), batch)
  return jax.device_put(copies, sharding)


def estimate(config: config_dict.ConfigDict) -> dict[str, Any]:
  """Prints the estimate for each device."""
  flops, size, places = augment_cost(config)
  step, net, optimizer = create_step(config)
  batch = jax.eval_shape(lambda: raw_batch(config))
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), batch
  )
  state = steps.state_shapes(net, optimizer, config.data.image_size)
  step_flops = 2 * cost.count_macs(step, state, batch)
  step_bytes = product_bytes(jax.make_jaxpr(step)(state, batch).jaxpr)
  print(
    f'step: {step_flops / 1e9:,.0f} GFLOP, {step_bytes / 1e9:.1f} GB\n'
    f'augmentation: {flops / 1e9:.2f} GFLOP, {size / 1e9:.2f} GB, '
    f'{places / 1e6:.0f} M places of gathers and scatters'
  )
  print(f'{"estimate":13}{"step ms":>9}{"augment ms":>17}{"share %":>13}')
  shares = {}
  for name, (matrix, vector, bandwidth) in DEVICES.items():
    whole = max(step_flops / matrix / 1e9, step_bytes / bandwidth / 1e6)
    low, high = (
      max(flops / vector / 1e9, x / bandwidth / 1e6)
      for x in (size, size + _SECTOR * places)
    )
    shares[name] = [100 * low / whole, 100 * high / whole]
    print(
      f'{name:13}{whole:9.2f}{low:8.2f} to {high:5.2f}'
      f'{shares[name][0]:6.1f} to {shares[name][1]:3.1f}'
    )
  return {
    'step_flops': step_flops,
    'step_bytes': step_bytes,
    'augment_flops': flops,
    'augment_bytes': size,
    'augment_irregular_accesses': places,
    'estimated_share_percent': shares,
  }


def measure(config: config_dict.ConfigDict) -> dict[str, Any]:
  """Times the augmentation and the whole step in turn."""
  batch = raw_batch(config)
  augment_alone = jax.jit(lambda batch: augment(batch, config.augment))
  step, net, optimizer = create_step(config)
  state = parallel.replicate(
    steps.init_state(net, optimizer, config.seed, config.data.image_size)
  )
  shared = shares_of_devices(batch)
  seconds: dict[str, list[float]] = {'augment': [], 'step': []}
  for repeat in range(_REPEATS.value + 1):
    began = time.perf_counter()
    jax.block_until_ready(augment_alone(batch))
    between = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, shared))
    if repeat:  # the first compiles
      seconds['augment'].append(between - began)
      seconds['step'].append(time.perf_counter() - between)
  shares = [
    100 * a / b
    for a, b in zip(seconds['augment'], seconds['step'], strict=True)
  ]
  for name, values in seconds.items():
    print(f'{name:8}{1000 * statistics.median(values):10.2f} ms')
  print(
    f'measured share: {statistics.median(shares):.1f} % ({min(shares):.1f} to '
    f'{max(shares):.1f})'
  )
  return {'seconds': seconds, 'measured_share_percent': shares}


def main(argv: list[str]) -> None:
  """Prints the table."""
  del argv
  devices.start_or_exit()
  config = _CONFIG.value
  kind = jax.devices()[0].device_kind
  print(
    f'{config.model.name}, {config.data.image_size} px, RandAugment '
    f'{config.augment.rand_augment}, {_BATCH.value} images a device, jax '
    f'{jax.__version__} on {kind}'
  )
  results = {'device': kind, 'batch': _BATCH.value, **estimate(config)}
  if _MEASURE.value or jax.default_backend() != 'cpu':
    results |= measure(config)
  if _OUTPUT.value:
    paths.expand(_OUTPUT.value, '--output').write_text(
      json.dumps(results, indent=2) + '\n'
    )


if __name__ == '__main__':
  app.run(main, flags_parser=command_line.parse_flags)
