r"""Times tracing and lowering of a variant's whole training step.

  python -m experiments.benchmarks.lowering \
    --config=experiments/nfnet_imagenet.py:F6

Nothing is compiled and nothing runs, so any machine will do for any variant:
this is the part of the start of a run that Python takes, and the size of what
it hands to the compiler. On a machine that does other work as well the seconds
of the CPU tell more than those of the clock; it is one thread that works.
"""

import functools
import itertools
import json
import os
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import app, flags
from ml_collections import config_dict

from nfnets_jax import command_line, devices, paths
from nfnets_jax.runtime import parallel
from nfnets_jax.training import build
from nfnets_jax.training import train_step as steps

_CONFIG = command_line.define_config(
  str(pathlib.Path(__file__).parents[1] / 'nfnet_imagenet.py:F0')
)
_BATCH = flags.DEFINE_integer('batch', 32, 'Images of a step on one device.')
_MICRO_BATCHES = flags.DEFINE_integer(
  'micro_batches', 1, 'Parts that they are computed in.'
)
_OUTPUT = flags.DEFINE_string('output', None, 'A JSON file for the figures.')

_NUM_CLASSES = 1000


class Lowering(NamedTuple):
  """What it took to make a program of a training step.

  Attributes:
    shapes: of the initial state: seconds of the clock and of the CPU.
    trace: from Python to a jaxpr, the same.
    lower: from there to StableHLO, the same.
    size: bytes of its text.
  """

  shapes: tuple[float, float]
  trace: tuple[float, float]
  lower: tuple[float, float]
  size: int


def measure(
  config: config_dict.ConfigDict, batch: int, micro_batches: int = 1
) -> Lowering:
  """Traces and lowers the training step of a config.

  Args:
    config: of a run.
    batch: images of a step on one device.
    micro_batches: parts that they are computed in.

  Returns:
    The times, and the size of the result.
  """
  net = build.create_net(config, _NUM_CLASSES)
  schedule = optax.constant_schedule(0.1)
  optimizer = build.create_optimizer(config, schedule)
  step = parallel.parallel_train_step(
    functools.partial(
      build.create_train_step(
        config, net, _NUM_CLASSES, lambda _: schedule, micro_batches
      ),
      hyperparams={},
    )
  )
  px = config.data.image_size
  shape = (jax.local_device_count(), batch)
  shares = {
    'image': jax.ShapeDtypeStruct((*shape, px, px, 3), jnp.uint8),
    'label': jax.ShapeDtypeStruct(shape, jnp.int32),
    'mix_label': jax.ShapeDtypeStruct(shape, jnp.int32),
    'ratio': jax.ShapeDtypeStruct(shape, jnp.float32),
  }
  times = [_now()]
  state = steps.state_shapes(net, optimizer, px)
  times.append(_now())
  # The mapped step lowers by itself, but does not say when it is traced.
  traced = jax.jit(step).trace(state, shares)
  times.append(_now())
  lowered = traced.lower()
  times.append(_now())
  size = len(lowered.as_text().encode())
  shapes, trace, lower = (
    (after[0] - before[0], after[1] - before[1])
    for before, after in itertools.pairwise(times)
  )
  return Lowering(shapes, trace, lower, size)


def _now() -> tuple[float, float]:
  return time.perf_counter(), time.process_time()


def main(argv: list[str]) -> None:
  """Prints the figures."""
  del argv
  devices.start_or_exit()
  config = _CONFIG.value
  figures = measure(config, _BATCH.value, _MICRO_BATCHES.value)
  load = os.getloadavg()[0]
  print(
    f'{config.model.name}, {config.data.image_size} px, {_BATCH.value} images '
    f'a device in {_MICRO_BATCHES.value} part(s), remat {config.remat}, '
    f'{config.compute_dtype}, jax {jax.__version__} for '
    f'{jax.default_backend()}; {os.cpu_count()} cores, load {load:.1f}\n'
    f'{"seconds":20}{"clock":>8}{"CPU":>8}'
  )
  for what, (clock, cpu) in (
    ('shapes of the state', figures.shapes),
    ('trace of the step', figures.trace),
    ('lowering', figures.lower),
  ):
    print(f'{what:20}{clock:8.1f}{cpu:8.1f}')
  print(f'StableHLO text: {figures.size / 1e6:.1f} MB')
  if _OUTPUT.value:
    text = json.dumps({**figures._asdict(), 'load': load}, indent=2)
    paths.expand(_OUTPUT.value, '--output').write_text(f'{text}\n')


if __name__ == '__main__':
  app.run(main, flags_parser=command_line.parse_flags)
