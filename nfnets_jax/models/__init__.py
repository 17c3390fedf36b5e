"""The networks of the paper, as Haiku modules.

`create` and the modules load Haiku when they are first asked for; `variants`,
which is plain data, never does.
"""

import importlib
from typing import TYPE_CHECKING, Any

from nfnets_jax import extras

if TYPE_CHECKING:
  from nfnets_jax.models.cost import count_macs
  from nfnets_jax.models.factory import arguments, create

__all__ = ['arguments', 'count_macs', 'create']

_LAZY = {
  'arguments': 'nfnets_jax.models.factory',
  'count_macs': 'nfnets_jax.models.cost',
  'create': 'nfnets_jax.models.factory',
}


def __getattr__(name: str) -> Any:
  if name not in _LAZY:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  extras.need('models', 'haiku')
  return getattr(importlib.import_module(_LAZY[name]), name)
