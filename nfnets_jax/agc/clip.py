"""The AGC equation and gradient transformation.

Let W_i be the weights that feed output i, a unit, and G_i their gradient:

  G_i ← λ ‖W_i‖* / ‖G_i‖ · G_i   if ‖G_i‖ / ‖W_i‖* > λ
  G_i ← G_i                      otherwise

with Frobenius norms and ‖W_i‖* = max(‖W_i‖, ε).

Differences:
  * Norms are computed in float32 or wider and do not overflow.
  * Subnormal numbers (below 1.2e-38 in float32) may be flushed to zero.

Reference:
  Brock et al. 2021, section 4.1, equation 3.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nfnets_jax.agc import checks, paths
from nfnets_jax.agc import units as layouts
from nfnets_jax.agc.leaves import Leaf, Leaves, scale_units
from nfnets_jax.agc.state import AGCState, unit_statistics

# Guards the division by a zero gradient norm; the released value.
_DIV_EPS = 1e-6

Number = float | jax.Array
Schedule = Callable[[jax.Array], Number]


def adaptive_grad_clip(
  clipping: Number | Schedule,
  eps: Number = 1e-3,
  *,
  units: layouts.Units | Sequence[str] | layouts.UnitsRule | Any = None,
  strict: bool = False,
  exclude: Callable[[str, Any], bool] | None = None,
  group: Callable[[str, Any], str] | None = None,
  axis_name: Any = None,
  statistics: bool = False,
) -> optax.GradientTransformation:
  """Clips each unit's gradient norm to a multiple of its weight norm.

  Functions of `(path, leaf)` receive paths such as 'params/Dense_0/kernel'.

  Args:
    clipping: λ > 0, the maximum ratio of gradient norm to weight norm, or a
      schedule of the update count. The paper uses 0.01 for batches of 1024 to
      4096; smaller batches tolerate larger values.
    eps: ε > 0, lower bound of the weight norm, so that zero weights can train.
    units: array layouts, which define the axes of a unit: a name such as 'HWIO'
      for leaves of that rank; a list of names, one per rank; a tuple of axes to
      sum over for all leaves; a function `(path, leaf)` or a tree of these.
      None is the released rule, for outputs last. See `nfnets_jax.agc.units`.
    strict: whether to reject leaves for which the released rule is ambiguous.
    exclude: `(path, leaf)` to whether to skip a leaf, in the paper `is_head`.
    group: `(path, leaf)` to the leaf's group in `statistics`.
    axis_name: mapped axes that units are sharded over in `shard_map`: a name, a
      tuple, or a function `(path, leaf)` to either or None. Leaves with more
      than one axis then need `units`.
    statistics: whether to keep `Statistics` of the last update in the state; in
      `shard_map` they cover the local shard.

  Returns:
    A transformation that preserves dtypes and needs `params` in `update`. Its
    state is an `AGCState`, or empty without a schedule and statistics.

  Raises:
    ValueError: for invalid arguments; in `init`, if `units` or `exclude` match
      no parameter; in `update`, for missing or mismatched `params`, or a leaf
      of unknown layout.
    TypeError: in `update`, for leaves that are not real floating-point arrays.

  Example:
    >>> params = {'w': jnp.array([[3.0], [4.0]])}
    >>> grads = {'w': jnp.array([[30.0], [40.0]])}
    >>> agc = adaptive_grad_clip(0.1)
    >>> clipped, _ = agc.update(grads, agc.init(params), params)
    >>> bool(jnp.allclose(clipped['w'], 0.01 * grads['w']))  # norm 50 to 0.5
    True
  """

  def positive(value: Any, shown: Any) -> Any:
    return checks.positive(
      value,
      f'clipping and eps must be positive, got {shown!r} and {eps!r}; use '
      'finite scalars, or drop the transformation to train without clipping',
    )

  if not callable(clipping):
    clipping = positive(clipping, clipping)
  min_norm = positive(eps, clipping)

  def group_of(path: str, leaf: Any) -> str:
    return 'all' if group is None else group(path, leaf)

  def init(params: Any) -> Any:
    layouts.units_rule(units, params)
    groups = {group_of(*leaf) for leaf in paths.included(exclude, params)}
    if not statistics and not callable(clipping):
      return optax.EmptyState()
    zeros = {name: unit_statistics([]) for name in sorted(groups)}
    return AGCState(jnp.zeros((), jnp.int32), zeros if statistics else {})

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    if params is None:
      raise ValueError(
        'adaptive_grad_clip needs the parameters: call '
        'update(updates, state, params)'
      )
    max_ratio = clipping
    if callable(max_ratio):
      if not isinstance(state, AGCState):
        raise ValueError('a schedule needs the state that `init` returns')
      value = max_ratio(state.count)
      max_ratio = positive(value, value)
    rule = layouts.units_rule(units, params)
    leaves: Leaves = {}

    def choose(keys: tuple, grad: Any, param: Any) -> None:
      path = paths.join(keys)
      if grad is None or (exclude is not None and exclude(path, param)):
        return
      checks.check_leaf(path, grad, param)
      names = axis_name(path, param) if callable(axis_name) else axis_name
      names = tuple(names) if isinstance(names, list) else names
      axes = layouts.unit_axes(path, param, rule(path, param), strict, names)
      leaves[keys] = Leaf(grad, param, axes, names, group_of(path, param))

    def is_none(x: Any) -> bool:
      return x is None

    jax.tree_util.tree_map_with_path(choose, updates, params, is_leaf=is_none)
    equation = functools.partial(_factors, clipping=max_ratio, eps=min_norm)
    results, groups = scale_units(leaves, equation)
    clipped = jax.tree_util.tree_map_with_path(
      lambda keys, grad: results.get(keys, grad), updates, is_leaf=is_none
    )
    if not isinstance(state, AGCState):
      return clipped, state
    new = sorted(groups.keys() - state.statistics.keys())
    if statistics and new:
      raise ValueError(
        f'`init` saw no parameter in the group {", ".join(map(repr, new))}; '
        'pass it the parameters that are updated'
      )
    # Keep all of `init`'s groups, so that `lax.scan` can carry the state.
    latest = {k: unit_statistics(groups.get(k, [])) for k in state.statistics}
    return clipped, AGCState(optax.safe_increment(state.count), latest)

  return optax.GradientTransformation(init, update)


def _factors(
  grads: tuple[jax.Array, jax.Array],
  weights: tuple[jax.Array, jax.Array],
  clipping: Number,
  eps: Number,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array]:
  """Returns equation 3's factor, whether each unit is clipped, and its ratio.

  Takes `norms.scaled_norm` of the units. The factor is a product of two, which
  may underflow.
  """
  (g_scale, g_norm), (w_scale, w_norm) = grads, weights
  w_norm = jnp.maximum(w_norm / w_scale, eps)  # ‖W_i‖*
  max_norm = clipping * w_norm  # λ ‖W_i‖*
  limit = max_norm * g_scale
  # A non-finite unit becomes NaN as a whole.
  is_finite = jnp.isfinite(g_norm) & jnp.isfinite(w_norm)
  keep = (g_norm < limit) & is_finite
  factor = max_norm / jnp.maximum(g_norm, _DIV_EPS * g_scale)
  factor = jnp.where(is_finite, factor, jnp.nan)
  # The barrier lets per-unit factors fuse into the optimizer; an elementwise
  # select would write another copy.
  factors = jax.lax.optimization_barrier(
    (jnp.where(keep, 1.0, g_scale), jnp.where(keep, 1.0, factor))
  )
  return factors, g_norm > limit, g_norm / g_scale / w_norm
