"""Times AGC beside optax's, and beside no clipping, on a net's gradients.

    python -m experiments.benchmarks.clipping --model=nfnet_f1

Each takes the gradients of all parameters through SGD with momentum, compiled
with the state donated, in turn; each round begins with the next one, for what
runs after a lighter program finds more of its data in the caches. The gradients
are noise, of which about half of the units are clipped.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nfnets_jax import agc, devices, models
from nfnets_jax.models import variants


def _net(name: str) -> hk.TransformedWithState:
  def forward(images: jax.Array) -> dict[str, jax.Array]:
    return models.create(name)(images, is_training=False)

  return hk.transform_with_state(forward)


def _noise(name: str) -> tuple[Any, Any]:
  """Parameters as drawn, and gradients about as large as λ allows."""
  net = _net(name)
  init = jax.jit(
    net.init, compiler_options={'xla_backend_optimization_level': 0}
  )
  params, _ = init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  rng = np.random.default_rng(0)

  def noise(x: jax.Array) -> jax.Array:
    scale = 0.01 * (float(jnp.std(x)) + 1e-3)
    return jnp.asarray(scale * rng.standard_normal(x.shape, np.float32))

  return params, jax.tree.map(noise, params)


def _program(clip: optax.GradientTransformation | None, params: Any) -> Any:
  sgd = optax.sgd(0.1, momentum=0.9, nesterov=True)
  optimizer = sgd if clip is None else optax.chain(clip, sgd)

  def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
  return lowered.compile(), state


def _run(program: Any, held: list[Any], grads: Any) -> None:
  held[:] = jax.block_until_ready(program(*held, grads))


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the bench and prints a table.

  Args:
    argv: arguments; None takes those of the process.
  """
  parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('--model', default='nfnet_f1', help='a variant')
  parser.add_argument('--repeats', type=int, default=15)
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args(argv)
  devices.start_or_exit()
  variants.get(args.model)
  if args.repeats < 2:
    parser.error(f'--repeats must be at least 2, got {args.repeats}')
  params, grads = _noise(args.model)
  clips: dict[str, optax.GradientTransformation | None] = {
    'none': None,
    'optax': optax.adaptive_grad_clip(0.01),
    'ours': agc.adaptive_grad_clip(0.01),
    'ours, statistics': agc.adaptive_grad_clip(0.01, statistics=True),
  }
  runs: dict[str, Callable[[], None]] = {}
  memory = {}
  for name, clip in clips.items():
    program, state = _program(clip, params)
    memory[name] = program.memory_analysis().temp_size_in_bytes
    held = [jax.tree.map(jnp.copy, params), state]

    runs[name] = functools.partial(_run, program, held, grads)
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  names = list(runs)
  for round_ in range(args.repeats + 1):
    first = round_ % len(names)
    for name in names[first:] + names[:first]:
      start = time.perf_counter()
      runs[name]()
      if round_:  # the first warms up
        seconds[name].append(time.perf_counter() - start)
  ratios = {
    name: [a / b for a, b in zip(times, seconds['optax'], strict=True)]
    for name, times in seconds.items()
  }
  count = sum(x.size for x in jax.tree.leaves(params))
  if args.json:
    print(
      json.dumps(
        {'model': args.model, 'seconds': seconds, 'temporaries': memory}
      )
    )
    return
  print(
    f'{args.model}, {count:,} parameters, jax {jax.__version__} on '
    f'{jax.default_backend()}, {args.repeats} rounds'
  )
  print(f'{"":18}{"median s":>10}{"min":>9}{"max":>9}{"MB":>8}  ÷ optax')
  for name, times in seconds.items():
    print(
      f'{name:18}{statistics.median(times):10.4f}{min(times):9.4f}'
      f'{max(times):9.4f}{memory[name] / 1e6:8.0f}  '
      f'{statistics.median(ratios[name]):.3f} '
      f'({min(ratios[name]):.3f} to {max(ratios[name]):.3f})'
    )


if __name__ == '__main__':
  main()
