"""Ratios of gradient to weight norms, to choose λ."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from nfnets_jax.agc import checks, paths
from nfnets_jax.agc import units as layouts


class Row(NamedTuple):
  """A parameter in a `Summary`.

  Attributes:
    path: joined by '/'.
    shape: of the parameter.
    units: number of units.
    median: of the ratios ‖G_i‖ / max(‖W_i‖, ε) of its units.
    largest: of the same ratios.
  """

  path: str
  shape: tuple[int, ...]
  units: int
  median: float
  largest: float


class Summary(NamedTuple):
  """Ratios of gradient to weight norms in one step.

  Attributes:
    rows: one per parameter, by decreasing largest ratio.
    ratios: of all units, in no particular order.
  """

  rows: tuple[Row, ...]
  ratios: np.ndarray

  def __str__(self) -> str:
    """Returns a table of the parameters."""
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
  """Summarizes the ratios of gradient to weight norms of a step.

  Args:
    grads: of the whole batch, before clipping.
    params: with the same structure.
    eps: ε, as in `adaptive_grad_clip`.
    units: as there.
    strict: as there.
    exclude: as there; excluded leaves are not in the table.

  Returns:
    The table, on the host; `print` it.

  Raises:
    ValueError: as in `adaptive_grad_clip`, or for a gradient without a
      parameter.
    TypeError: as there.

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
        f'grads has a leaf {path}, params has none; pass the parameters that '
        'it was computed for'
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


def suggest_clipping(summaries: Iterable[Summary], share: float = 0.1) -> float:
  """Suggests a λ that would have clipped a fraction of the units.

  A heuristic to start a search from. The paper tuned λ by training: 0.01 for
  batches of 1024 to 4096, and larger ones for smaller batches, whose gradients
  are noisier. Use steps after the warm-up of a stable run.

  Args:
    summaries: of some steps.
    share: fraction of the units, in (0, 1).

  Returns:
    λ.

  Raises:
    ValueError: if there are no finite ratios, or for an invalid share.

  Example:
    >>> import jax.numpy as jnp
    >>> params = {'w': jnp.ones((1, 1, 1, 100))}
    >>> grads = {'w': jnp.arange(100.0).reshape(1, 1, 1, 100)}
    >>> summary = summarize(grads, params, units='HWIO')
    >>> round(suggest_clipping([summary], 0.1), 1)
    89.1
  """
  message = f'share must be in (0, 1), got {share!r}'
  share = checks.positive(share, message)
  if share >= 1:
    raise ValueError(message)
  ratios = [x.ratios[np.isfinite(x.ratios)] for x in summaries]
  if not sum(x.size for x in ratios):
    raise ValueError(
      'there are no finite ratios; summarize steps with finite gradients'
    )
  return float(np.quantile(np.concatenate(ratios), 1 - share))
