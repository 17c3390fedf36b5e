"""A Flax ResNet without normalisation on digits, with AGC and without.

Source: the claim of Brock et al. 2021, section 4, that clipping lets a net
without normalisation train at rates at which it would diverge; here with AGC
alone, in another library.
Command:
  python -m experiments.examples.flax_agc --output=docs/flax_agc.png
Expected: without clipping the net diverges at a rate of some 0.1; see
experiments/README.md.

Rates are doubled until the net without AGC diverges, with all seeds; then the
same rate is run with AGC. λ is the paper's for large batches.
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
import matplotlib
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
  """Trains a net.

  Args:
    learning_rate: constant, of SGD with momentum 0.9.
    clipping: λ, or None for no clipping.
    seed: of parameters and batches.
    steps: of 128 images.

  Returns:
    The loss of each step, and the fraction of the test images that are right.
  """
  images, labels, test_images, test_labels = _data()
  net = ResNet()
  params = net.init(jax.random.key(seed), images[:1])
  clip = (
    optax.identity()
    if clipping is None
    else adaptive_grad_clip(clipping, _EPS, exclude=is_head)
  )
  optimizer = optax.chain(clip, optax.sgd(learning_rate, momentum=0.9))
  state = optimizer.init(params)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
    def loss_fn(params: Any) -> jax.Array:
      losses = optax.softmax_cross_entropy_with_integer_labels(
        net.apply(params, x), y
      )
      return jnp.mean(losses)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  rng = np.random.default_rng(seed)
  losses = []
  for _ in range(steps):
    chosen = rng.integers(len(labels), size=_BATCH)
    params, state, loss = step(params, state, images[chosen], labels[chosen])
    losses.append(float(loss))
  logits = jax.jit(net.apply)(params, test_images)
  return losses, float(np.mean(np.argmax(logits, 1) == test_labels))


def diverged(losses: Sequence[float]) -> bool:
  """Tells whether a run blew up, or ended where it began.

  Args:
    losses: of each step.

  Returns:
    Whether a loss is no number or ten times that of chance, or those of the
    last twenty steps are on average no better than chance: too large a step
    leaves no rectifier of some layer active, and then nothing moves any more.
  """
  chance = math.log(10)
  last = losses[-20:]
  return (
    not all(x < 10 * chance for x in losses)
    or sum(last) / len(last) > 0.98 * chance
  )


def main(argv: Sequence[str] | None = None) -> None:
  """Finds the rate, runs both, prints a table and draws the curves.

  Args:
    argv: arguments; None takes those of the process.
  """
  parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('--output', type=paths.argument, help='a PNG')
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--first_rate', type=float, default=0.008)
  args = parser.parse_args(argv)
  devices.start_or_exit()
  rate, found = args.first_rate, False
  results: dict[tuple[float, bool], list[tuple[list[float], float]]] = {}
  while not found and rate < 100:
    for clips in (False, True):
      results[rate, clips] = [
        train(rate, _CLIPPING if clips else None, seed)
        for seed in range(args.seeds)
      ]
      runs = results[rate, clips]
      print(
        f'rate {rate:g}, {"AGC" if clips else "no clipping"}: test top-1 '
        + ', '.join(f'{100 * accuracy:.1f} %' for _, accuracy in runs)
        + f'; largest loss {_largest(runs):.3g}'
        + f'; {sum(diverged(losses) for losses, _ in runs)} of {len(runs)} '
        'diverged',
        flush=True,
      )
    found = all(diverged(losses) for losses, _ in results[rate, False])
    rate = rate if found else 2 * rate
  if args.output:
    _draw(args.output, rate, results[rate, False], results[rate, True])


def _largest(runs: list[tuple[list[float], float]]) -> float:
  return max(x for losses, _ in runs for x in losses if not math.isnan(x))


def _draw(path: pathlib.Path, rate: float, plain: list, clipped: list) -> None:
  matplotlib.use('agg')
  from matplotlib import pyplot as plt

  figure, axis = plt.subplots(figsize=(6, 3.5), layout='constrained')
  for runs, color, label in (
    (plain, 'tab:red', 'without clipping'),
    (clipped, 'tab:blue', f'AGC, λ = {_CLIPPING}'),
  ):
    for i, (losses, _) in enumerate(runs):
      shown = [min(x, 1e3) if math.isfinite(x) else 1e3 for x in losses]
      axis.plot(shown, color=color, lw=1, label=label if i == 0 else None)
  axis.axhline(math.log(10), color='grey', lw=0.5)
  axis.set(
    xlabel='step',
    ylabel='training loss (1000 = more, or no number)',
    yscale='log',
    title=f'Flax ResNet without normalisation, digits, rate {rate:g}',
  )
  axis.legend()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=100)
  plt.close(figure)


if __name__ == '__main__':
  main()
