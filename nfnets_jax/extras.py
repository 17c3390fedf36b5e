"""Optional dependencies of the package.

Without extras only jax and optax are installed, which AGC needs. The other
parts check their packages at once and name the extra.
"""

import importlib.util


def need(extra: str, *packages: str) -> None:
  """Checks that packages of an extra are installed, without importing them.

  Raises:
    ModuleNotFoundError: if one is missing; the message has the pip command.

  Example:
    >>> need('models', 'haiku')
  """
  for package in packages:
    if not _is_installed(package):
      raise ModuleNotFoundError(
        f'No module named {package!r}; it comes with the extra {extra!r}: '
        f"pip install 'nfnets_jax[{extra}]', or '.[{extra}]' in a clone",
        name=package,
      )


def _is_installed(package: str) -> bool:
  try:
    return importlib.util.find_spec(package) is not None
  except (ImportError, ValueError):
    return False
