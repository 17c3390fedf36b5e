"""Scales the units of all leaves, of which small ones are stacked."""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nfnets_jax.agc import norms


class Leaf(NamedTuple):
  """A gradient to clip.

  Attributes:
    grad: the gradient.
    param: the parameter that it was computed for.
    axes: axes of a unit, to sum over.
    axis_name: mapped axes that units are sharded over, or None.
    group: group in the statistics.
  """

  grad: jax.Array
  param: jax.Array
  axes: tuple[int, ...]
  axis_name: Any
  group: str


# By the keys of their paths.
Leaves = dict[tuple, Leaf]
# Whether units are clipped, and their ratios.
Units = tuple[jax.Array, jax.Array]


class _Stack(NamedTuple):
  """Leaves stacked along a new first axis, or a single leaf as it is."""

  keys: tuple[tuple, ...]
  leaf: Leaf

  def sums(self) -> tuple[jax.Array, jax.Array]:
    """Returns `norms.sums` of the gradient and of the weights."""
    grad, param, axes, axis_name, _ = self.leaf
    return (
      norms.sums(norms.widen(grad), axes, axis_name),
      norms.sums(norms.widen(param), axes, axis_name),
    )


def scale_units(
  leaves: Leaves, equation: Callable[[tuple, tuple], tuple]
) -> tuple[dict[tuple, jax.Array], dict[str, list[Units]]]:
  """Scales the gradient of each unit by two factors.

  `equation` maps `norms.scaled_norm` of the gradients and of the weights, for a
  vector of units, to the factors, whether units are clipped, and their ratios.
  Returns the scaled gradients, and the units of each group.
  """
  results: dict[tuple, jax.Array] = {}
  groups: dict[str, list[Units]] = {}
  # The units of all leaves are one vector: on a GPU, a kernel for each leaf and
  # operation takes longer to start than to run.
  for stacks in _stack_small(leaves):
    sums = [x.sums() for x in stacks]
    grads, weights = (
      norms.scaled_norm(jnp.concatenate([x.ravel() for x in each]))
      for each in zip(*sums, strict=True)
    )
    factors, is_clipped, ratios = equation(grads, weights)
    units: dict[str, list[Units]] = {}
    stop = 0
    for x, (total, _) in zip(stacks, sums, strict=True):
      start, stop = stop, stop + total.size
      of_units = is_clipped[start:stop], ratios[start:stop]
      units.setdefault(x.leaf.group, []).append(of_units)
      pair = [each[start:stop].reshape(total.shape) for each in factors]
      for i, key in enumerate(x.keys):
        first, second = pair if len(x.keys) == 1 else (y[i] for y in pair)
        grad = leaves[key].grad
        updates = norms.widen(grad) * first * second
        results[key] = updates.astype(norms.canonical_dtype(grad))
    for group, parts in units.items():
      masks, values = (jnp.concatenate(x) for x in zip(*parts, strict=True))
      groups.setdefault(group, []).append((masks, values))
  return results, groups


def _stack_small(leaves: Leaves) -> Iterable[list[_Stack]]:
  """Stacks scalars and vectors of equal shape.

  Yields lists of stacks whose units may be joined: of equal dtypes, varying
  over the same mapped axes, and not explicitly sharded.
  """
  alike: dict[Any, dict[Any, list[tuple]]] = {}
  for key, leaf in leaves.items():
    arrays = leaf.grad, leaf.param
    kind: Any = key
    if leaf.grad.ndim <= 1:
      dtypes = (x.dtype for x in arrays)
      kind = leaf.group, leaf.grad.shape, *dtypes, leaf.axes
    types = [str(jax.typeof(norms.widen(x))) for x in arrays]
    join: Any = leaf.axis_name, *(re.sub(r'\[.*\]', '', x) for x in types)
    if any('@' in x for x in types):
      join = kind = key
    alike.setdefault(join, {}).setdefault(kind, []).append(key)
  for kinds in alike.values():
    yield [_stack(keys, leaves) for keys in kinds.values()]


def _stack(keys: list[tuple], leaves: Leaves) -> _Stack:
  first = leaves[keys[0]]
  if len(keys) == 1:
    return _Stack((keys[0],), first)
  grad, param = (
    jnp.stack([norms.widen(x) for x in each])
    for each in zip(*(leaves[key][:2] for key in keys), strict=True)
  )
  axes = tuple(axis + 1 for axis in first.axes)
  return _Stack(tuple(keys), first._replace(grad=grad, param=param, axes=axes))
