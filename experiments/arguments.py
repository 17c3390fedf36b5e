"""Arguments of the experiment files, after the colon of `--config`."""

import difflib
from collections.abc import Iterable

from nfnets_jax.models import variants


def check(what: str, text: str, known: Iterable[str]) -> None:
  """Checks the argument of an experiment file, or a part of it.

  Args:
    what: it is, for the message.
    text: as given after the colon of --config.
    known: what it may be.

  Raises:
    ValueError: if it is none of them; the message lists them, or the nearest
      of many.

  Example:
    >>> check('variant', 'F9', ['F0', 'F1'])
    Traceback (most recent call last):
    ValueError: there is no variant 'F9'; choose one of F0, F1
  """
  names = list(known)
  if text in names:
    return
  few = len(names) < 20
  near = difflib.get_close_matches(text, names, cutoff=0.75 if few else 0.6)
  hint = f'did you mean {" or ".join(near)}?' if near else ''
  if few or not near:
    hint = f'choose one of {", ".join(names)}' + f' ({hint})' * bool(hint)
  raise ValueError(f'there is no {what} {text!r}; {hint}')


def suffixes(family: str) -> list[str]:
  """Returns what follows the name of a family in those of its variants.

  Example:
    >>> suffixes('nf_regnet_')[:3]
    ['b0', 'b1', 'b2']
  """
  return [
    name.removeprefix(family)
    for name in variants.VARIANTS
    if name.startswith(family)
  ]
