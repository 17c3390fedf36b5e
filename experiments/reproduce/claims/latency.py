"""NFNets train faster than EfficientNets of the same accuracy.

Source: Brock et al. 2021, figure 1 and table 3.
Varied: the net.
Method: the paper's. The training loop's step, with the update and the sum of
  gradients over the devices, in bfloat16 on 32 images a device, which are there
  already; in micro-batches where 32 do not fit. Median of 5,000 steps. Beside
  it, forward and backward pass alone on one device, and without a device the
  estimates of the compilers for v3:4x4 and H100.
Scales:
  small  two images, float32, forward and backward pass alone, as the update of
         F1's 130 million parameters would take longer; three rounds, each in
         alternation with F1's, so that a machine whose speed drifts does not
         bias their ratio
  gpu    the paper's method, but 100 steps
  paper  the paper's method; ARGS=--latency_steps=N for other than 5,000
Command: make reproduce-latency SCALE=small
  make compile-table ARGS=--latency WORKDIR=experiments/reproduce/cells
At small: see ../small_scale.py and its rule, ../preregistered.
"""

import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any

from experiments.benchmarks import programs as programs_lib
from experiments.benchmarks import timing
from experiments.reproduce import claim, cost, paper, results, step_latency
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
# Of the compilers' estimates; the most important cells first.
TOPOLOGIES = (cost.TOPOLOGY, 'h100')
COMPILED = tuple(
  dict.fromkeys(
    [
      *('resnet50', 'senet50', 'nf_resnet50'),
      *(f'nfnet_f{n}' for n in range(4)),
      *(f'efficientnet_b{n}' for n in (0, 3, 5, 7)),
      *(f'nf_resnet{layers}' for layers in (101, 152, 200)),
      *MODELS,
    ]
  )
)
STEPS = {'gpu': 100, 'paper': 5000}
_BATCH = {'small': 2, 'gpu': 32, 'paper': 32}
_ROUNDS = 3
# At `small` a net that has run for this long is done after two rounds.
_ENOUGH_SECONDS = 20.0

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
  steps: int | None = None,
) -> None:
  """Counts and times the nets without a result.

  Args:
    output: folder of the results.
    scale: one of `scales.SCALES`.
    models: variants.
    image_size: in pixels; None is each net's training size.
    steps: number of timed steps, except at `small`; None is that of `STEPS`.
  """
  made = results.read(output)
  missing = [
    model for model in models if _is_missing(made.get(name_of(scale, model)))
  ]
  missing.sort(key=lambda model: model != REFERENCE)  # first
  if scale == 'small':
    _execute_small(output, missing, image_size)
    return
  for i, model in enumerate(missing, start=1):
    print(f'latency: {model}, net {i} of {len(missing)}', flush=True)
    began = time.monotonic()
    result = _counts(scale, model, image_size) | step_latency.measure(
      model, _BATCH[scale], steps or STEPS[scale], image_size
    )
    if 'step_seconds' in result:
      reference = result
      if model != REFERENCE:
        found = results.read(output)
        reference = found.get(name_of(scale, REFERENCE), {})
      if 'step_seconds' in reference:
        median = statistics.median(reference['step_seconds'])
        result['ratios'] = [x / median for x in result['step_seconds']]
    result['seconds'] = round(time.monotonic() - began, 1)
    results.append(output / 'results.jsonl', result)


def _execute_small(
  output: pathlib.Path, missing: list[str], image_size: int | None
) -> None:
  """Times forward and backward passes in alternation with the reference."""
  reference: programs_lib.Program | None = None
  # Compiling uses less than two cores.
  for start in range(0, len(missing), 2):
    pair = missing[start : start + 2]
    print(
      f'latency: {" and ".join(pair)}, nets {start + 1} to '
      f'{start + len(pair)} of {len(missing)}',
      flush=True,
    )
    began = time.monotonic()
    with futures.ThreadPoolExecutor() as pool:
      programs = list(pool.map(lambda model: _program(model, image_size), pair))
    if reference is None:
      reference = (
        programs[pair.index(REFERENCE)]
        if REFERENCE in pair
        else _program(REFERENCE, image_size)
      )
      if _fits(reference):
        reference.run()  # warms up
    shared = (time.monotonic() - began) / len(pair)
    for model in pair:
      began = time.monotonic()
      program = programs.pop(0)
      result = _measured(model, program, reference, image_size)
      seconds = shared + time.monotonic() - began
      result['seconds'] = round(seconds, 1)
      results.append(output / 'results.jsonl', result)
    del program  # and its parameters
    host_memory.give_back_freed_memory()


def _is_missing(result: Mapping[str, Any] | None) -> bool:
  """Also if it was too large for a machine with less memory."""
  limit = devices.memory()
  return result is None or result.get('too_large_for', limit) < limit


def _counts(scale: str, model: str, image_size: int | None) -> dict[str, Any]:
  """Returns what is known of a net without timing it."""
  variant = variants.get(model)
  params, macs = summary.count(model, variant.test_size)
  return {
    'name': name_of(scale, model),
    'labels': {'model': model, 'batch': _BATCH[scale]},
    'params': params,
    'gmacs_test': macs / 1e9,
    'size': image_size or variant.train_size,
    'status': 'finished',
  }


def _measured(
  model: str,
  program: programs_lib.Program,
  reference: programs_lib.Program,
  image_size: int | None,
) -> dict[str, Any]:
  """Returns a net's result without `seconds`, at `small`."""
  result = _counts('small', model, image_size) | {
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
  result |= _time_both(program.run, reference.run, _ROUNDS)
  print(
    f'  {model}: {statistics.median(result["step_seconds"]):.2f} s, '
    f'{statistics.median(result["ratios"]):.2f} of {REFERENCE}',
    flush=True,
  )
  return result


def _fits(program: programs_lib.Program) -> bool:
  return program.memory <= fit.USABLE * devices.memory()


def _program(model: str, image_size: int | None) -> programs_lib.Program:
  size = image_size or variants.get(model).train_size
  config = programs_lib.recipe(model, 'float32')
  batch = _BATCH['small']
  return programs_lib.programs(config, batch, size, ['gradient'])['gradient']


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
