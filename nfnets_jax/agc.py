"""Adaptive gradient clipping (AGC) as an optax gradient transformation.

Needs jax and optax only, and can be used in any JAX project:

  optimizer = optax.chain(
      nfnets_jax.agc.adaptive_grad_clip(0.01), optax.sgd(0.1, 0.9))

For every unit i of a parameter W with gradient G, that is for all the weights
which feed one output, AGC bounds the gradient by the size of the weights:

  G_i → λ · max(‖W_i‖, ε) / ‖G_i‖ · G_i   if ‖G_i‖ > λ · max(‖W_i‖, ε)
  G_i → G_i                                otherwise

What a unit is depends on how an array lies. Without options it is the released
rule, for layouts with the outputs last: a scalar or vector is one unit, of
`[I, O]` and of three axes the first is summed over, and of `[H, W, I, O]` the
first three. Any other is named: see `adaptive_grad_clip`, and docs/agc.md for
what to leave out and for recipes for Haiku, Flax and Equinox.

Differences:
  * A parameter with at most one dimension longer than 1 is one unit, whatever
    its rank, as in the released code: so are `(1, O)` matrices, unless their
    layout is named.
  * Norms are taken in float32 at least, and do not overflow.
  * Subnormal numbers, below 1.2e-38 in float32, may become zero, as in most of
    what XLA computes.

Reference:
  Brock et al. 2021, section 4, equation 3.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Keeps the division finite where a gradient is zero; published value.
_DIV_EPS = 1e-6

# How the units of a leaf are told: the name of its layout, or the axes that are
# summed over; None is the released rule.
Units = str | tuple[int, ...] | None
# The path of a leaf, joined by '/', and the leaf.
UnitsRule = Callable[[str, Any], Units]
Number = float | jax.Array
Clipping = Number | Callable[[jax.Array], Number]

_CHOICES = (
  "name its layout, such as 'HWIO', 'IO', 'OIHW', 'OI', 'WIO' or, with a "
  "stacked axis before the rest, 'SIO' or 'S*'; give the axes to sum over, "
  'such as (0, 1); or exclude it'
)


class Statistics(NamedTuple):
  """What a step did to a group of parameters.

  Attributes:
    clipped: share of the units that were clipped, in [0, 1].
    largest: largest ratio ‖G_i‖ / max(‖W_i‖, ε) before clipping.
  """

  clipped: jax.Array
  largest: jax.Array


class AGCState(NamedTuple):
  """State of the transformation, if it needs one.

  Attributes:
    count: updates made, int32, for schedules.
    statistics: of the last update, by group; empty if they are off.
  """

  count: jax.Array  # type: ignore[assignment]
  statistics: dict[str, Statistics]


def adaptive_grad_clip(
  clipping: Clipping | Mapping[str, Clipping],
  eps: Number = 1e-3,
  *,
  units: Units | Sequence[str] | UnitsRule | Any = None,
  strict: bool = False,
  exclude: Callable[[str, Any], bool] | None = None,
  group: Callable[[str, Any], str] | None = None,
  nonfinite: Literal['propagate', 'zero', 'keep'] = 'propagate',
  axis_name: Any = None,
  statistics: bool = False,
) -> optax.GradientTransformation:
  """Clips each unit's gradient to a multiple of the norm of its weights.

  Paths are those of `jax.tree_util.keystr`, joined by '/', such as
  'params/Dense_0/kernel'.

  Args:
    clipping: λ, the largest allowed ratio of gradient norm to weight norm,
      above 0: a number, a schedule from the number of updates made, or either
      by the name of a group. The paper uses 0.01 for batches of 1024 to 4096;
      smaller batches bear larger values.
    eps: ε, lower bound of a weight norm, above 0, so that parameters which
      start at zero can move.
    units: what a unit is. The name of a layout, a letter an axis: a unit has an
      index each of `O` (output) and `S` (stacked by a scan or vmap), and all of
      the others; `*` at the end stands for the released rule for the rest. It
      is for leaves of that many axes, and a list of names for those of each.
      Or a tuple of the axes to sum over, for all leaves. Or a function
      `(path, leaf)` to one of these or None, or a tree of these like the
      parameters. None is the released rule.
    strict: whether to refuse what the released rule can mistake, three axes and
      a single index of all but one, unless its units are told.
    exclude: `(path, leaf)` to whether a leaf is left as it is; `is_head` is the
      paper's choice.
    group: `(path, leaf)` to the name of its group, for `clipping` by group and
      for `statistics`.
    nonfinite: what becomes of a unit whose gradient, or weight, is infinite or
      no number: 'propagate' makes all of the unit no number, so that it shows;
      'zero' drops it; 'keep' leaves it as it is.
    axis_name: of the mapped axes that a leaf's units are spread over, for
      `shard_map`: a name, a tuple, or a function `(path, leaf)` to either or
      None. Only for leaves whose summed axes are sharded.
    statistics: whether the state holds `Statistics` of the last update.

  Returns:
    A transformation. Its `update(updates, state, params)` needs the parameters
    and keeps each leaf's dtype. It is stateless without a schedule and
    statistics, and has an `AGCState` with them.

  Raises:
    ValueError: if `clipping`, `eps` or another option is impossible; in an
      update, if the parameters are not given or of other shapes, or the units
      of a leaf not known.
    TypeError: in an update, for leaves that are not real and floating.

  Example:
    >>> params = {'w': jnp.array([[3.0], [4.0]])}
    >>> grads = {'w': jnp.array([[30.0], [40.0]])}
    >>> agc = adaptive_grad_clip(0.1)
    >>> clipped, _ = agc.update(grads, agc.init(params), params)
    >>> bool(jnp.allclose(clipped['w'], 0.01 * grads['w']))  # norm 50 to 0.5
    True
    >>> torch_like = adaptive_grad_clip(0.1, units=['OI', 'OIHW'])
    >>> agc = adaptive_grad_clip(0.01, exclude=is_head, statistics=True)

  Reference:
    Brock et al. 2021, section 4, equation 3.
  """
  by_group = clipping if isinstance(clipping, Mapping) else None
  all_clippings = list(by_group.values()) if by_group else [clipping]
  for value in [*all_clippings, eps]:
    if isinstance(value, int | float | np.number) and not value > 0:
      raise ValueError(
        f'clipping and eps must be positive, got {clipping} and {eps}; to '
        'train without clipping, leave the transformation out'
      )
  if by_group is not None and (group is None or not by_group):
    raise ValueError(
      'clipping by group needs the groups: give group=(path, leaf) → name'
    )
  if nonfinite not in ('propagate', 'zero', 'keep'):
    raise ValueError(
      f"nonfinite is {nonfinite!r}; use 'propagate', 'zero' or 'keep'"
    )
  counts = any(map(callable, all_clippings))

  def clipping_of(name: str, count: jax.Array | None) -> Number:
    chosen: Any
    if by_group is None:
      chosen = clipping
    elif name in by_group:
      chosen = by_group[name]
    else:
      raise ValueError(
        f'there is no clipping for the group {name!r}, only for '
        f'{", ".join(map(repr, by_group))}'
      )
    if not callable(chosen):
      return chosen
    if count is None:
      raise ValueError('a schedule needs the state that `init` returns')
    return chosen(count)

  def init(params: Any) -> Any:
    if not counts and not statistics:
      return optax.EmptyState()
    zero = Statistics(jnp.zeros(()), jnp.zeros(()))
    names = {
      _name_of(group, path, x)
      for path, x in _leaves(params)
      if exclude is None or not exclude(path, x)
    }
    return AGCState(
      jnp.zeros((), jnp.int32),
      dict.fromkeys(sorted(names), zero) if statistics else {},
    )

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    if params is None:
      raise ValueError(
        'adaptive_grad_clip needs the parameters: call '
        'update(updates, state, params)'
      )
    count = state.count if isinstance(state, AGCState) else None
    told = _told_units(units, params)
    seen: dict[str, list[_Clipped]] = {}

    def clip(path: tuple, grad: Any, param: Any) -> Any:
      if grad is None:
        return None
      where = _joined(path)
      if exclude is not None and exclude(where, param):
        return grad
      _check_shape(where, grad, param)
      name = _name_of(group, where, param)
      names = axis_name(where, param) if callable(axis_name) else axis_name
      done = _clip(
        grad,
        param,
        clipping_of(name, count),
        eps,
        _axes(where, param, told(where, param), strict),
        nonfinite,
        names,
      )
      seen.setdefault(name, []).append(done)
      return done.updates

    clipped = jax.tree_util.tree_map_with_path(
      clip, updates, params, is_leaf=lambda x: x is None
    )
    if isinstance(state, AGCState):
      found = {k: _summary(v) for k, v in seen.items()} if statistics else {}
      state = AGCState(optax.safe_increment(state.count), found)
    return clipped, state

  return optax.GradientTransformation(init, update)


def unitwise_norm(
  x: jax.Array, units: Units = None, *, axis_name: Any = None
) -> jax.Array:
  """Returns the L2 norm of each unit, in a shape that broadcasts against `x`.

  Args:
    x: an array of at most four axes, or of any number with `units`.
    units: its layout or the axes to sum over; see `adaptive_grad_clip`.
    axis_name: of mapped axes that the units are spread over.

  Returns:
    The norms, float32 or wider.

  Raises:
    ValueError: if the units are not known.
    TypeError: if `x` is not of a real floating dtype.

  Example:
    >>> unitwise_norm(jnp.array([[3.0, 0.0], [4.0, 1.0]])).tolist()
    [[5.0, 1.0]]
    >>> unitwise_norm(jnp.array([[3.0, 4.0], [0.0, 1.0]]), 'OI').tolist()
    [[5.0], [1.0]]
  """
  _check_dtype('', x)
  axes = _axes('', x, units, strict=False)
  return _sqrt(_sum_of_squares(_wide(x), axes, axis_name))


class Row(NamedTuple):
  """A parameter in a `Summary`.

  Attributes:
    path: joined by '/'.
    shape: of the parameter.
    units: how many it has.
    median: of the ratios ‖G_i‖ / max(‖W_i‖, ε) of its units.
    largest: of them.
  """

  path: str
  shape: tuple[int, ...]
  units: int
  median: float
  largest: float


class Summary(NamedTuple):
  """How large the gradients of a step are beside the parameters.

  Attributes:
    rows: a parameter each, the largest ratio first.
    ratios: of all units, in no order.
  """

  rows: tuple[Row, ...]
  ratios: np.ndarray

  def __str__(self) -> str:
    """A table of the parameters."""
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
  """Tells the ratios that λ is compared with, to find one.

  Args:
    grads: of the whole batch, before clipping.
    params: the same structure.
    eps: as for `adaptive_grad_clip`.
    units: as there.
    strict: as there.
    exclude: as there; what is left out is not in the table.

  Returns:
    The table, on the host; `print` it.

  Raises:
    ValueError: as an update of `adaptive_grad_clip`, or if a gradient has no
      parameter.

  Example:
    >>> params = {'a': jnp.ones((4, 2)), 'b': jnp.zeros(2)}
    >>> grads = jax.tree.map(lambda x: 0.1 * jnp.ones_like(x), params)
    >>> print(summarize(grads, params))
    parameter   units     median    largest
    b               1        141        141
    a               2        0.1        0.1
  """
  told = _told_units(units, params)
  rows: list[Row] = []
  ratios: list[np.ndarray] = []
  values = dict(_leaves(params))
  for path, grad in _leaves(grads):
    if path not in values:
      raise ValueError(f'there is a gradient of {path}, but no such parameter')
    param = values[path]
    _check_shape(path, grad, param)
    if exclude is not None and exclude(path, param):
      continue
    axes = _axes(path, param, told(path, param), strict)
    with np.errstate(over='ignore', invalid='ignore'):
      norm, w_norm = (
        np.sqrt(np.sum(np.asarray(x, np.float64) ** 2, axis=axes))
        for x in (grad, param)
      )
      ratio = np.ravel(norm / np.maximum(w_norm, eps))
    ratios.append(ratio)
    rows.append(
      Row(
        path,
        tuple(param.shape),
        ratio.size,
        float(np.median(ratio)),
        float(np.max(ratio)),
      )
    )
  rows.sort(key=lambda row: -row.largest)
  return Summary(tuple(rows), np.concatenate(ratios or [np.zeros(0)]))


def suggest_clipping(summaries: Iterable[Summary], share: float = 0.1) -> float:
  """Suggests a λ that would have clipped a share of the units of some steps.

  A heuristic, to start a search from: the paper found its λ by training, 0.01
  for batches of 1024 to 4096, and larger ones for smaller batches, whose
  gradients are noisier. Take steps after the warm-up of a run that is stable.

  Args:
    summaries: of some steps.
    share: of the units, in (0, 1).

  Returns:
    λ.

  Raises:
    ValueError: if there is nothing to go by, or the share is impossible.

  Example:
    >>> params = {'w': jnp.ones((1, 1, 1, 100))}
    >>> grads = {'w': jnp.arange(100.0).reshape(1, 1, 1, 100)}
    >>> few = summarize(grads, params, units='HWIO')
    >>> round(suggest_clipping([few], share=0.1), 1)
    89.1
  """
  if not 0 < share < 1:
    raise ValueError(
      f'share {share} is no part of the units; use one in (0, 1)'
    )
  ratios = [x.ratios[np.isfinite(x.ratios)] for x in summaries]
  if not sum(x.size for x in ratios):
    raise ValueError('there are no finite ratios to suggest a clipping from')
  return float(np.quantile(np.concatenate(ratios), 1 - share))


def is_head(path: str, leaf: Any) -> bool:
  """Tells the weights of the classifier, which the paper does not clip.

  It knows the weights of `NET/~/linear` in Haiku, where NET is the outermost
  module, and of an outermost `head`, `classifier`, `fc`, `logits` or `output`
  in any library. Its bias is clipped. For other names write such a function.

  Args:
    path: of a leaf.
    leaf: the parameter.

  Returns:
    Whether it is one.

  Example:
    >>> paths = ['NFNet/~/linear/w', 'NFNet/~/block/~/gate/~/linear/w']
    >>> [is_head(path, None) for path in [*paths, 'params/head/kernel']]
    [True, False, True]
  """
  del leaf
  return _HEAD.fullmatch(path) is not None


_HEAD = re.compile(
  r'\w+/~/linear/w'
  r'|(params/|\w+/~/)?(head|classifier|fc|logits|output)/(kernel|weight|w)'
  r'(/value)?'
)


class _Clipped(NamedTuple):
  """A leaf's update, and of its units: clipped or not, and the ratio."""

  updates: jax.Array
  is_clipped: jax.Array
  ratio: jax.Array


def _clip(
  grad: jax.Array,
  param: jax.Array,
  clipping: Number,
  eps: Number,
  axes: tuple[int, ...],
  nonfinite: str,
  axis_name: Any,
) -> _Clipped:
  g, w = _wide(grad), _wide(param)
  g_sum = _sum_of_squares(g, axes, axis_name)
  w_sum = _sum_of_squares(w, axes, axis_name)

  def plain() -> tuple[jax.Array, ...]:
    # A 1 of the kind that the others are: `shard_map` tells them apart.
    one = jnp.where(jnp.isnan(g_sum), 1.0, 1.0).astype(g.dtype)
    return one, _sqrt(g_sum), _sqrt(w_sum)

  def scaled() -> tuple[jax.Array, ...]:
    g_scale, g_norm = _scaled_norm(g, g_sum, axes, axis_name)
    w_scale, w_norm = _scaled_norm(w, w_sum, axes, axis_name)
    return g_scale, g_norm, w_norm / w_scale

  # Squares overflow above 1e19 in float32: rare enough for a second pass.
  overflow = jnp.any(jnp.isinf(g_sum)) | jnp.any(jnp.isinf(w_sum))
  if axis_name is None:
    scale, g_norm, w_norm = jax.lax.cond(overflow, scaled, plain)
  else:
    scale, g_norm, w_norm = scaled()
  max_norm = clipping * jnp.maximum(w_norm, eps)
  limit = max_norm * scale
  factor = max_norm / jnp.maximum(g_norm, _DIV_EPS * scale)
  bad = ~(jnp.isfinite(g_norm) & jnp.isfinite(w_norm))
  keep = (g_norm < limit) & ~bad
  if nonfinite == 'keep':
    keep = keep | bad
  elif nonfinite == 'propagate':
    factor = jnp.where(bad, jnp.nan, factor)
  # Products by one number a unit are fused into what the optimiser does next,
  # with the barrier; a choice for each element would be a pass of its own.
  once, again = jax.lax.optimization_barrier(
    (jnp.where(keep, 1.0, scale), jnp.where(keep, 1.0, factor))
  )
  out = g * once * again
  if nonfinite == 'zero':
    out = jnp.where(bad, 0.0, out)
  ratio = g_norm / scale / jnp.maximum(w_norm, eps)
  return _Clipped(out.astype(grad.dtype), ~keep, ratio)


def _scaled_norm(
  x: jax.Array, total: jax.Array, axes: tuple[int, ...], axis_name: Any
) -> tuple[jax.Array, jax.Array]:
  """For each unit a power of two s, 1 unless `total` is infinite, and ‖s·x‖."""
  # So scaled, the squares of such a unit neither overflow nor vanish.
  small = np.asarray(2.0 ** (-5 * jnp.finfo(x.dtype).maxexp // 8), x.dtype)
  scale = jnp.where(jnp.isinf(total), small, small.dtype.type(1))
  return scale, _sqrt(_sum_of_squares(x * scale, axes, axis_name))


def _sum_of_squares(
  x: jax.Array, axes: tuple[int, ...], axis_name: Any
) -> jax.Array:
  total = jnp.sum(x**2, axis=axes, keepdims=True)
  return total if axis_name is None else jax.lax.psum(total, axis_name)


def _sqrt(x: jax.Array) -> jax.Array:
  """The square root, whose gradient at 0 is 0."""
  # A NaN is not above 0, and stays one.
  zero = x == 0
  return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, x)))


def _wide(x: jax.Array) -> jax.Array:
  return jnp.asarray(x, jnp.float32 if x.dtype.itemsize < 4 else x.dtype)


def _check_dtype(path: str, x: jax.Array) -> None:
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(
      f'AGC needs real floating-point leaves, got {x.dtype}'
      + (f' at {path}; exclude it' if path else '')
    )


def _check_shape(path: str, grad: jax.Array, param: jax.Array) -> None:
  if grad.shape != param.shape:
    raise ValueError(
      f'the gradient of {path} has the shape {grad.shape}, the parameter '
      f'{param.shape}; give the parameters that it was taken by'
    )


def _axes(
  path: str, x: jax.Array, units: Units, strict: bool
) -> tuple[int, ...]:
  """The axes to sum over."""
  _check_dtype(path, x)
  if isinstance(units, tuple):
    if not all(isinstance(a, int) and -x.ndim <= a < x.ndim for a in units):
      raise ValueError(f'{path} of shape {x.shape} has no axes {units}')
    return tuple(sorted({axis % x.ndim for axis in units}))
  if units is None:
    return _released_axes(path, x.shape, strict)
  stacked = units.removesuffix('*')
  if not re.fullmatch(r'[A-Z]*\*?', units) or not (
    len(stacked) == x.ndim
    or (units.endswith('*') and len(stacked) < x.ndim and {*stacked} <= {'S'})
  ):
    raise ValueError(
      f'{path} of shape {x.shape} does not lie as {units!r}; {_CHOICES}'
    )
  if units.endswith('*'):
    rest = _released_axes(path, x.shape[len(stacked) :], strict)
    return tuple(len(stacked) + axis for axis in rest)
  return tuple(i for i, letter in enumerate(units) if letter not in 'OS')


def _released_axes(
  path: str, shape: tuple[int, ...], strict: bool
) -> tuple[int, ...]:
  of = f' {path}' if path else ''
  ndim = len(shape)
  if ndim > 4:
    raise ValueError(
      f'AGC does not know the units of a parameter{of} of shape {shape}; '
      f'{_CHOICES}'
    )
  single = sum(size > 1 for size in shape) <= 1
  if strict and ndim > 1 and (single or ndim == 3):
    raise ValueError(
      f'what the units of a parameter{of} of shape {shape} are is ambiguous; '
      f'{_CHOICES}'
    )
  if single:
    return tuple(range(ndim))
  return (0, 1, 2) if ndim == 4 else (0,)


def _told_units(units: Any, params: Any) -> UnitsRule:
  """A function from path and leaf to units, from all the forms there are."""
  if units is None or (
    isinstance(units, tuple) and all(isinstance(a, int) for a in units)
  ):
    return lambda path, leaf: units
  if callable(units):
    return units
  if isinstance(units, str):
    units = [units]
  if isinstance(units, list | tuple) and all(isinstance(x, str) for x in units):
    ranks = {len(x): x for x in units if not x.endswith('*')}
    if len(ranks) < len(units):
      raise ValueError(
        f'units {units} name two layouts of as many axes, or one of any '
        'number; tell them apart with a function (path, leaf) → layout'
      )
    return lambda path, leaf: ranks.get(leaf.ndim)
  labels = dict(
    _leaves(units, is_leaf=lambda x: x is None or isinstance(x, str | tuple))
  )
  missing = [path for path, _ in _leaves(params) if path not in labels]
  if missing:
    raise ValueError(
      f'units is no tree like the parameters: it lacks {", ".join(missing[:5])}'
    )
  return lambda path, leaf: labels[path]


def _leaves(tree: Any, is_leaf: Any = None) -> list[tuple[str, Any]]:
  flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
  return [(_joined(path), x) for path, x in flat]


def _joined(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _name_of(group: Any, path: str, leaf: Any) -> str:
  return 'all' if group is None else group(path, leaf)


def _summary(clipped: Sequence[_Clipped]) -> Statistics:
  count = sum(x.ratio.size for x in clipped)
  total = jnp.stack([jnp.sum(x.is_clipped, dtype=jnp.float32) for x in clipped])
  largest = [jnp.max(x.ratio, initial=0.0).astype(jnp.float32) for x in clipped]
  return Statistics(total.sum() / max(1, count), jnp.stack(largest).max())
