"""Names the operation that made a NaN.

With `jax_debug_nans`, jax names operations outside of compiled steps, and keeps
the inputs of these. It does not check what a compiled step returns, after the
first call. Here, a step that returned a NaN runs again on the same inputs,
operation by operation.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.extend import core

from nfnets_jax.runtime import parallel

# Frames of these packages do not tell what a net computes.
_LIBRARIES = {'jax', 'jaxlib', 'haiku', 'optax'}


def program(
  compiled: jax.stages.Compiled, step: Callable, *inputs: chex.ArrayTree
) -> parallel.Program:
  """Returns a program that explains its NaNs under `jax_debug_nans`.

  `compiled` is `step(state, batch, *inputs)`, mapped over `parallel.AXIS`.
  """
  if jax.debug_nans.value:
    return Explained(compiled, step, *inputs)
  return parallel.Program(compiled, *inputs)


class Explained(parallel.Program):
  """A compiled step that names the operation that made a NaN."""

  def __init__(
    self, compiled: jax.stages.Compiled, step: Callable, *inputs: chex.ArrayTree
  ):
    super().__init__(compiled, *inputs)
    self._step = step

  def __call__(self, state: chex.ArrayTree, batch: chex.ArrayTree) -> Any:
    """Runs the step; raises a FloatingPointError if it returns a NaN."""
    with jax.debug_nans(False):  # jax would check the first call
      outputs = super().__call__(state, batch)
    if not _any_nan(jax.tree.map(parallel.local_copy, outputs)):
      return outputs
    local = jax.tree.map(parallel.local_copy, (state, self._inputs))
    found = find_nan(self._step, local[0], batch, *local[1])
    raise FloatingPointError(
      f'NaN made by {found}'
      if found
      else 'NaN in the compiled step, but not in its operations one by one, '
      "on this process's images"
    )


def find_nan(
  step: Callable, state: chex.ArrayTree, batch: chex.ArrayTree, *inputs: Any
) -> str | None:
  """Returns the first operation of a step that makes a NaN, or None.

  Args:
    step: a step to be mapped over `parallel.AXIS`.
    state: of one device.
    batch: arrays `[devices, n, ...]`; all run on one device.
    *inputs: further inputs of the step, for all devices.

  Returns:
    Its name, with the modules of the net and the line of code that it is from;
    `transpose(jvp(...))` is of the gradient.
  """
  mapped = jax.vmap(
    step, in_axes=(None, 0, *[None] * len(inputs)), axis_name=parallel.AXIS
  )
  with jax.debug_nans(False):
    closed = jax.make_jaxpr(mapped)(state, batch, *inputs)
    leaves = jax.tree.leaves((state, batch, *inputs))
    try:
      _evaluate(closed.jaxpr, [*closed.consts, *leaves])
    except _FoundError as found:
      return str(found)
  return None


class _FoundError(Exception):
  """An operation made a NaN."""

  def __init__(self, eqn: Any):
    super().__init__()
    self._name, self._modules, self._line = eqn.primitive.name, '', ''
    self.add(eqn)

  def add(self, eqn: Any) -> None:
    """Adds what an operation tells, or one around it."""
    info = eqn.source_info
    modules = str(info.name_stack), self._modules
    self._modules = '/'.join(filter(None, modules))
    frames = info.traceback.frames if info.traceback else []
    lines = (
      f'{x.file_name}:{x.line_num}'
      for x in frames
      if _LIBRARIES.isdisjoint(pathlib.Path(x.file_name).parts)
    )
    self._line = self._line or next(lines, '')

  def __str__(self) -> str:
    parts = (f'`{self._name}`', self._modules, self._line)
    return ', '.join(filter(None, parts))


def _evaluate(jaxpr: Any, values: list[Any]) -> list[Any]:
  """Returns the outputs of a jaxpr without a NaN."""
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], values, strict=True))

  def read(atoms: list[Any]) -> list[Any]:
    return [x.val if isinstance(x, core.Literal) else env[x] for x in atoms]

  uses = [_variables(eqn.invars) for eqn in jaxpr.eqns]
  last_use = {x: i for i, variables in enumerate(uses) for x in variables}
  last_use |= dict.fromkeys(_variables(jaxpr.outvars), len(uses))
  for i, eqn in enumerate(jaxpr.eqns):
    inputs = read(eqn.invars)
    outputs = _run(eqn, inputs)
    if _any_nan(outputs):
      try:
        _look_inside(eqn, inputs)
      except _FoundError as found:
        found.add(eqn)
        raise
      raise _FoundError(eqn)
    env.update(zip(eqn.outvars, outputs, strict=True))
    for x in uses[i]:
      if last_use[x] == i:
        del env[x]  # frees the memory
  return read(jaxpr.outvars)


def _variables(atoms: list[Any]) -> set[Any]:
  return {x for x in atoms if not isinstance(x, core.Literal)}


def _run(eqn: Any, inputs: list[Any]) -> list[Any]:
  bound = eqn.primitive.get_bind_params(eqn.params)
  # Before jax 0.10, functions are apart.
  functions, params = bound if isinstance(bound, tuple) else ((), bound)
  outputs = eqn.primitive.bind(*functions, *inputs, **params)
  return outputs if eqn.primitive.multiple_results else [outputs]


def _look_inside(eqn: Any, inputs: list[Any]) -> None:
  """Runs the inside of a function, a scan or a branch."""
  params, name = eqn.params, eqn.primitive.name
  inner = params.get('jaxpr', params.get('call_jaxpr'))
  if name == 'cond':
    index, *inputs = inputs
    inner = params['branches'][int(index)]
  if inner is None:
    return
  jaxpr, consts = getattr(inner, 'jaxpr', inner), getattr(inner, 'consts', [])
  if name != 'scan':
    _evaluate(jaxpr, [*consts, *inputs])
    return
  # Only slices of a scan lose an axis inside. jax has renamed its counts.
  slices = sum(map(_rank_differs, eqn.invars, jaxpr.invars))
  carries = len(eqn.outvars) - sum(
    map(_rank_differs, eqn.outvars, jaxpr.outvars)
  )
  fixed = len(inputs) - slices - carries
  carry = inputs[fixed : fixed + carries]
  steps = range(params['length'])
  for i in reversed(steps) if params['reverse'] else steps:
    parts = [x[i] for x in inputs[fixed + carries :]]
    values = [*consts, *inputs[:fixed], *carry, *parts]
    carry = _evaluate(jaxpr, values)[:carries]


def _rank_differs(outer: Any, inner: Any) -> bool:
  return len(outer.aval.shape) != len(inner.aval.shape)


@jax.jit
def _any_nan(tree: chex.ArrayTree) -> jax.Array:
  found = [
    jnp.isnan(x).any()
    for x in jax.tree.leaves(tree)
    if jnp.issubdtype(x.dtype, jnp.inexact)
  ]
  return jnp.asarray(found).any()
