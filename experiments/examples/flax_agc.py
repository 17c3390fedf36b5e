"""A Flax ResNet without normalisation on digits, with AGC and without.

Source: Brock et al. 2021, section 4: with clipping, a net without normalisation
trains at learning rates at which it would diverge.
Command:
  python -m experiments.examples.flax_agc --output=docs/flax_agc.png
Expected: without clipping the net diverges at a rate of about 0.1; see
docs/results/clipping.md.

The rate is doubled until the net without AGC diverges with all seeds. λ is the
paper's for large batches.
"""

import argparse
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
from sklearn import datasets

from nfnets_jax import devices, paths
from nfnets_jax.agc import adaptive_grad_clip, is_head

_BATCH = 128
_STEPS = 150
_CLIPPING = 0.01
_EPS = 1e-3


class Block(nn.Module):
  """Two 3×3 convolutions beside the identity, without normalisation."""

  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[B, H, W, C]` to the same shape."""
    y = nn.Conv(self.width, (3, 3))(nn.relu(x))
    return x + nn.Conv(self.width, (3, 3))(nn.relu(y))


class ResNet(nn.Module):
  """A stem, residual blocks, mean pooling and a classifier."""

  width: int = 32
  depth: int = 6

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[B, H, W, C]` to logits `[B, 10]`."""
    x = nn.Conv(self.width, (3, 3))(x)
    for _ in range(self.depth):
      x = Block(self.width)(x)
    return nn.Dense(10, name='head')(jnp.mean(nn.relu(x), axis=(1, 2)))


def _data() -> tuple[np.ndarray, ...]:
  digits = datasets.load_digits()
  images = np.asarray(digits.images[..., None] / 8 - 1, np.float32)
  labels = np.asarray(digits.target, np.int32)
  test = np.arange(len(labels)) % 5 == 0
  return images[~test], labels[~test], images[test], labels[test]


def train(
  learning_rate: float, clipping: float | None, seed: int, steps: int = _STEPS
) -> tuple[list[float], float]:
  """Trains a net by SGD with momentum 0.9.

  Args:
    learning_rate: constant learning rate.
    clipping: λ, or None for no clipping.
    seed: seed of parameters and batches.
    steps: number of steps of 128 images.

  Returns:
    The loss of each step, and the test accuracy.
  """
  images, labels, test_images, test_labels = _data()
  net = ResNet()
  params = net.init(jax.random.key(seed), images[:1])
  clip = optax.identity()
  if clipping is not None:
    clip = adaptive_grad_clip(clipping, _EPS, exclude=is_head)
  optimizer = optax.chain(clip, optax.sgd(learning_rate, momentum=0.9))
  state = optimizer.init(params)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
    def loss_fn(params: Any) -> jax.Array:
      logits = net.apply(params, x)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
      return jnp.mean(losses)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  rng = np.random.default_rng(seed)
  losses = []
  for _ in range(steps):
    batch = rng.integers(len(labels), size=_BATCH)
    params, state, loss = step(params, state, images[batch], labels[batch])
    losses.append(float(loss))
  logits = jax.jit(net.apply)(params, test_images)
  return losses, float(np.mean(np.argmax(logits, 1) == test_labels))


def diverged(losses: Sequence[float]) -> bool:
  """Returns whether a run blew up, or ended no better than chance.

  Too large a step can leave all units of a layer inactive for good.
  """
  chance = math.log(10)
  last = losses[-20:]
  return (
    not all(x < 10 * chance for x in losses)
    or sum(last) / len(last) > 0.98 * chance
  )


Runs = list[tuple[list[float], float]]


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog='python -m experiments.examples.flax_agc',
    description=(__doc__ or '').split('\n')[0],
  )
  parser.add_argument('--output', type=paths.argument, help='a PNG file')
  parser.add_argument('--seeds', type=int, default=3, help='number of seeds')
  parser.add_argument('--first_rate', type=float, default=0.008)
  args = parser.parse_args(argv)
  devices.start_or_exit()
  rate = args.first_rate
  while rate < 100:
    results: dict[str, Runs] = {}
    for name, clipping in (('no clipping', None), ('AGC', _CLIPPING)):
      results[name] = [train(rate, clipping, x) for x in range(args.seeds)]
      _print(f'rate {rate:g}, {name}', results[name])
    if all(diverged(losses) for losses, _ in results['no clipping']):
      break
    rate *= 2
  if args.output:
    _draw(args.output, rate, results)


def _print(name: str, runs: Runs) -> None:
  accuracies = ', '.join(f'{100 * accuracy:.1f} %' for _, accuracy in runs)
  largest = max(x for losses, _ in runs for x in losses if not math.isnan(x))
  count = sum(diverged(losses) for losses, _ in runs)
  print(
    f'{name}: test top-1 {accuracies}; largest loss {largest:.3g}; {count} of '
    f'{len(runs)} diverged',
    flush=True,
  )


def _draw(path: pathlib.Path, rate: float, results: dict[str, Runs]) -> None:
  figure = matplotlib.figure.Figure(figsize=(6, 3.5), layout='constrained')
  axes = figure.subplots()
  for (name, runs), color in zip(
    results.items(), ('tab:red', 'tab:blue'), strict=True
  ):
    for i, (losses, _) in enumerate(runs):
      shown = [min(x, 1e3) if math.isfinite(x) else 1e3 for x in losses]
      axes.plot(shown, color=color, lw=1, label=None if i else name)
  axes.axhline(math.log(10), color='grey', lw=0.5)
  axes.set(
    xlabel='step',
    ylabel='training loss (1000: larger or not finite)',
    yscale='log',
    title=f'Flax ResNet without normalisation, digits, rate {rate:g}',
  )
  axes.legend()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=100)


if __name__ == '__main__':
  main()
