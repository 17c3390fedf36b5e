"""Learning rates of parameter groups, for fine-tuning."""

import math
import re
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax


def parse(text: str) -> list[tuple[re.Pattern[str], float]]:
  """Parses 'PATTERN=FACTOR,...', learning rate factors of parameters.

  Patterns are regular expressions without commas, factors at least 0; other
  syntax raises a ValueError.

  Example:
    >>> parse('/linear/=1,.=0')
    [(re.compile('/linear/'), 1.0), (re.compile('.'), 0.0)]
  """
  groups = []
  for part in text.split(','):
    pattern, equals, factor = part.rpartition('=')
    try:
      groups.append((re.compile(pattern), float(factor)))
      valid = bool(equals and pattern) and 0 <= groups[-1][1] < math.inf
    except (re.error, ValueError):
      valid = False
    if not valid:
      raise ValueError(
        f'optimizer.learning_rate_groups has the part {part!r}; write '
        'PATTERN=FACTOR, a regular expression and a number of at least 0'
      )
  return groups


def scale(
  groups: Sequence[tuple[re.Pattern[str], float]],
) -> optax.GradientTransformation:
  """Scales the updates of some parameters; 0 freezes them.

  The first pattern found in 'module/parameter' applies. Chain it last, on a
  Haiku tree; it raises a ValueError if a pattern matches no parameter.
  """

  def factor(path: str) -> float:
    return next((f for pattern, f in groups if pattern.search(path)), 1.0)

  def update(updates: chex.ArrayTree, params: Any = None) -> chex.ArrayTree:
    del params
    for pattern, _ in groups:
      check_matches('learning_rate_groups', pattern, updates)
    factors = {
      module: {name: factor(f'{module}/{name}') for name in leaves}
      for module, leaves in updates.items()
    }
    # Frozen parameters stay frozen if an update is not finite.
    return jax.tree.map(
      lambda x, f: x * f if f else jnp.zeros_like(x), updates, factors
    )

  return optax.stateless(update)


def check_matches(
  field: str, pattern: re.Pattern[str], params: chex.ArrayTree
) -> None:
  """Raises a ValueError if a pattern is found in no 'module/parameter'."""
  paths = [f'{m}/{name}' for m, leaves in params.items() for name in leaves]
  if not any(pattern.search(path) for path in paths):
    raise ValueError(
      f'optimizer.{field}: {pattern.pattern!r} is found in no parameter; some '
      f'are {", ".join(sorted(paths)[:3])}'
    )
