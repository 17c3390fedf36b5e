r"""Times one gradient step beside the released formulation of the convolutions.

  python -m experiments.benchmarks.gradient_step --model=nfnet_f0 --batch=8

The two run in turn, and the ratio is taken pair by pair, so that a machine
whose speed drifts does not decide the result. The released formulation is one
`conv_general_dilated` per convolution, with `feature_group_count` for grouped
ones, and `reduce_window` for average pooling.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from absl import app, flags
from jax import lax

from nfnets_jax import models
from nfnets_jax.models import convolution, layers, variants

_MODEL = flags.DEFINE_string('model', 'nfnet_f0', 'Variant.')
_BATCH = flags.DEFINE_integer('batch', 8, 'Images in a step.')
_SIZE = flags.DEFINE_integer(
  'image_size', None, "Pixels; the variant's training size by default."
)
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed pairs, after one warm-up.')


def released_conv2d(
  x: jax.Array, w: jax.Array, stride: int = 1, groups: int = 1
) -> jax.Array:
  """Convolves as the released code does."""
  return lax.conv_general_dilated(
    x,
    w,
    (stride, stride),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


def released_avg_pool(x: jax.Array, size: int) -> jax.Array:
  """Pools as the released code does."""

  def window_sum(x: jax.Array) -> jax.Array:
    window = (1, size, size, 1)
    return lax.reduce_window(x, 0.0, lax.add, window, window, 'SAME')

  return window_sum(x) / window_sum(jnp.ones_like(x))


def gradient_step(
  released: bool, model: str, batch: int, size: int
) -> tuple[Callable[[], Any], float]:
  """Returns a function that makes one step and waits, and its compile time.

  The function returns the loss and the gradients.
  """

  def forward(images: jax.Array) -> jax.Array:
    return models.create(model)(images, is_training=True)['logits']

  net = hk.transform_with_state(forward)
  images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
  labels = jnp.arange(batch) % 1000

  def loss_fn(params: hk.MutableParams, key: jax.Array) -> jax.Array:
    logits, _ = net.apply(params, state, key, images)
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()

  key = jax.random.key(1)
  params, state = jax.jit(net.init)(key, images)
  began = time.perf_counter()
  conv2d = released_conv2d if released else convolution.conv2d
  avg_pool = released_avg_pool if released else layers.avg_pool
  with (
    mock.patch.object(convolution, 'conv2d', conv2d),
    mock.patch.object(layers, 'avg_pool', avg_pool),
  ):
    step = jax.jit(jax.value_and_grad(loss_fn)).lower(params, key).compile()
  return (
    lambda: jax.block_until_ready(step(params, key)),
    time.perf_counter() - began,
  )


def main(argv: list[str]) -> None:
  """Prints the table."""
  del argv
  size = _SIZE.value or variants.get(_MODEL.value).train_size
  run, compile_time = {}, {}
  seconds: dict[str, list[float]] = {}
  for name in ('ours', 'released'):
    run[name], compile_time[name] = gradient_step(
      name == 'released', _MODEL.value, _BATCH.value, size
    )
    run[name]()
    seconds[name] = []
  for _ in range(_REPEATS.value):
    for name, step in run.items():
      began = time.perf_counter()
      step()
      seconds[name].append(time.perf_counter() - began)
  ratios = [
    released / ours
    for ours, released in zip(seconds['ours'], seconds['released'], strict=True)
  ]
  print(
    f'{_MODEL.value}, {size} px, batch {_BATCH.value}, float32, jax '
    f'{jax.__version__} on {jax.devices()[0].device_kind}, '
    f'{_REPEATS.value} pairs'
  )
  print(f'{"":10}{"median s":>10}{"min s":>10}{"max s":>10}{"compile s":>11}')
  for name, times in seconds.items():
    print(
      f'{name:10}{statistics.median(times):10.2f}{min(times):10.2f}'
      f'{max(times):10.2f}{compile_time[name]:11.1f}'
    )
  print(
    f'released / ours: {statistics.median(ratios):.2f} '
    f'({min(ratios):.2f} to {max(ratios):.2f})'
  )


if __name__ == '__main__':
  app.run(main)
