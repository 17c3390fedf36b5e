"""What a computation costs, read off its traced form."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count_macs(function: Callable[..., Any], *args: Any) -> int:
  """Counts the multiply-accumulates of a function's products.

  Convolutions and matrix products count, elementwise work does not: this is
  what the paper's tables call FLOPs. A padded border counts as if it were
  there. Nothing is computed; the function is only traced.

  Args:
    function: of `args`.
    *args: arrays or `jax.ShapeDtypeStruct`s, or pytrees of them.

  Returns:
    The number of multiply-accumulates of one call.

  Example:
    >>> import jax.numpy as jnp
    >>> count_macs(lambda x, w: x @ w, jnp.ones((2, 3)), jnp.ones((3, 5)))
    30

  Reference:
    Brock et al. 2021, table 3, column "#FLOPs".
  """
  return _jaxpr_macs(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr_macs(jaxpr: core.Jaxpr) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      lhs = _shape(eqn.invars[0])
      total += math.prod(_shape(eqn.outvars[0])) * math.prod(
        lhs[axis] for axis in contracted
      )
    elif eqn.primitive.name == 'conv_general_dilated':
      spec = eqn.params['dimension_numbers'].rhs_spec
      rhs = _shape(eqn.invars[1])
      # Output channels lie at spec[0]; the rest of the kernel is one fan-in.
      total += math.prod(_shape(eqn.outvars[0])) * math.prod(
        rhs[axis] for axis in spec[1:]
      )
    else:
      inner = sum(_jaxpr_macs(sub) for sub in core.jaxprs_in_params(eqn.params))
      total += inner * eqn.params.get('length', 1)
  return total


def _shape(variable: Any) -> tuple[int, ...]:
  return variable.aval.shape
