"""Part 2: speed of training steps in JAX.

  python -m experiments.gpu.speed peak
  python -m experiments.gpu.speed nfnet_f0 32 ours released

A job compiles its programs, prints `ready`, and waits for a line on standard
input, so jobs compile side by side on the host, and measure alone on the
device. Steps are dispatched without waiting, as in training. Ours and the
released formulation alternate, and ratios are of neighbouring rounds.
"""

import argparse
import concurrent.futures
import contextlib
import statistics
import time

import jax

from experiments.benchmarks import peak, programs, released
from experiments.gpu import common, step
from nfnets_jax import devices
from nfnets_jax.models import variants
from nfnets_jax.training import fit

_ROUNDS = 5
# Minimum length of a round.
_SECONDS = 0.3
# Bytes per image to start the search for the largest batch from: temporaries
# of a step on an H100 by its compiler.
_BYTES = {'nfnet_f0': 44e6, 'nfnet_f1': 130e6}
# Fraction of device memory that a program may use.
_USABLE = 0.9


class Program:
  """A compiled training step.

  Attributes:
    form: 'ours' or 'released'.
    batch: number of images.
    compile_seconds: compile time, beside other jobs.
    memory: bytes of arguments, results and temporaries.
    temporaries: bytes of temporaries.
    rounds: seconds a step in each round.
  """

  def __init__(self, model: str, batch: int, size: int, form: str):
    """Traces and lowers it."""
    self.form, self.batch = form, batch
    config = step.recipe(model, 'bfloat16')
    context = (
      released.formulation if form == 'released' else contextlib.nullcontext
    )
    with context():
      run, self._state, self._batch = step.create(config, batch, size)
      self._lowered = run.lower(self._state, self._batch)
    self.rounds: list[float] = []
    self._count = 1

  def compile(self) -> None:
    """Compiles it; threads may compile several."""
    began = time.monotonic()
    self._compiled = self._lowered.compile()
    self.compile_seconds = time.monotonic() - began
    need = fit.need(self._compiled)
    self.temporaries, self.memory = need.temporaries, need.total

  def warm_up(self) -> None:
    """Runs it, and sets the number of steps a round."""
    self._time()
    self._time()
    self._count = max(1, round(_SECONDS / self._time()))

  def measure(self) -> None:
    """Times a round."""
    self.rounds.append(self._time())

  def _time(self) -> float:
    began = time.perf_counter()
    for _ in range(self._count):
      self._state, metrics = self._compiled(self._state, self._batch)
    jax.block_until_ready((self._state, metrics))
    return (time.perf_counter() - began) / self._count


def measure_peak() -> None:
  """Times large matrix products."""
  jax.block_until_ready(jax.numpy.ones(8))
  common.wait_for_turn()
  sizes = [256] if common.dry_run() else [8192, 16384]
  by_size = {size: peak.measure_tflops('bfloat16', size) for size in sizes}
  common.add(
    2,
    'peak',
    tflops=max(by_size.values()),
    by_size=by_size,
    device=jax.local_devices()[0].device_kind,
    jax=jax.__version__,
  )


def measure(model: str, batch: int | None, forms: list[str]) -> None:
  """Compiles and times the steps of a net.

  Args:
    model: a variant.
    batch: number of images; None is the largest power of two that fits.
    forms: some of 'ours' and 'released'.
  """
  size = 32 if common.dry_run() else variants.get(model).train_size
  if batch is None:
    compiled = _compile_largest(model, size, forms)
  else:
    compiled = _compile(model, batch, size, forms)
  about = {'model': model, 'image_size': size, 'largest': batch is None}
  for program in compiled:
    common.add(
      2,
      'compiled',
      **about,
      batch=program.batch,
      form=program.form,
      seconds=round(program.compile_seconds, 1),
      temporaries=program.temporaries,
      memory=program.memory,
    )
  macs = programs.count_macs(step.recipe(model, 'bfloat16'), size)
  common.wait_for_turn()
  for program in compiled:
    program.warm_up()
  for _ in range(_ROUNDS):
    for program in compiled:
      program.measure()
  stats = jax.local_devices()[0].memory_stats() or {}
  for program in compiled:
    seconds = statistics.median(program.rounds)
    common.add(
      2,
      'step',
      **about,
      batch=program.batch,
      form=program.form,
      seconds=seconds,
      rounds=program.rounds,
      images_per_second=program.batch / seconds,
      # Three passes of two operations each.
      tflops=6 * macs * program.batch / seconds / 1e12,
      memory=program.memory,
      peak_bytes_in_use=stats.get('peak_bytes_in_use'),
    )


def _compile(
  model: str, batch: int, size: int, forms: list[str]
) -> list[Program]:
  batch = 2 if common.dry_run() else batch
  # One at a time, as the formulation is global.
  lowered = [Program(model, batch, size, form) for form in forms]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(Program.compile, lowered))
  return lowered


def _compile_largest(model: str, size: int, forms: list[str]) -> list[Program]:
  batch = 64
  while 2 * batch * _BYTES[model] < _USABLE * devices.memory():
    batch *= 2
  while True:
    compiled = _compile(model, batch, size, forms)
    most = max(program.memory for program in compiled)
    if common.dry_run() or most < _USABLE * devices.memory():
      return compiled
    batch //= 2


def main(argv: list[str] | None = None) -> None:
  """Runs one job."""
  parser = argparse.ArgumentParser(description='Times training steps.')
  parser.add_argument('model', help="a variant, or 'peak'")
  parser.add_argument('batch', nargs='?', help="a number, or 'largest'")
  parser.add_argument('forms', nargs='*', help='ours released')
  args = parser.parse_args(argv)
  if args.model == 'peak':
    measure_peak()
  else:
    batch = None if args.batch == 'largest' else int(args.batch)
    measure(args.model, batch, args.forms)


if __name__ == '__main__':
  main()
