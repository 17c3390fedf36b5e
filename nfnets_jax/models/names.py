"""Lists the variants by name."""

import fnmatch

from nfnets_jax.models import published, variants


def list(pattern: str = '*', *, weights: bool = False) -> tuple[str, ...]:
  """Lists the variants whose names match a pattern.

  Args:
    pattern: a shell-style pattern, such as 'nfnet_f*'.
    weights: whether to list only those with published ImageNet weights, by the
      authors or in timm; `published.WEIGHTS` says where.

  Returns:
    The names in natural order, for `models.create`.

  Example:
    >>> list('nf_regnet_b[01]'), list('nf_regnet*', weights=True)
    (('nf_regnet_b0', 'nf_regnet_b1'), ('nf_regnet_b1',))
  """
  return tuple(
    name
    for name in variants.VARIANTS
    if fnmatch.fnmatchcase(name, pattern)
    and (not weights or name in published.WEIGHTS)
  )
