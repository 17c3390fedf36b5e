"""Times functions alternately, and formats the times."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

Key = TypeVar('Key', bound=Hashable)


def seconds(run: Callable[[], Any]) -> float:
  """Returns the time of a call, which must wait for its result."""
  began = time.perf_counter()
  run()
  return time.perf_counter() - began


def in_turn(
  measures: Mapping[Key, Callable[[], float]],
  rounds: int,
  warmup: int = 1,
  rotate: bool = False,
) -> dict[Key, list[float]]:
  """Calls each function once per round.

  Args:
    measures: functions that return a measurement.
    rounds: number of rounds that count.
    warmup: number of rounds before those.
    rotate: whether each round starts with the next function, as a program may
      find data of its predecessor in the caches.

  Returns:
    The measurements of each function, one per round.

  Example:
    >>> in_turn({'a': lambda: 1.0, 'b': lambda: 2.0}, rounds=2)
    {'a': [1.0, 1.0], 'b': [2.0, 2.0]}
  """
  results: dict[Key, list[float]] = {key: [] for key in measures}
  order = list(measures)
  for number in range(-warmup, rounds):
    for key in order:
      value = measures[key]()
      if number >= 0:
        results[key].append(value)
    if rotate:
      order = order[1:] + order[:1]
  return results


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
  """Divides round by round.

  Example:
    >>> ratios([1.0, 3.0], [2.0, 2.0])
    [0.5, 1.5]
  """
  return [a / b for a, b in zip(ours, theirs, strict=True)]


def spread(values: Sequence[float], digits: int = 3) -> str:
  """Formats the median and the range.

  Example:
    >>> spread([1.0, 4.0, 2.0], digits=1)
    '2.0 (1.0 to 4.0)'
  """
  median, low, high = (
    f'{x:.{digits}f}'
    for x in (statistics.median(values), min(values), max(values))
  )
  return f'{median} ({low} to {high})'


def columns(values: Sequence[float], digits: int = 4) -> str:
  """Formats median, minimum and maximum in columns of 10, 9 and 9."""
  return (
    f'{statistics.median(values):10.{digits}f}{min(values):9.{digits}f}'
    f'{max(values):9.{digits}f}'
  )
