"""Tables in Markdown; the standard library alone."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
  """Formats a table.

  Example:
    >>> print(table(['net', 'M'], [['F0', 71], ['F1', 133]]))
    | net | M |
    |---|---|
    | F0 | 71 |
    | F1 | 133 |
  """
  lines = [f'| {" | ".join(map(str, row))} |' for row in (head, *rows)]
  return '\n'.join([lines[0], '|' + len(head) * '---|', *lines[1:]])
