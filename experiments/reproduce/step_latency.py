"""Times a training step as in table 3 of the paper, on all local devices."""

import statistics
import time
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import programs as programs_lib
from experiments.benchmarks import step, timing
from nfnets_jax import devices, topologies
from nfnets_jax.data import imagenet
from nfnets_jax.models import variants
from nfnets_jax.runtime import parallel
from nfnets_jax.training import build, estimates, fit

_PASSES = 20  # forward and backward
_WARMUP = 2
# Their median and range are those of all steps.
_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


def measure(
  model: str, per_device: int, steps: int, image_size: int | None = None
) -> dict[str, Any]:
  """Times the steps of the training loop, and forward and backward alone.

  Args:
    model: a variant.
    per_device: images on each device.
    steps: number of timed steps, after two to warm up.
    image_size: in pixels; None is the training size.

  Returns:
    `devices`, `micro_batches`, `steps`, `compile_seconds`, `memory` in bytes a
    device, `step_seconds`, the quantiles 0, 0.05, 0.5, 0.95 and 1 of the steps,
    and `gradient_seconds` of 20 passes on one device, unless they do not fit.
    If the step does not fit, a `status`, `message` and `too_large_for` in bytes
    instead.
  """
  size = image_size or variants.get(model).train_size
  config = programs_lib.recipe(model, 'bfloat16')
  local = topologies.get('local')
  config.batch_size = per_device * len(local.devices)
  config.data.image_size = size
  try:
    fitted = _compile(config, local)
  except fit.TooLargeError as error:
    return {
      'status': 'too large',
      'message': error.reason,
      'too_large_for': devices.memory(),
    }
  result: dict[str, Any] = {
    'devices': len(local.devices),
    'micro_batches': fitted.parts,
    'steps': steps,
    'compile_seconds': round(fitted.seconds, 1),
    'memory': fitted.total,
    'step_seconds': _time_steps(config, fitted.compiled, steps),
  }
  passes = programs_lib.programs(config, per_device, size, ['gradient'])
  gradient = passes['gradient']
  if gradient.memory <= fit.USABLE * devices.memory():
    run = {'gradient': lambda: timing.seconds(gradient.run)}
    result['gradient_seconds'] = timing.in_turn(run, _PASSES)['gradient']
  print(
    f'  {model}: {statistics.median(result["step_seconds"]):.4f} s, median of '
    f'{steps} steps',
    flush=True,
  )
  return result


def _compile(config: Any, local: topologies.Topology) -> fit.Fitting:
  """Compiles the step in the fewest micro-batches that fit."""
  epoch_steps = imagenet.SPLITS['train'] / config.batch_size
  return estimates.fit_training(
    config, local, devices.memory(), step.NUM_CLASSES, epoch_steps
  )


def _time_steps(
  config: Any, compiled: jax.stages.Compiled, steps: int
) -> list[float]:
  """Returns quantiles of the times of steps on images that do not move."""
  made = step.create(config, config.batch_size, config.data.image_size)
  program = parallel.Program(compiled, build.initial_hyperparams(config))
  state = parallel.replicate(made.state)
  batch = parallel.shard(jax.tree.map(lambda x: x[0], made.batch))
  (_, shardings, *_), _ = compiled.input_shardings
  batch = jax.device_put(batch, shardings)
  seconds = []
  for number in range(-_WARMUP, steps):
    began = time.perf_counter()
    state, metrics = program(state, batch)
    jax.block_until_ready((state, metrics))
    if number >= 0:
      seconds.append(time.perf_counter() - began)
  return np.quantile(seconds, _QUANTILES).tolist()
