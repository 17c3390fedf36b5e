"""NFNets train faster than EfficientNets of the same accuracy.

Source: Brock et al. 2021, figure 1 and table 3: the latency of a training step
  on TPUv3 and V100, with 32 images per device.
Varied: the net. Each forward and backward pass is timed in alternation with
  NFNet-F1's, so that a machine whose speed drifts does not bias their ratio.
Scales:
  small  two images, float32, three rounds
  gpu    32 images, bfloat16, 20 rounds; `paper` likewise
Command: make reproduce-latency SCALE=small
At small: see ../small_scale.py and its rule, ../preregistered.
"""

import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any

import jax

from experiments.benchmarks import programs as programs_lib
from experiments.benchmarks import timing
from experiments.reproduce import claim, paper, results
from nfnets_jax import devices, summary
from nfnets_jax.models import variants
from nfnets_jax.training import fit, host_memory

REFERENCE = 'nfnet_f1'
MODELS = (
  'resnet50',
  'senet50',
  *(f'nfnet_f{n}' for n in range(6)),
  *(f'efficientnet_b{n}' for n in range(8)),
)
_BATCH = {'small': 2, 'gpu': 32, 'paper': 32}
_ROUNDS = {'small': 3, 'gpu': 20, 'paper': 20}
# A net that has run for this long is done after two rounds.
_ENOUGH_SECONDS = 20.0
_PRECISION = {'small': 'float32', 'gpu': 'bfloat16', 'paper': 'bfloat16'}

TEXT = (
  'NFNets train faster than EfficientNets of the same accuracy: F1 is 8.7 '
  'times as fast as B7.'
)
SOURCE = 'table 3 and figure 1; the ratio in the table is 8.81'


def name_of(scale: str, model: str) -> str:
  """Returns the name of a net's result."""
  return f'{scale}/latency/{model}'


def published_ratio(model: str) -> float | None:
  """Returns the paper's latency of a net over that of F1, on TPUv3."""
  if model not in paper.LATENCY:
    return None
  return paper.LATENCY[model].tpu_ms / paper.LATENCY[REFERENCE].tpu_ms


def statements(scale: str, found: results.Results) -> list[claim.Statement]:
  """Returns what the latencies are judged by."""

  def ratio(model: str) -> float | None:
    ratios = found.get(name_of(scale, model), {}).get('ratios')
    return statistics.median(ratios) if ratios else None

  def faster(net: str, peer: str, times: float = 1.0) -> bool | None:
    ours, theirs = ratio(net), ratio(peer)
    return None if ours is None or theirs is None else theirs >= times * ours

  return [
    claim.Statement(
      'NFNets are faster than the EfficientNet of their accuracy.',
      {
        'F0 and B5': faster('nfnet_f0', 'efficientnet_b5'),
        'F1 and B7': faster('nfnet_f1', 'efficientnet_b7'),
      },
    ),
    claim.Statement(
      'F1 is at least 8.7 times as fast as B7.',
      {'': faster('nfnet_f1', 'efficientnet_b7', 8.7)},
    ),
  ]


def execute(
  output: pathlib.Path,
  scale: str,
  models: tuple[str, ...] = MODELS,
  image_size: int | None = None,
) -> None:
  """Counts and times the nets without a result.

  Args:
    output: folder of the results.
    scale: one of `scales.SCALES`.
    models: variants.
    image_size: in pixels; None is each net's training size.
  """
  made = results.read(output)
  missing = [
    model for model in models if _is_missing(made.get(name_of(scale, model)))
  ]
  missing.sort(key=lambda model: model != REFERENCE)  # first
  reference: programs_lib.Program | None = None
  # Compiling uses less than two cores; on an accelerator, where the compiler
  # times programs, one net at a time.
  at_a_time = 2 if jax.default_backend() == 'cpu' else 1
  for start in range(0, len(missing), at_a_time):
    pair = missing[start : start + at_a_time]
    print(
      f'latency: {" and ".join(pair)}, nets {start + 1} to '
      f'{start + len(pair)} of {len(missing)}',
      flush=True,
    )
    began = time.monotonic()
    with futures.ThreadPoolExecutor() as pool:
      programs = list(
        pool.map(lambda model: _program(model, scale, image_size), pair)
      )
    if reference is None:
      reference = (
        programs[pair.index(REFERENCE)]
        if REFERENCE in pair
        else _program(REFERENCE, scale, image_size)
      )
      if _fits(reference):
        reference.run()  # warms up
    shared = (time.monotonic() - began) / len(pair)
    for model in pair:
      began = time.monotonic()
      program = programs.pop(0)
      result = _measured(model, program, reference, scale, image_size)
      seconds = shared + time.monotonic() - began
      result['seconds'] = round(seconds, 1)
      results.append(output / 'results.jsonl', result)
    del program  # and its parameters
    host_memory.give_back_freed_memory()


def _is_missing(result: Mapping[str, Any] | None) -> bool:
  """Also if it was too large for a machine with less memory."""
  limit = devices.memory()
  return result is None or result.get('too_large_for', limit) < limit


def _measured(
  model: str,
  program: programs_lib.Program,
  reference: programs_lib.Program,
  scale: str,
  image_size: int | None,
) -> dict[str, Any]:
  """Returns a net's result without `seconds`."""
  variant = variants.get(model)
  params, macs = summary.count(model, variant.test_size)
  result: dict[str, Any] = {
    'name': name_of(scale, model),
    'labels': {'model': model, 'batch': _BATCH[scale]},
    'params': params,
    'gmacs_test': macs / 1e9,
    'size': image_size or variant.train_size,
    'status': 'finished',
    'compile_seconds': round(program.compile_seconds, 1),
    'memory': program.memory,
  }
  for name, each in ((model, program), (REFERENCE, reference)):
    if not _fits(each):
      limit = devices.memory()
      message = f'{name} needs {each.memory / 1e9:.0f} GB of {limit / 1e9:.0f}'
      return result | {
        'status': 'too large',
        'message': message,
        'too_large_for': limit,
      }
  result |= _time_both(program.run, reference.run, _ROUNDS[scale])
  print(
    f'  {model}: {statistics.median(result["step_seconds"]):.2f} s, '
    f'{statistics.median(result["ratios"]):.2f} of {REFERENCE}',
    flush=True,
  )
  return result


def _fits(program: programs_lib.Program) -> bool:
  return program.memory <= fit.USABLE * devices.memory()


def _program(
  model: str, scale: str, image_size: int | None
) -> programs_lib.Program:
  size = image_size or variants.get(model).train_size
  config = programs_lib.recipe(model, _PRECISION[scale])
  made = programs_lib.programs(config, _BATCH[scale], size, ['gradient'])
  return made['gradient']


def _time_both(
  run: Callable[[], Any], reference: Callable[[], Any], rounds: int
) -> dict[str, list[float]]:
  seconds, ratios = [], []
  run()  # warms up
  for _ in range(rounds):
    seconds.append(timing.seconds(run))
    ratios.append(seconds[-1] / timing.seconds(reference))
    if len(seconds) > 1 and sum(seconds) > _ENOUGH_SECONDS:
      break
  return {'step_seconds': seconds, 'ratios': ratios}
