"""Compares grouped convolutions, with both gradients, with XLA's own.

  python -m experiments.benchmarks.convolutions --loop

Shapes of EfficientNet-B0 at 224 pixels, with one channel per group, and of
NF-RegNets, with eight. XLA:CPU compiles loops, such as that over micro-batches,
differently; `--loop` times the convolutions in one.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
from jax import lax

from experiments.benchmarks import released, timing
from nfnets_jax import devices
from nfnets_jax.models import convolution

# Pixels, channels, groups, kernel size, stride.
_SHAPES = (
  (112, 32, 32, 3, 1),
  (112, 96, 96, 3, 2),
  (56, 144, 144, 5, 2),
  (28, 240, 240, 5, 1),
  (14, 672, 672, 5, 1),
  (7, 1152, 1152, 3, 1),
  (56, 48, 6, 3, 1),
  (14, 208, 26, 3, 1),
  (7, 440, 55, 3, 1),
  (14, 880, 110, 3, 2),
)


def measure(
  conv: Callable[[jax.Array, jax.Array, int, int], jax.Array],
  shape: tuple[int, int, int, int, int],
  batch: int,
  repeats: int,
  loop: bool,
) -> tuple[float, float]:
  """Times a convolution of `(x, w, stride, groups)` with its gradients.

  Returns:
    Median milliseconds a step, and seconds to compile.
  """
  px, channels, groups, size, stride = shape
  keys = jax.random.split(jax.random.key(0), 3)
  out = -(-px // stride)
  count = 2 if loop else 1
  xs = jax.random.normal(keys[0], (count, batch, px, px, channels))
  w = jax.random.normal(keys[1], (size, size, channels // groups, channels))
  dys = jax.random.normal(keys[2], (count, batch, out, out, channels))

  def step(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
    y, vjp = jax.vjp(lambda x, w: conv(x, w, stride, groups), x, w)
    return y, *vjp(dy)

  def steps(xs: jax.Array, dys: jax.Array) -> tuple[jax.Array, ...]:
    return lax.map(lambda pair: step(*pair), (xs, dys))

  args = (xs, dys) if loop else (xs[0], dys[0])
  began = time.perf_counter()
  program = jax.jit(steps if loop else step).lower(*args).compile()
  compile_seconds = time.perf_counter() - began

  def run() -> float:
    return timing.seconds(lambda: jax.block_until_ready(program(*args)))

  seconds = timing.in_turn({'step': run}, repeats)['step']
  return 1e3 * statistics.median(seconds) / count, compile_seconds


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='python -m experiments.benchmarks.convolutions',
    description='Times grouped convolutions.',
  )
  parser.add_argument('--batch', type=int, default=8, help='number of images')
  parser.add_argument('--repeats', type=int, default=5, help='timed steps')
  parser.add_argument('--loop', action='store_true', help='run two in a loop')
  args = parser.parse_args()
  devices.start_or_exit()
  print('px channels groups kernel stride | ms of conv2d (s to compile), XLA')
  for shape in _SHAPES:
    results = [
      measure(conv, shape, args.batch, args.repeats, args.loop)
      for conv in (convolution.conv2d, released.conv2d)
    ]
    text = '  '.join(f'{ms:9.1f} ({s:.1f})' for ms, s in results)
    print(*(f'{n:5}' for n in shape), '|', text, flush=True)


if __name__ == '__main__':
  main()
