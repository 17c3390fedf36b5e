"""Compares the speed of AGC with optax's, and with no clipping, on a net.

    python -m experiments.benchmarks.clipping --model=nfnet_f1

Each is followed by SGD with momentum, with donated state. The gradients are
noise, about half of whose units are clipped.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import timing
from nfnets_jax import agc, devices, models
from nfnets_jax.models import variants
from nfnets_jax.training import fit


def _draw(name: str) -> tuple[Any, Any]:
  """Draws parameters, and gradients about as large as AGC allows."""
  net = hk.transform_with_state(
    lambda images: models.create(name)(images, is_training=False)
  )
  init = jax.jit(
    net.init, compiler_options={'xla_backend_optimization_level': 0}
  )
  params, _ = init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  rng = np.random.default_rng(0)

  def noise(x: jax.Array) -> jax.Array:
    scale = 0.01 * (float(jnp.std(x)) + 1e-3)
    return jnp.asarray(scale * rng.standard_normal(x.shape, np.float32))

  return params, jax.tree.map(noise, params)


def _compile(
  clip: optax.GradientTransformation, params: Any, grads: Any
) -> tuple[Callable[[], Any], int]:
  """Returns a function that updates a copy of `params`, and its temporaries."""
  sgd = optax.sgd(0.1, momentum=0.9, nesterov=True)
  optimizer = optax.chain(clip, sgd)

  def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  held = [jax.tree.map(jnp.copy, params), optimizer.init(params)]
  jitted = jax.jit(step, donate_argnums=(0, 1))
  program = jitted.lower(*held, grads).compile()

  def run() -> None:
    held[:] = jax.block_until_ready(program(*held, grads))

  return run, fit.need(program).temporaries


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog='python -m experiments.benchmarks.clipping',
    description=(__doc__ or '').split('\n')[0],
  )
  parser.add_argument('--model', default='nfnet_f1', help='a variant')
  parser.add_argument('--repeats', type=int, default=15, help='timed rounds')
  args = parser.parse_args(argv)
  devices.start_or_exit()
  variants.get(args.model)
  if args.repeats < 2:
    parser.error(f'--repeats must be at least 2, got {args.repeats}')
  params, grads = _draw(args.model)
  clips = {
    'none': optax.identity(),
    'optax': optax.adaptive_grad_clip(0.01),
    'ours': agc.adaptive_grad_clip(0.01),
    'ours, statistics': agc.adaptive_grad_clip(0.01, statistics=True),
  }
  measures, memory = {}, {}
  for name, clip in clips.items():
    run, memory[name] = _compile(clip, params, grads)
    measures[name] = functools.partial(timing.seconds, run)
  seconds = timing.in_turn(measures, args.repeats, rotate=True)
  print(
    f'{args.model}, {hk.data_structures.tree_size(params):,} parameters, jax '
    f'{jax.__version__} on {jax.default_backend()}, {args.repeats} rounds\n'
    f'{"":18}{"median s":>10}{"min":>9}{"max":>9}{"MB":>8}  ÷ optax'
  )
  for name, times in seconds.items():
    ratios = timing.ratios(times, seconds['optax'])
    print(
      f'{name:18}{timing.columns(times)}{memory[name] / 1e6:8.0f}  '
      f'{timing.spread(ratios)}'
    )


if __name__ == '__main__':
  main()
