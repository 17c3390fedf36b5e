"""Costs of functions and modules, from their jaxprs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
from jax.extend import core


def count_macs(function: Callable[..., Any], *args: Any) -> int:
  """Counts the multiply-accumulates of convolutions and matrix products.

  These are the FLOPs of the paper's tables. Products with padding count. The
  function is only traced.

  Args:
    function: a function of `args`.
    *args: arrays or `jax.ShapeDtypeStruct`s, or pytrees of them.

  Example:
    >>> import jax.numpy as jnp
    >>> count_macs(lambda x, w: x @ w, jnp.ones((2, 3)), jnp.ones((3, 5)))
    30

  Reference:
    Brock et al. 2021, table 3, column "#FLOPs".
  """
  return _jaxpr_macs(jax.make_jaxpr(function)(*args).jaxpr)


# Methods of modules that map features to features.
_CALLS = ('__call__', 'with_mean')


class ModuleCost(NamedTuple):
  """The cost of one module of a net.

  Attributes:
    name: name within the net.
    out_shape: shape of the output.
    params: number of parameters.
    macs: number of multiply-accumulates.
    out_bytes: size of the output in bytes.
  """

  name: str
  out_shape: tuple[int, ...]
  params: int
  macs: int
  out_bytes: int


def module_costs(
  create: Callable[[], Any], images: jax.ShapeDtypeStruct
) -> list[ModuleCost]:
  """Returns the cost of each top-level module of a net, such as its blocks.

  The net is only traced. Modules with a parameter `w` cost one product with it
  per output position.

  Args:
    create: returns the net, inside a Haiku transform.
    images: shape `[B, H, W, 3]` and dtype of the input.

  Returns:
    An entry for each direct child of the net, in the order of calls.

  Example:
    >>> import jax.numpy as jnp
    >>> from nfnets_jax.models import factory
    >>> images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    >>> costs = module_costs(lambda: factory.create('nfnet_tiny', 10), images)
    >>> costs[0].name, costs[0].out_shape, costs[0].params
    ('stem_conv0', (1, 32, 32, 16), 464)
  """
  rows: dict[str, ModuleCost] = {}
  macs: dict[str, int] = {}

  def record(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    out = call(*args, **kwargs)
    path = context.module.module_name.split('/~/')
    if context.method_name not in _CALLS or len(path) < 2:
      return out
    params = context.module.params_dict()
    own = params.get(f'{context.module.module_name}/w')
    first = jax.tree.leaves(out)[0]
    if own is not None:
      product = math.prod(first.shape[:-1]) * own.size
      macs[path[1]] = macs.get(path[1], 0) + product
    if len(path) == 2:
      # A method that calls the one it overrides is seen twice, the outer last.
      rows[path[1]] = ModuleCost(
        name=path[1],
        out_shape=first.shape,
        params=sum(x.size for x in params.values()),
        macs=macs.get(path[1], 0),
        out_bytes=first.size * first.dtype.itemsize,
      )
    return out

  def forward(images: jax.Array) -> Any:
    with hk.intercept_methods(record):
      return create()(images, is_training=False)

  key = jax.eval_shape(lambda: jax.random.key(0))
  jax.eval_shape(hk.transform_with_state(forward).init, key, images)
  return list(rows.values())


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
    elif eqn.params.get('branches_platforms'):
      # One branch per platform; the last is the default, which has the products
      # of the plain form.
      total += _jaxpr_macs(eqn.params['branches'][-1].jaxpr)
    else:
      inner = sum(_jaxpr_macs(sub) for sub in core.jaxprs_in_params(eqn.params))
      total += inner * eqn.params.get('length', 1)
  return total


def _shape(variable: Any) -> tuple[int, ...]:
  return variable.aval.shape
