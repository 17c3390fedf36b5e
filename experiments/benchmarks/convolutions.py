r"""Times grouped convolutions beside XLA's own, with both gradients.

  python -m experiments.benchmarks.convolutions --loop

The shapes are those of EfficientNet-B0 at 224 pixels, whose groups have one
channel, and of NF-RegNets, whose groups have eight. In a loop, such as that
over micro-batches, XLA for CPU computes in another way; `--loop` times that.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
from jax import lax

from experiments.benchmarks import released
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
  """Times a convolution with its two gradients.

  Args:
    conv: of inputs, weights, stride and groups.
    shape: an entry of `_SHAPES`.
    batch: images in a step.
    repeats: timed steps.
    loop: whether two steps run in a loop.

  Returns:
    Median milliseconds of a step, and seconds to compile it.
  """
  px, channels, groups, size, stride = shape
  keys = jax.random.split(jax.random.key(0), 3)
  out = -(-px // stride)
  xs = jax.random.normal(keys[0], (2, batch, px, px, channels))
  w = jax.random.normal(keys[1], (size, size, channels // groups, channels))
  dys = jax.random.normal(keys[2], (2, batch, out, out, channels))

  def step(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
    y, vjp = jax.vjp(lambda x, w: conv(x, w, stride, groups), x, w)
    return y, *vjp(dy)

  def steps(xs: jax.Array, dys: jax.Array) -> tuple[jax.Array, ...]:
    return lax.map(lambda pair: step(*pair), (xs, dys))

  args = (xs, dys) if loop else (xs[0], dys[0])
  started = time.perf_counter()
  run = jax.jit(steps if loop else step).lower(*args).compile()
  compiled = time.perf_counter() - started
  jax.block_until_ready(run(*args))
  times = []
  for _ in range(repeats):
    started = time.perf_counter()
    jax.block_until_ready(run(*args))
    times.append((time.perf_counter() - started) / (2 if loop else 1))
  return 1e3 * statistics.median(times), compiled


def main() -> None:
  """Prints a line a shape."""
  parser = argparse.ArgumentParser(description='Grouped convolutions.')
  parser.add_argument('--batch', type=int, default=8, help='images in a step')
  parser.add_argument(
    '--repeats', type=int, default=5, help='timed steps, after a warm-up'
  )
  parser.add_argument(
    '--loop', action='store_true', help='run the steps in a loop of two'
  )
  args = parser.parse_args()
  devices.start_or_exit()
  print('px channels groups kernel stride | ms of conv2d (s to compile), XLA')
  for shape in _SHAPES:
    found = [
      measure(conv, shape, args.batch, args.repeats, args.loop)
      for conv in (convolution.conv2d, released.conv2d)
    ]
    figures = '  '.join(f'{ms:9.1f} ({s:.1f})' for ms, s in found)
    print(*(f'{n:5}' for n in shape), '|', figures, flush=True)


if __name__ == '__main__':
  main()
