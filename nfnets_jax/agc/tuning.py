"""Ratios of gradient norm to weight norm, for choosing λ."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from nfnets_jax.agc import checks, paths
from nfnets_jax.agc import units as layouts


class Row(NamedTuple):
  """One parameter of a `Summary`.

  Attributes:
    path: path joined by '/'.
    shape: shape of the parameter.
    units: number of units.
    median: median ratio ‖G_i‖ / max(‖W_i‖, ε) over its units.
    largest: largest ratio.
  """

  path: str
  shape: tuple[int, ...]
  units: int
  median: float
  largest: float


class Summary(NamedTuple):
  """Ratios of gradient norm to weight norm at one step.

  Attributes:
    rows: one per parameter, by decreasing largest ratio.
    ratios: ratios of all units, unordered.
  """

  rows: tuple[Row, ...]
  ratios: np.ndarray

  def __str__(self) -> str:
    width = max([9, *(len(row.path) for row in self.rows)])
    lines = [
      f'{"parameter":{width}}  {"units":>6}  {"median":>9}  {"largest":>9}'
    ]
    lines += [
      f'{x.path:{width}}  {x.units:6}  {x.median:9.3g}  {x.largest:9.3g}'
      for x in self.rows
    ]
    return '\n'.join(lines)


def summarize(
  grads: Any,
  params: Any,
  *,
  eps: float = 1e-3,
  units: Any = None,
  strict: bool = False,
  exclude: Callable[[str, Any], bool] | None = None,
) -> Summary:
  """Summarizes the ratios of gradient norm to weight norm at one step.

  Args:
    grads: gradients of the whole batch before clipping.
    params: parameters that they were computed for.
    eps: as in `adaptive_grad_clip`.
    units: as in `adaptive_grad_clip`.
    strict: as in `adaptive_grad_clip`.
    exclude: as in `adaptive_grad_clip`; excluded leaves are omitted.

  Returns:
    A summary on the host, which prints as a table.

  Raises:
    ValueError: as in `adaptive_grad_clip`, or if a gradient has no parameter.
    TypeError: as in `adaptive_grad_clip`.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> params = {'a': jnp.ones((4, 2)), 'b': jnp.zeros(2)}
    >>> grads = jax.tree.map(lambda x: 0.1 * jnp.ones_like(x), params)
    >>> print(summarize(grads, params))
    parameter   units     median    largest
    b               1        141        141
    a               2        0.1        0.1
  """
  min_norm = checks.positive(eps, f'eps must be a positive number, got {eps!r}')
  rule = layouts.units_rule(units, params)
  included = {path for path, _ in paths.included(exclude, params)}
  by_path = dict(paths.leaves(params))
  rows: list[Row] = []
  ratios: list[np.ndarray] = []
  for path, grad in paths.leaves(grads):
    if path not in by_path:
      raise ValueError(
        f'params lacks {path}, which grads has; pass the parameters that the '
        'gradients were computed for'
      )
    if path not in included:
      continue
    param = by_path[path]
    checks.check_leaf(path, grad, param)
    axes = layouts.unit_axes(path, param, rule(path, param), strict, None)
    with np.errstate(over='ignore', invalid='ignore'):
      g_norm, w_norm = (
        np.sqrt(np.sum(np.asarray(x, np.float64) ** 2, axis=axes))
        for x in (grad, param)
      )
      ratio = np.ravel(g_norm / np.maximum(w_norm, min_norm))
    median, largest = float(np.median(ratio)), float(np.max(ratio))
    rows.append(Row(path, tuple(param.shape), ratio.size, median, largest))
    ratios.append(ratio)
  rows.sort(key=lambda row: -row.largest)
  return Summary(tuple(rows), np.concatenate(ratios or [np.zeros(0)]))


def suggest_clipping(
  summaries: Iterable[Summary], fraction: float = 0.1
) -> float:
  """Suggests the λ that would have clipped a given fraction of all units.

  A starting point for a search: the paper tuned λ by training, and found 0.01
  for batches of 1024 to 4096 and larger values for smaller batches. Summarize
  steps of a stable run after the warm-up.

  Args:
    summaries: summaries of one or more steps.
    fraction: fraction of units to clip, in (0, 1).

  Raises:
    ValueError: if no ratio is finite, or `fraction` is not in (0, 1).

  Example:
    >>> import jax.numpy as jnp
    >>> params = {'w': jnp.ones((1, 1, 1, 100))}
    >>> grads = {'w': jnp.arange(100.0).reshape(1, 1, 1, 100)}
    >>> summary = summarize(grads, params, units='HWIO')
    >>> round(suggest_clipping([summary], 0.1), 1)
    89.1
  """
  message = f'fraction must be in (0, 1), got {fraction!r}'
  fraction = checks.positive(fraction, message)
  if fraction >= 1:
    raise ValueError(message)
  ratios = [x.ratios[np.isfinite(x.ratios)] for x in summaries]
  if not sum(x.size for x in ratios):
    raise ValueError(
      'there are no finite ratios; summarize steps with finite gradients'
    )
  return float(np.quantile(np.concatenate(ratios), 1 - fraction))
