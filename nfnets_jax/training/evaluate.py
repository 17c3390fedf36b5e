"""Evaluation of a state on a data set, every image once."""

import collections
import math
from collections.abc import Callable, Iterable

import jax

from nfnets_jax.runtime import (
  parallel,
)
from nfnets_jax.training import (
  train_step,
)


def evaluate(
  eval_step: Callable,
  state: train_step.TrainState,
  batches: Iterable[train_step.Batch],
) -> dict[str, float]:
  """Averages the loss and the hits over all images.

  Args:
    eval_step: the compiled evaluation step, of all devices.
    state: replicated; both its current and its averaged parameters are used.
    batches: this process's batches, with `image`, `label` and `mask`.

  Returns:
    `eval_loss` in nats, `eval_top_1` and `eval_top_5` as fractions, the same
    with the prefix `ema_`, and `eval_count`, the number of images.

  Raises:
    ValueError: if there is no image.
    FloatingPointError: if a loss is not finite.
  """
  in_flight: collections.deque = collections.deque()
  sums = []
  for batch in batches:
    in_flight.append(eval_step(state, parallel.shard(batch)))
    # Two batches are enough to keep the devices busy, and their images in
    # memory.
    if len(in_flight) > 2:
      sums.append(jax.device_get(in_flight.popleft()))
  sums.extend(jax.device_get(list(in_flight)))
  if not sums:
    raise ValueError('there is nothing to evaluate: the split has no batches')
  # In Python's floats: float32 would lose the last digits of a long sum.
  totals = jax.tree.map(lambda *xs: sum(map(float, xs)), *sums)
  results: dict[str, float] = {'eval_count': int(totals['eval']['count'])}
  for prefix, total in totals.items():
    for name in ('loss', 'top_1', 'top_5'):
      results[f'{prefix}_{name}'] = total[name] / total['count']
    if not math.isfinite(total['loss']):
      raise FloatingPointError(f'{prefix}_loss is {total["loss"]}')
  return results
