"""Part 2: speed of training steps in JAX.

  python -m experiments.gpu.speed peak
  python -m experiments.gpu.speed nfnet_f0 32 ours released

A job compiles its programs, says `ready`, and waits for a line on standard
input: so many jobs compile side by side on the cores of the host, and each
measures alone on the device. Steps are started one after the other without
waiting, as in training; ours and the released formulation take turns, so that a
ratio is that of neighbours.
"""

import argparse
import concurrent.futures
import contextlib
import statistics
import sys
import time

import jax

from experiments.benchmarks import peak, released, speed
from experiments.gpu import common, step
from nfnets_jax import devices
from nfnets_jax.models import variants

_ROUNDS = 5
# Of a round, at least.
_SECONDS = 0.3
# Bytes an image at which to begin to look for the largest batch: of the step's
# temporaries on an H100 by its compiler.
_BYTES = {'nfnet_f0': 44e6, 'nfnet_f1': 130e6}
# What a program may take of the device's memory.
_USABLE = 0.9


class Program:
  """A compiled training step.

  Attributes:
    form: 'ours' or 'released'.
    batch: images.
    compile_seconds: of the compiler, beside others.
    memory: bytes of arguments, results and temporaries.
    temporaries: bytes.
    rounds: seconds a step, of each round.
  """

  def __init__(self, model: str, batch: int, size: int, form: str):
    """Traces and lowers it."""
    self.form, self.batch = form, batch
    config = step.recipe(model, 'bfloat16')
    taken = released.formulation if form == 'released' else None
    with taken() if taken else contextlib.nullcontext():
      self._made = step.create(config, batch, size)
      self._lowered = self._made.run.lower(self._made.state, self._made.batch)
    self.rounds: list[float] = []
    self._count = 1

  def compile(self) -> None:
    """Compiles it; several may at a time, in threads."""
    began = time.monotonic()
    self._compiled = self._lowered.compile()
    self.compile_seconds = time.monotonic() - began
    stats = self._compiled.memory_analysis()
    self.temporaries = stats.temp_size_in_bytes
    self.memory = (
      stats.temp_size_in_bytes
      + stats.argument_size_in_bytes
      + stats.output_size_in_bytes
      - stats.alias_size_in_bytes
    )

  def warm_up(self) -> None:
    """Runs it, and finds how many steps make a round."""
    self._time()
    self._time()
    self._count = max(1, round(_SECONDS / self._time()))

  def measure(self) -> None:
    """Times a round."""
    self.rounds.append(self._time())

  def _time(self) -> float:
    """Seconds a step, of some in a row."""
    made = self._made
    began = time.perf_counter()
    for _ in range(self._count):
      made.state, metrics = self._compiled(made.state, made.batch)
    jax.block_until_ready((made.state, metrics))
    return (time.perf_counter() - began) / self._count


def wait_for_turn() -> None:
  """Says that all is prepared and waits until this job may measure."""
  print('ready', flush=True)
  if not sys.stdin.readline():
    sys.exit('nobody said go')


def measure_peak() -> None:
  """Times large matrix products."""
  jax.block_until_ready(jax.numpy.ones(8))
  wait_for_turn()
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
  """Compiles and times a net's steps.

  Args:
    model: a variant.
    batch: images; None is the largest power of two that fits.
    forms: of 'ours' and 'released'.
  """
  size = 32 if common.dry_run() else variants.get(model).train_size
  largest = batch is None
  if batch is not None:
    programs = _compile(model, batch, size, forms)
  else:
    batch = 64
    while 2 * batch * _BYTES[model] < _USABLE * devices.memory():
      batch *= 2
    while True:
      programs = _compile(model, batch, size, forms)
      most = max(program.memory for program in programs)
      if common.dry_run() or most < _USABLE * devices.memory():
        break
      batch //= 2
  about = {'model': model, 'image_size': size, 'largest': largest}
  for program in programs:
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
  macs = speed._count_macs(step.recipe(model, 'bfloat16'), 1, size)
  wait_for_turn()
  for program in programs:
    program.warm_up()
  for _ in range(_ROUNDS):
    for program in programs:
      program.measure()
  stats = jax.local_devices()[0].memory_stats() or {}
  for program in programs:
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
      # Forward and backward pass: three times two operations each.
      tflops=6 * macs * program.batch / seconds / 1e12,
      memory=program.memory,
      peak_bytes_in_use=stats.get('peak_bytes_in_use'),
    )


def _compile(
  model: str, batch: int, size: int, forms: list[str]
) -> list[Program]:
  batch = 2 if common.dry_run() else batch
  # The formulation is chosen for the whole process: one trace at a time.
  programs = [Program(model, batch, size, form) for form in forms]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(Program.compile, programs))
  return programs


def main(argv: list[str] | None = None) -> None:
  """Does one job."""
  parser = argparse.ArgumentParser(description='The speed on this device.')
  parser.add_argument('model', help="a variant, or 'peak'")
  parser.add_argument('batch', nargs='?', help="images, or 'largest'")
  parser.add_argument('forms', nargs='*', help='ours released')
  args = parser.parse_args(argv)
  if args.model == 'peak':
    measure_peak()
  else:
    batch = None if args.batch == 'largest' else int(args.batch)
    measure(args.model, batch, args.forms)


if __name__ == '__main__':
  main()
