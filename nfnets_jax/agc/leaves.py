"""Leaves to clip, of which small ones are stacked."""

import re
from collections.abc import Iterable
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


class Stack(NamedTuple):
  """Leaves stacked along a new first axis, or a single leaf as it is."""

  keys: tuple[tuple, ...]
  leaf: Leaf

  @property
  def group(self) -> str:
    """The group of its leaves."""
    return self.leaf.group

  def sums(self) -> tuple[jax.Array, jax.Array]:
    """Returns `norms.sums` of the gradient and of the weights."""
    grad, param, axes, axis_name, _ = self.leaf
    return (
      norms.sums(norms.widen(grad), axes, axis_name),
      norms.sums(norms.widen(param), axes, axis_name),
    )


def stack(leaves: Leaves) -> Iterable[list[Stack]]:
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


def _stack(keys: list[tuple], leaves: Leaves) -> Stack:
  first = leaves[keys[0]]
  if len(keys) == 1:
    return Stack((keys[0],), first)
  grad, param = (
    jnp.stack([norms.widen(x) for x in each])
    for each in zip(*(leaves[key][:2] for key in keys), strict=True)
  )
  axes = tuple(axis + 1 for axis in first.axes)
  return Stack(tuple(keys), first._replace(grad=grad, param=param, axes=axes))
