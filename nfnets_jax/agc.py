"""Adaptive gradient clipping (AGC) as an optax gradient transformation.

Needs jax and optax only, and can be used in any JAX project:

  optimizer = optax.chain(
      nfnets_jax.agc.adaptive_grad_clip(0.01), optax.sgd(0.1, 0.9))

For every unit i of a parameter W with gradient G, that is for all the weights
which feed one output, AGC bounds the gradient by the size of the weights:

  G_i → λ · max(‖W_i‖, ε) / ‖G_i‖ · G_i   if ‖G_i‖ > λ · max(‖W_i‖, ε)
  G_i → G_i                                otherwise

A unit's axes depend on the array layout. Without options it is the released
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

  Zero for a group without gradients. Inside `shard_map`, which shows a part of
  the parameters, it is of this part: take `pmean` and `pmax` over the axis.

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
  'params/Dense_0/kernel', without the attribute `value` at the end that an
  `nnx.Param` has at times. `init` raises if an option matches no
  parameter, unless `optax.masked` or `partition` hides some of them.

  Args:
    clipping: λ, the largest allowed ratio of gradient norm to weight norm,
      above 0: a number, a schedule from the number of updates made, or either
      by the name of a group. The paper uses 0.01 for batches of 1024 to 4096;
      smaller batches bear larger values. Traced values are not checked.
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
      paper's choice. It must match a leaf.
    group: `(path, leaf)` to the name of its group, for `clipping` by group,
      whose groups must all have leaves, and for `statistics`.
    nonfinite: what becomes of a unit whose gradient, or weight, is infinite or
      no number: 'propagate' makes all of the unit no number, so that it shows;
      'zero' drops it; 'keep' leaves it as it is.
    axis_name: of the mapped axes that a leaf's units are spread over, for
      `shard_map`: a name, a tuple, or a function `(path, leaf)` to either or
      None. Only for leaves whose summed axes are sharded; those of more than
      one axis need `units`, since a shard's shape does not tell them.
    statistics: whether the state holds `Statistics` of the last update.

  Returns:
    A transformation. Its `update(updates, state, params)` needs the parameters
    and keeps each leaf's dtype (float64 needs `jax_enable_x64`, as in jax). It
    is stateless without a schedule and statistics, and has an `AGCState` with
    them.

  Raises:
    ValueError: if `clipping`, `eps` or another option is impossible; in `init`,
      if an option matches no parameter or `is_head` not just one; in an update,
      if the parameters are not given or of other shapes, or the units of a leaf
      not known.
    TypeError: in an update, for leaves that are no real floating-point arrays.

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

  def positive(value: Any, shown: Any) -> Any:
    return _positive(
      value,
      f'clipping and eps must be positive, got {shown!r} and {eps!r}; give '
      'finite numbers, not strings, booleans or arrays with axes, and leave '
      'the transformation out to train without clipping',
    )

  given: Any = {'': clipping} if by_group is None else by_group
  clippings = {
    name: value if callable(value) else positive(value, clipping)
    for name, value in given.items()
  }
  min_norm = positive(eps, clipping)
  if by_group is not None and (group is None or not by_group):
    raise ValueError(
      'clipping by group needs the groups: give group=(path, leaf) → name'
    )
  if nonfinite not in ('propagate', 'zero', 'keep'):
    raise ValueError(
      f"nonfinite is {nonfinite!r}; use 'propagate', 'zero' or 'keep'"
    )
  counts = any(map(callable, clippings.values()))

  def clipping_of(name: str) -> Any:
    if by_group is None:
      return clippings['']
    if name not in by_group:
      raise ValueError(
        f'there is no clipping for the group {name!r}, only for '
        f'{", ".join(map(repr, by_group))}'
      )
    return clippings[name]

  def init(params: Any) -> Any:
    _told_units(units, params)
    names = {_name_of(group, path, x) for path, x in _kept(exclude, params)}
    for name in names:
      clipping_of(name)
    unused = sorted(set(by_group or ()) - names)
    if unused and _is_whole(params):
      raise ValueError(
        f'no parameter is in the group {", ".join(map(repr, unused))} of '
        f'clipping; group returns {", ".join(map(repr, sorted(names)))}'
      )
    if not counts and not statistics:
      return optax.EmptyState()
    return AGCState(
      jnp.zeros((), jnp.int32),
      {name: _summary([]) for name in sorted(names)} if statistics else {},
    )

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    if params is None:
      raise ValueError(
        'adaptive_grad_clip needs the parameters: call '
        'update(updates, state, params)'
      )
    if counts and not isinstance(state, AGCState):
      raise ValueError('a schedule needs the state that `init` returns')
    told = _told_units(units, params)
    seen: dict[str, list[_Clipped]] = {}

    def clip(path: tuple, grad: Any, param: Any) -> Any:
      if grad is None:
        return None
      where = _joined(path)
      if exclude is not None and exclude(where, param):
        return grad
      _check_leaf(where, grad, param)
      name = _name_of(group, where, param)
      names = axis_name(where, param) if callable(axis_name) else axis_name
      limit = clipping_of(name)
      if callable(limit):
        value = limit(state.count)
        limit = positive(value, value)
      done = _clip(
        grad,
        param,
        limit,
        min_norm,
        _axes(where, param, told(where, param), strict, names),
        nonfinite,
        names,
      )
      seen.setdefault(name, []).append(done)
      return done.updates

    clipped = jax.tree_util.tree_map_with_path(
      clip, updates, params, is_leaf=lambda x: x is None
    )
    if isinstance(state, AGCState):
      new = sorted(seen.keys() - state.statistics.keys()) if statistics else []
      if new:
        raise ValueError(
          f'`init` saw no parameter in the group {", ".join(map(repr, new))}; '
          'give it the parameters that are updated'
        )
      # The same groups each time, so that `lax.scan` can carry the state.
      found = {k: _summary(seen.get(k, [])) for k in state.statistics}
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
    axis_name: of mapped axes that the units are spread over, with `units`.

  Returns:
    The norms, float32 or wider.

  Raises:
    ValueError: if the units are not known.
    TypeError: if `x` is no array of a real floating dtype.

  Example:
    >>> unitwise_norm(jnp.array([[3.0, 0.0], [4.0, 1.0]])).tolist()
    [[5.0, 1.0]]
    >>> unitwise_norm(jnp.array([[3.0, 4.0], [0.0, 1.0]]), 'OI').tolist()
    [[5.0], [1.0]]
  """
  _check_dtype('', x)
  axes = _axes('', x, units, False, axis_name)
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
  """Summarizes gradient-to-weight norm ratios, to choose λ.

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
    ValueError: as for `adaptive_grad_clip`, or if a gradient has no parameter.
    TypeError: as there.

  Example:
    >>> params = {'a': jnp.ones((4, 2)), 'b': jnp.zeros(2)}
    >>> grads = jax.tree.map(lambda x: 0.1 * jnp.ones_like(x), params)
    >>> print(summarize(grads, params))
    parameter   units     median    largest
    b               1        141        141
    a               2        0.1        0.1
  """
  min_norm = _positive(eps, f'eps must be a positive number, got {eps!r}')
  told = _told_units(units, params)
  kept = dict(_kept(exclude, params))
  rows: list[Row] = []
  ratios: list[np.ndarray] = []
  values = dict(_leaves(params))
  for path, grad in _leaves(grads):
    if path not in values:
      raise ValueError(f'there is a gradient of {path}, but no such parameter')
    param = values[path]
    if path not in kept:
      continue
    _check_leaf(path, grad, param)
    axes = _axes(path, param, told(path, param), strict, None)
    with np.errstate(over='ignore', invalid='ignore'):
      norm, w_norm = (
        np.sqrt(np.sum(np.asarray(x, np.float64) ** 2, axis=axes))
        for x in (grad, param)
      )
      ratio = np.ravel(norm / np.maximum(w_norm, min_norm))
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
  message = f'share {share!r} is no part of the units; use one in (0, 1)'
  share = _positive(share, message)
  if share >= 1:
    raise ValueError(message)
  ratios = [x.ratios[np.isfinite(x.ratios)] for x in summaries]
  if not sum(x.size for x in ratios):
    raise ValueError('there are no finite ratios to suggest a clipping from')
  return float(np.quantile(np.concatenate(ratios), 1 - share))


def is_head(path: str, leaf: Any) -> bool:
  """Tells the weights of the classifier, which the paper does not clip.

  It knows the weights of `NET/~/linear` and `NET/linear` in Haiku, where NET is
  the outermost module, and in any library those of an outermost `head`,
  `lm_head`, `classifier`, `classification_head`, `fc`, `logits`, `out`,
  `output`, `output_layer` or `score`, or of a `fc` or `out_proj` in it.
  Its bias is clipped. A path does not tell which of several layers is the last:
  as `exclude` it must match exactly one leaf, and not the first of several such
  as `NET/linear` beside `NET/linear_1`. For other names write such a function.

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
  r'\w+/(~/)?linear/w'
  r'|(params/|\w+/(~/)?(?=.*/w$))?'
  r'(head|heads/head|lm_head|classifier|classification_head|fc|logits|out'
  r'|output|output_layer|score)(/(~/)?(fc|out_proj))?'
  r'/(kernel|weight|w)(/value)?'
)


def _check_head(found: Sequence[str], paths: Sequence[str]) -> None:
  """Refuses what `is_head` found if it can be another layer than the last."""
  module, _, name = found[0].rpartition('/')
  net = module.split('/')[0] + '/'
  inner = not all(path.startswith(net) for path in paths)
  inner = inner and module.endswith('/linear')
  if len(found) > 1 or inner or f'{module}_1/{name}' in paths:
    raise ValueError(
      f'is_head matches {", ".join(found)}, which need not be the classifier; '
      f'{_exclude_by_path(paths)}'
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
  scale, g_norm = _scaled_norm(g, axes, axis_name)
  w_scale, w_norm = _scaled_norm(w, axes, axis_name)
  w_norm = w_norm / w_scale
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
  return _Clipped(out.astype(_dtype(grad)), ~keep, ratio)


def _scaled_norm(
  x: jax.Array, axes: tuple[int, ...], axis_name: Any
) -> tuple[jax.Array, jax.Array]:
  """For each unit a power of two s, 1 unless squares overflow, and ‖s·x‖."""
  # Squares overflow above 1e19 in float32. So scaled, those of such a unit
  # neither overflow nor vanish. Both sums are taken in one pass.
  small = np.asarray(2.0 ** (-5 * jnp.finfo(x.dtype).maxexp // 8), x.dtype)
  total = _sum_of_squares(x, axes, axis_name)
  scaled = _sum_of_squares(x * small, axes, axis_name)
  overflows = jnp.isinf(total)
  scale = jnp.where(overflows, small, small.dtype.type(1))
  return scale, _sqrt(jnp.where(overflows, scaled, total))


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
  return jnp.asarray(x, jnp.float32 if x.dtype.itemsize < 4 else _dtype(x))


def _dtype(x: jax.Array) -> Any:
  """That of `x` in jax, where float64 is float32 unless it is switched on."""
  return jax.dtypes.canonicalize_dtype(x.dtype)


def _positive(value: Any, message: str) -> Any:
  """A finite real scalar above 0 as a float, and a traced one as it is."""
  if isinstance(value, jax.core.Tracer):
    if value.shape or not _is_real(value.dtype):
      raise ValueError(message)
    return value
  if not isinstance(value, int | float | np.generic | np.ndarray | jax.Array):
    raise ValueError(message)
  array = np.asarray(value)
  if array.shape or not _is_real(array.dtype):
    raise ValueError(message)
  if not 0 < np.float32(min(float(array), np.inf)) < np.inf:
    raise ValueError(message)
  return float(array)


def _is_real(dtype: Any) -> bool:
  return any(jnp.issubdtype(dtype, x) for x in (jnp.floating, jnp.integer))


def _check_dtype(path: str, x: Any) -> None:
  dtype = getattr(x, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    found = f'a Python {type(x).__name__}' if dtype is None else dtype
    remedy = 'make it an array or exclude it' if dtype is None else 'exclude it'
    raise TypeError(
      f'AGC needs real floating-point leaves, got {found}'
      + (f' at {path}; {remedy}' if path else '')
    )


def _check_leaf(path: str, grad: Any, param: Any) -> None:
  _check_dtype(path, param)
  _check_dtype(path, grad)
  if grad.shape != param.shape:
    raise ValueError(
      f'the gradient of {path} has the shape {grad.shape}, the parameter '
      f'{param.shape}; give the parameters that it was taken by'
    )


def _axes(
  path: str, x: jax.Array, units: Units, strict: bool, axis_name: Any
) -> tuple[int, ...]:
  """The axes to sum over."""
  if isinstance(units, tuple):
    if not all(
      isinstance(axis, int | np.integer)
      and not isinstance(axis, bool)
      and -x.ndim <= axis < x.ndim
      for axis in units
    ):
      raise ValueError(f'{path} of shape {x.shape} has no axes {units}')
    return tuple(sorted({int(axis) % x.ndim for axis in units}))
  if units is None:
    return _released_axes(path, x.shape, strict, axis_name)
  stacked = units.removesuffix('*') if isinstance(units, str) else ''
  if not re.fullmatch(r'[A-Z]*\*?', str(units)) or not (
    len(stacked) == x.ndim
    or (units.endswith('*') and len(stacked) < x.ndim and {*stacked} <= {'S'})
  ):
    raise ValueError(
      f'{path} of shape {x.shape} does not have the layout {units!r}; '
      f'{_CHOICES}'
    )
  if units.endswith('*'):
    rest = _released_axes(path, x.shape[len(stacked) :], strict, axis_name)
    return tuple(len(stacked) + axis for axis in rest)
  return tuple(i for i, letter in enumerate(units) if letter not in 'OS')


def _released_axes(
  path: str, shape: tuple[int, ...], strict: bool, axis_name: Any
) -> tuple[int, ...]:
  of = f' {path}' if path else ''
  ndim = len(shape)
  if ndim > 4:
    raise ValueError(
      f'AGC does not know the units of a parameter{of} of shape {shape}; '
      f'{_CHOICES}'
    )
  if axis_name is not None and ndim > 1:
    raise ValueError(
      f'the units of a parameter{of} split over {axis_name!r} are not known '
      f'from the shape {shape} of a shard; {_CHOICES}'
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
    isinstance(units, tuple)
    and all(np.isscalar(x) and not isinstance(x, str) for x in units)
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
    found = {np.ndim(x) for _, x in _leaves(params)}
    if max(found, default=0) > 1 and not found & {*ranks} and _is_whole(params):
      raise ValueError(
        f'units {units} are of as many axes as no parameter; there are some of '
        f'{", ".join(map(str, sorted(found)))} axes'
      )
    return lambda path, leaf: ranks.get(leaf.ndim)
  labels = dict(
    _leaves(units, is_leaf=lambda x: x is None or isinstance(x, str | tuple))
  )
  missing = [path for path, _ in _leaves(params) if path not in labels]
  if missing:
    raise ValueError(
      'units is no layout, tuple of axes or function, and no tree like the '
      f'parameters: it lacks {", ".join(missing[:5])}'
    )
  return lambda path, leaf: labels[path]


def _leaves(tree: Any, is_leaf: Any = None) -> list[tuple[str, Any]]:
  flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
  return [(_joined(path), x) for path, x in flat]


def _joined(path: tuple) -> str:
  # An `nnx.Param` is a node of its own in `init` of `nnx.Optimizer` and a leaf
  # in its `update`.
  if path and path[-1] in _NNX_KEYS:
    path = path[:-1]
  return jax.tree_util.keystr(path, simple=True, separator='/')


_NNX_KEYS = tuple(map(jax.tree_util.GetAttrKey, ('value', 'raw_value')))


def _is_whole(params: Any) -> bool:
  """Whether all the parameters are seen; `optax.masked` hides some."""
  leaves = jax.tree.leaves(
    params, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
  )
  return bool(leaves) and not any(
    isinstance(x, optax.MaskedNode) for x in leaves
  )


def _kept(exclude: Any, params: Any) -> list[tuple[str, Any]]:
  """The leaves that are not excluded; refuses to exclude nothing."""
  leaves = _leaves(params)
  if exclude is None:
    return leaves
  paths = [path for path, _ in leaves]
  found = [path for path, x in leaves if exclude(path, x)]
  if found and exclude is is_head:
    _check_head(found, paths)
  elif not found and _is_whole(params):
    name = getattr(exclude, '__name__', repr(exclude))
    raise ValueError(
      f'exclude={name} matches no parameter; {_exclude_by_path(paths)}, or '
      'leave exclude out to clip all'
    )
  return [(path, x) for path, x in leaves if path not in set(found)]


def _exclude_by_path(paths: Sequence[str]) -> str:
  # The classifier is among the outermost.
  some = sorted(paths, key=lambda path: path.count('/'))[:20]
  return (
    f'the paths are {", ".join(some)}{", …" if len(paths) > 20 else ""}: '
    f'exclude by them, as with lambda path, leaf: path == {some[-1]!r}'
  )


def _name_of(group: Any, path: str, leaf: Any) -> str:
  return 'all' if group is None else group(path, leaf)


def _summary(clipped: Sequence[_Clipped]) -> Statistics:
  zero = jnp.zeros((), jnp.float32)
  count = sum(x.ratio.size for x in clipped)
  total = [jnp.sum(x.is_clipped, dtype=jnp.float32) for x in clipped]
  largest = [jnp.max(x.ratio, initial=0.0).astype(jnp.float32) for x in clipped]
  return Statistics(
    jnp.stack([zero, *total]).sum() / max(1, count),
    jnp.stack([zero, *largest]).max(),
  )
