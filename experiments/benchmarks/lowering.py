r"""Times tracing and lowering of a config's training step.

  python -m experiments.benchmarks.lowering \
    --config=experiments/nfnet_imagenet.py:F6

Nothing is compiled or run: this is Python's part of starting a run, and the
size of the program for the compiler. It uses one thread, so on a busy machine
compare CPU seconds.
"""

import functools
import itertools
import os
import pathlib
import time
from typing import NamedTuple

import jax
import optax
from absl import app, flags
from ml_collections import config_dict

from experiments.benchmarks.step import NUM_CLASSES
from nfnets_jax import command_line, devices
from nfnets_jax.runtime import parallel
from nfnets_jax.training import build, programs
from nfnets_jax.training import train_step as steps

_CONFIG = command_line.define_config(
  str(pathlib.Path(__file__).parents[1] / 'nfnet_imagenet.py:F0')
)
_BATCH = flags.DEFINE_integer('batch', 32, 'Per-device batch size.')
_MICRO_BATCHES = flags.DEFINE_integer('micro_batches', 1, 'Micro-batches.')


class Lowering(NamedTuple):
  """The cost of lowering a training step.

  Attributes:
    shapes: wall and CPU seconds for the shapes of the initial state.
    trace: wall and CPU seconds from Python to a jaxpr.
    lower: wall and CPU seconds from the jaxpr to StableHLO.
    size: bytes of the StableHLO text.
  """

  shapes: tuple[float, float]
  trace: tuple[float, float]
  lower: tuple[float, float]
  size: int


def measure(
  config: config_dict.ConfigDict, batch: int, micro_batches: int = 1
) -> Lowering:
  """Traces and lowers the training step for a per-device batch."""
  config = config.copy_and_resolve_references()
  count = jax.local_device_count()
  config.batch_size = batch * count
  net = build.create_net(config, NUM_CLASSES)
  schedule = optax.constant_schedule(0.1)
  optimizer = build.create_optimizer(config, schedule)
  step = build.create_train_step(
    config, net, NUM_CLASSES, lambda _: schedule, micro_batches
  )
  mapped = parallel.parallel_train_step(functools.partial(step, hyperparams={}))
  times = [_now()]
  state = steps.state_shapes(net, optimizer, config.data.image_size)
  times.append(_now())
  # Lowering the mapped step itself would not separate the trace.
  traced = jax.jit(mapped).trace(state, programs.batch_shapes(config, count))
  times.append(_now())
  lowered = traced.lower()
  times.append(_now())
  shapes, trace, lower = (
    (after[0] - before[0], after[1] - before[1])
    for before, after in itertools.pairwise(times)
  )
  return Lowering(shapes, trace, lower, len(lowered.as_text().encode()))


def _now() -> tuple[float, float]:
  return time.perf_counter(), time.process_time()


def main(argv: list[str]) -> None:
  del argv
  devices.start_or_exit()
  config = _CONFIG.value
  result = measure(config, _BATCH.value, _MICRO_BATCHES.value)
  load = os.getloadavg()[0]
  print(
    f'{config.model.name}, {config.data.image_size} px, per-device batch '
    f'{_BATCH.value} in {_MICRO_BATCHES.value} micro-batch(es), remat '
    f'{config.remat}, {config.compute_dtype}, jax {jax.__version__} for '
    f'{jax.default_backend()}; {os.cpu_count()} cores, load {load:.1f}\n'
    f'{"seconds":20}{"wall":>8}{"CPU":>8}'
  )
  for what, (wall, cpu) in (
    ('shapes of the state', result.shapes),
    ('trace of the step', result.trace),
    ('lowering', result.lower),
  ):
    print(f'{what:20}{wall:8.1f}{cpu:8.1f}')
  print(f'StableHLO text: {result.size / 1e6:.1f} MB')


if __name__ == '__main__':
  app.run(main, flags_parser=command_line.parse_flags)
