"""Unit axes from array layouts.

A unit is the set of weights that feed one output. A layout has one letter per
axis: each index of `O` (outputs) and `S` (stacked layers of a scan or vmap) is
a separate unit; all other axes are summed over. A trailing `*` applies the
released rule to the remaining axes.

The released rule assumes outputs last: scalars and vectors are one unit, `[I,
O]` and rank 3 are summed over the first axis, `[H, W, I, O]` over the first
three.

Differences:
  * As in the released code, the rule treats an array with at most one axis
    longer than 1, such as a `(1, O)` matrix, as one unit. Layouts do not.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from nfnets_jax.agc import checks, norms, paths

# A layout or the axes to sum over; None is the released rule.
Units = str | tuple[int, ...] | None
# (path, leaf) → units.
UnitsRule = Callable[[str, Any], Units]

_CHOICES = (
  "name its layout, such as 'HWIO', 'IO', 'OIHW', 'OI', 'WIO' or, with a "
  "stacked axis first, 'SIO' or 'S*'; give the axes to sum over, such as "
  '(0, 1); or exclude it'
)


def unitwise_norm(
  x: jax.Array, units: Units = None, *, axis_name: Any = None
) -> jax.Array:
  """Returns the L2 norm of each unit, in a shape that broadcasts against `x`.

  The norms are float32 or wider.

  Args:
    x: an array of rank at most 4, or of any rank with `units`.
    units: layout or axes to sum over; see `adaptive_grad_clip`.
    axis_name: mapped axes that units are sharded over; requires `units`.

  Raises:
    ValueError: if the layout is unknown.
    TypeError: if `x` is not a real floating-point array.

  Example:
    >>> import jax.numpy as jnp
    >>> unitwise_norm(jnp.array([[3.0, 0.0], [4.0, 1.0]])).tolist()
    [[5.0, 1.0]]
    >>> unitwise_norm(jnp.array([[3.0, 4.0], [0.0, 1.0]]), 'OI').tolist()
    [[5.0], [1.0]]
  """
  checks.check_dtype('', x)
  axes = unit_axes('', x, units, False, axis_name)
  x = norms.widen(x)
  return norms.sqrt(norms.sum_of_squares(x, axes, axis_name))


def unit_axes(
  path: str, x: jax.Array, units: Units, strict: bool, axis_name: Any
) -> tuple[int, ...]:
  """Returns the axes of `x` to sum over."""
  if isinstance(units, tuple):
    if not all(_is_axis(axis, x.ndim) for axis in units):
      raise ValueError(
        f'{path} of shape {x.shape} has no axes {units}; give integers from '
        f'{-x.ndim} to {x.ndim - 1}'
      )
    return tuple(sorted({int(axis) % x.ndim for axis in units}))
  if units is None:
    return _released_axes(path, x.shape, strict, axis_name)
  letters = units.removesuffix('*') if isinstance(units, str) else ''
  if not re.fullmatch(r'[A-Z]*\*?', str(units)) or not (
    len(letters) == x.ndim
    or (units.endswith('*') and len(letters) < x.ndim and {*letters} <= {'S'})
  ):
    raise ValueError(
      f'{path} of shape {x.shape} does not have layout {units!r}; {_CHOICES}'
    )
  if units.endswith('*'):
    stacked = len(letters)
    rest = _released_axes(path, x.shape[stacked:], strict, axis_name)
    return tuple(stacked + axis for axis in rest)
  return tuple(i for i, letter in enumerate(units) if letter not in 'OS')


def _is_axis(axis: Any, ndim: int) -> bool:
  is_integer = isinstance(axis, int | np.integer)
  return is_integer and not isinstance(axis, bool) and -ndim <= axis < ndim


def _released_axes(
  path: str, shape: tuple[int, ...], strict: bool, axis_name: Any
) -> tuple[int, ...]:
  name = f'parameter {path}' if path else 'parameter'
  ndim = len(shape)
  if ndim > 4:
    raise ValueError(
      f'AGC cannot infer the units of a {name} of shape {shape}; {_CHOICES}'
    )
  if axis_name is not None and ndim > 1:
    raise ValueError(
      f'AGC cannot infer the units of a {name} sharded over {axis_name!r} from '
      f'the shape {shape} of a shard; {_CHOICES}'
    )
  single = sum(size > 1 for size in shape) <= 1
  if strict and ndim > 1 and (single or ndim == 3):
    raise ValueError(
      f'the units of a {name} of shape {shape} are ambiguous; {_CHOICES}'
    )
  if single:
    return tuple(range(ndim))
  return (0, 1, 2) if ndim == 4 else (0,)


def units_rule(units: Any, params: Any) -> UnitsRule:
  """Converts any form of `units` to a function `(path, leaf)`."""
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
    return _rule_by_rank(units, params)
  labels = dict(
    paths.leaves(
      units, is_leaf=lambda x: x is None or isinstance(x, str | tuple)
    )
  )
  missing = [path for path, _ in paths.leaves(params) if path not in labels]
  if missing:
    raise ValueError(
      'units is not a layout, axes, a function or a tree like the '
      f'parameters: it lacks {", ".join(missing[:5])}'
    )
  return lambda path, leaf: labels[path]


def _rule_by_rank(names: Sequence[str], params: Any) -> UnitsRule:
  by_rank = {len(name): name for name in names if not name.endswith('*')}
  if len(by_rank) < len(names):
    raise ValueError(
      f'units {names} name two layouts of one rank, or one of any rank; use a '
      'function (path, leaf) → layout'
    )
  ranks = {np.ndim(x) for _, x in paths.leaves(params)}
  if (
    max(ranks, default=0) > 1
    and not ranks & {*by_rank}
    and paths.is_whole(params)
  ):
    raise ValueError(
      f'units {names} match the rank of no parameter; the ranks are '
      f'{", ".join(map(str, sorted(ranks)))}'
    )
  return lambda path, leaf: by_rank.get(leaf.ndim)
