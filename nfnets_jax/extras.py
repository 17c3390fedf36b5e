"""Optional dependencies of the package.

Without extras only jax and optax are installed, which AGC needs. The other
parts check their packages at once; the error names the extra.
"""

import importlib.util
import sys

# Distributions with another name than their module.
_DISTRIBUTIONS = {
  'PIL': 'pillow',
  'absl': 'absl-py',
  'haiku': 'dm-haiku',
  'orbax.checkpoint': 'orbax-checkpoint',
  'sklearn': 'scikit-learn',
  'tensorflow_datasets': 'tensorflow-datasets',
  'tree': 'dm-tree',
}


def distribution(package: str) -> str:
  """Returns the name by which pip knows a module.

  Example:
    >>> distribution('haiku'), distribution('grain')
    ('dm-haiku', 'grain')
  """
  return _DISTRIBUTIONS.get(package, package)


def need(extra: str, *packages: str) -> None:
  """Checks that packages of an extra are installed, without importing them.

  A command of this package exits with the message, without a traceback.

  Raises:
    ModuleNotFoundError: if one is missing; the message names its distribution,
      the extra and the pip command.

  Example:
    >>> need('models', 'haiku')
  """
  for package in packages:
    if not _is_installed(package):
      message = (
        f'No module named {package!r}; {distribution(package)} comes with the '
        f"extra {extra!r}: pip install 'nfnets_jax[{extra}]', or '.[{extra}]' "
        'in a clone'
      )
      if _runs_command():
        sys.exit(f'error: {message}')
      raise ModuleNotFoundError(message, name=package)


def _is_installed(package: str) -> bool:
  try:
    return importlib.util.find_spec(package) is not None
  except (ImportError, ValueError):
    return False


def _runs_command() -> bool:
  """Returns whether Python runs `-m nfnets_jax.COMMAND`, or `nfnets-jax`."""
  spec = getattr(sys.modules['__main__'], '__spec__', None)
  return spec is not None and spec.name.partition('.')[0] == __package__
