"""Checks of the settings of networks.

The names are here, since configs are checked without importing jax.
"""

import difflib
import math
import numbers
from collections.abc import Sequence

ACTIVATIONS = (
  'celu',
  'elu',
  'gelu',
  'identity',
  'leaky_relu',
  'log_sigmoid',
  'relu',
  'relu6',
  'selu',
  'sigmoid',
  'silu',
  'soft_sign',
  'softplus',
  'tanh',
)
PADDINGS = ('same', 'symmetric')


def stages(per: str = 'stage', /, **patterns: Sequence[int]) -> None:
  """Checks sequences of positive integers of the same length.

  Args:
    per: what each entry is for.
    **patterns: the sequences by name.

  Raises:
    ValueError: if an entry is not a positive integer, or the lengths differ.
  """
  for name, pattern in patterns.items():
    if not isinstance(pattern, Sequence) or isinstance(pattern, str):
      raise ValueError(f'{name} must have one entry per {per}, got {pattern!r}')
  lengths = {len(pattern) for pattern in patterns.values()}
  if len(lengths) != 1 or 0 in lengths:
    raise ValueError(
      'each of '
      + ', '.join(f'{n} {tuple(p)}' for n, p in patterns.items())
      + f' must have one entry per {per}'
    )
  for name, pattern in patterns.items():
    if not all(_is_integer(x) and x >= 1 for x in pattern):
      raise ValueError(f'{name} {tuple(pattern)} must be positive integers')


def counts(**counts: int) -> None:
  """Raises a ValueError unless all are positive integers."""
  for name, count in counts.items():
    if not _is_integer(count):
      raise ValueError(f'{name} must be an integer, got {count!r}')
    if count < 1:
      raise ValueError(f'{name} must be at least 1, got {count}')


def factors(**factors: float) -> None:
  """Raises a ValueError unless all are positive and finite."""
  for name, factor in factors.items():
    if not _is_real(factor) or not 0 < factor < math.inf:
      raise ValueError(f'{name} must be a positive number, got {factor!r}')


def rates(**rates: float) -> None:
  """Raises a ValueError unless all are in [0, 1)."""
  for name, rate in rates.items():
    if not _is_real(rate) or not 0.0 <= rate < 1.0:
      raise ValueError(f'{name} must lie in [0, 1), got {rate!r}')


def choice(name: str, value: object, choices: Sequence[object]) -> None:
  """Raises a ValueError unless `value` is one of `choices`."""
  if value not in choices:
    words = [choice for choice in choices if isinstance(choice, str)]
    near = difflib.get_close_matches(str(value).lower(), words, n=1)
    hint = f'did you mean {near[0]!r}? ' if near else ''
    raise ValueError(
      f'{name} is {value!r}; {hint}choose one of '
      f'{", ".join(map(repr, choices))}'
    )


def activation(name: str) -> None:
  """Raises a ValueError unless it is one of `ACTIVATIONS`."""
  choice('activation', name, ACTIVATIONS)


def padding(name: str) -> None:
  """Raises a ValueError unless it is one of `PADDINGS`."""
  choice('padding', name, PADDINGS)


def norm(norm: str | None, cross_replica_axis: str | None) -> None:
  """Raises a ValueError if the norm is unknown, or an axis has no norm."""
  choice('norm', norm, (None, 'batch'))
  if norm is None and cross_replica_axis is not None:
    raise ValueError(
      f'cross_replica_axis is {cross_replica_axis!r}, but without a norm there '
      "are no statistics; use norm='batch' or cross_replica_axis=None"
    )


# bool is a subclass of int.
def _is_integer(value: object) -> bool:
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
  return isinstance(value, numbers.Real) and not isinstance(value, bool)
