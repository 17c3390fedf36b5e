"""The networks of the paper, as Haiku modules.

`list`, `arguments` and `feature_info` need no other package; the rest loads
Haiku on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from nfnets_jax import extras

if TYPE_CHECKING:
  from nfnets_jax.models.cost import count_macs
  from nfnets_jax.models.factory import create
  from nfnets_jax.models.layout import feature_info
  from nfnets_jax.models.names import list
  from nfnets_jax.models.standardization import fold
  from nfnets_jax.models.variants import arguments

__all__ = [
  'arguments',
  'count_macs',
  'create',
  'feature_info',
  'fold',
  'list',
]

# The module of each name, and whether it needs Haiku.
_LAZY = {
  'arguments': ('variants', False),
  'count_macs': ('cost', True),
  'create': ('factory', True),
  'feature_info': ('layout', False),
  'fold': ('standardization', True),
  'list': ('names', False),
}


def __getattr__(name: str) -> Any:
  if name not in _LAZY:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module, needs_haiku = _LAZY[name]
  if needs_haiku:
    extras.need('models', 'haiku')
  return getattr(importlib.import_module(f'{__name__}.{module}'), name)
