"""Evaluation of a state on a data set, every image once."""

from collections.abc import Callable, Iterable

import jax

from nfnets_jax.training import parallel, train_step


def evaluate(
  eval_step: Callable,
  state: train_step.TrainState,
  batches: Iterable[train_step.Batch],
) -> dict[str, float]:
  """Averages the loss and the hits over all images.

  Args:
    eval_step: from `parallel.parallel_eval_step`.
    state: replicated; both its current and its averaged parameters are used.
    batches: this process's batches, with `image`, `label` and `mask`.

  Returns:
    `eval_loss` in nats, `eval_top_1` and `eval_top_5` as fractions, the same
    with the prefix `ema_`, and `eval_count`, the number of images.

  Raises:
    ValueError: if there is no image.
  """
  # The sums are fetched at the end, so that the devices never wait.
  sums = [eval_step(state, parallel.shard(batch)) for batch in batches]
  if not sums:
    raise ValueError('there is nothing to evaluate: the split has no batches')
  totals = jax.tree.map(lambda *xs: float(sum(xs)), *jax.device_get(sums))
  results: dict[str, float] = {'eval_count': int(totals['eval']['count'])}
  for prefix, total in totals.items():
    for name in ('loss', 'top_1', 'top_5'):
      results[f'{prefix}_{name}'] = total[name] / total['count']
  return results
