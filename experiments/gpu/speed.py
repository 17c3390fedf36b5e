"""Part 2: speed of training steps in JAX.

  python -m experiments.gpu.speed peak
  python -m experiments.gpu.speed nfnet_f0 32 ours

Jobs compile in parallel on the host, and measure alone on the device. Steps are
dispatched asynchronously, as in training.
"""

import argparse
import contextlib
import time

import jax
from ml_collections import config_dict

from experiments.benchmarks import peak, programs, released
from experiments.gpu import common, kernels, step
from nfnets_jax import devices
from nfnets_jax.models import variants
from nfnets_jax.training import fit

# Estimated bytes per image, where the search for the largest batch starts:
# temporaries of a step by the compiler for an H100.
_BYTES = {'nfnet_f0': 44e6, 'nfnet_f1': 130e6}
# Fraction of device memory that a program may use.
_USABLE = 0.9


class Program:
  """A compiled training step.

  Attributes:
    batch: number of images.
    compiled: the program.
    compile_seconds: compile time, in parallel with other jobs.
    memory: bytes of arguments, results and temporaries.
    temporaries: bytes of temporaries.
  """

  def __init__(
    self,
    config: config_dict.ConfigDict,
    batch: int,
    size: int,
    form: str = 'ours',
  ):
    """Compiles a step in a form of `measure`."""
    self.batch = batch
    context = (
      released.formulation if form == 'released' else contextlib.nullcontext
    )
    with context():
      run, self._state, self._batch = step.create(config, batch, size)
      lowered = run.lower(self._state, self._batch)
    began = time.monotonic()
    self.compiled = lowered.compile()
    self.compile_seconds = time.monotonic() - began
    need = fit.need(self.compiled)
    self.temporaries, self.memory = need.temporaries, need.total

  def run(self, count: int) -> float:
    """Runs steps and returns the seconds of one."""
    began = time.perf_counter()
    for _ in range(count):
      self._state, metrics = self.compiled(self._state, self._batch)
    jax.block_until_ready((self._state, metrics))
    return (time.perf_counter() - began) / count


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
  common.end_turn()


def measure(model: str, batch: int | None, form: str) -> None:
  """Compiles and times the step of a net.

  Args:
    model: a variant.
    batch: number of images; None is the largest power of two that fits.
    form: 'ours' or 'released'.
  """
  config = step.recipe(model, 'bfloat16')
  size = 32 if common.dry_run() else variants.get(model).train_size
  largest = batch is None
  if batch is None:
    program = _compile_largest(config, size, form, _BYTES[model])
  else:
    batch = 2 if common.dry_run() else batch
    program = Program(config, batch, size, form)
  about = {
    'model': model,
    'image_size': size,
    'largest': largest,
    'batch': program.batch,
    'form': form,
  }
  common.add(
    2,
    'compiled',
    **about,
    seconds=round(program.compile_seconds, 1),
    temporaries=program.temporaries,
    memory=program.memory,
  )
  macs = programs.count_macs(config, size)
  common.wait_for_turn()
  program.run(2)  # to warm up
  times = common.measure_steps(program.run)
  stats = jax.local_devices()[0].memory_stats() or {}
  common.add(
    2,
    'step',
    **about,
    **times,
    images_per_second=program.batch / times['seconds'],
    # Three passes of two operations each.
    tflops=6 * macs * program.batch / times['seconds'] / 1e12,
    memory=program.memory,
    peak_bytes_in_use=stats.get('peak_bytes_in_use'),
  )
  profiled = not largest and form == 'ours' and model in _BYTES
  if profiled:
    folder = kernels.profile(program.run, model)
  common.end_turn()
  if profiled:
    kernels.record(folder, program.compiled, model)


def _compile_largest(
  config: config_dict.ConfigDict, size: int, form: str, bytes_per_image: float
) -> Program:
  usable = _USABLE * devices.memory()
  batch = 64
  while 2 * batch * bytes_per_image < usable:
    batch *= 2
  while (program := Program(config, batch, size, form)).memory >= usable:
    if common.dry_run():
      break
    batch //= 2
  return program


def main(argv: list[str] | None = None) -> None:
  """Runs one job."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.gpu.speed', description='Times training steps.'
  )
  parser.add_argument('model', help="a variant, or 'peak'")
  parser.add_argument('batch', nargs='?', help="a number, or 'largest'")
  parser.add_argument('form', nargs='?', choices=['ours', 'released'])
  args = parser.parse_args(argv)
  if args.model == 'peak':
    measure_peak()
  else:
    batch = None if args.batch == 'largest' else int(args.batch)
    measure(args.model, batch, args.form)


if __name__ == '__main__':
  main()
