"""Checks the arguments of experiment files, after the colon of `--config`."""

import difflib
from collections.abc import Iterable

from nfnets_jax.models import variants


def check(what: str, text: str, known: Iterable[str]) -> None:
  """Checks that an argument, or a part of it, is known.

  Args:
    what: name of the argument, for the message.
    text: the argument.
    known: valid values.

  Raises:
    ValueError: if it is unknown; lists the valid values, or similar ones if
      there are many.

  Example:
    >>> check('variant', 'F9', ['F0', 'F1'])
    Traceback (most recent call last):
    ValueError: there is no variant 'F9'; choose one of F0, F1
  """
  names = list(known)
  if text in names:
    return
  few = len(names) < 20
  similar = difflib.get_close_matches(text, names, cutoff=0.75 if few else 0.6)
  hint = f'did you mean {" or ".join(similar)}?' if similar else ''
  if few or not similar:
    hint = f'choose one of {", ".join(names)}' + f' ({hint})' * bool(hint)
  raise ValueError(f'there is no {what} {text!r}; {hint}')


def suffixes(family: str) -> list[str]:
  """Returns the variants of a family, without its prefix.

  Example:
    >>> suffixes('nf_regnet_')[:3]
    ['b0', 'b1', 'b2']
  """
  return [
    name.removeprefix(family)
    for name in variants.VARIANTS
    if name.startswith(family)
  ]
