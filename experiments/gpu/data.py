"""Which CIFAR-10 parts 3 and 4 train on."""

import fcntl
from typing import Any

from experiments.gpu import common
from nfnets_jax.data import prepare


def fields() -> dict[str, Any]:
  """Returns fields of the config's `data`.

  Those of the pack, or what `--data_dir` and `--data_name` of `run` say; a dry
  run without either takes the handwritten digits that scikit-learn has.

  Raises:
    FileNotFoundError: if there is no data set.
  """
  name, folder = common.data_set()
  if (folder / name).is_dir():
    return {'name': name, 'data_dir': str(folder.absolute())}
  if not common.dry_run():
    raise FileNotFoundError(
      f'there is no data set {name} in {folder}, nor in {common.pack()}; make '
      'gpu-pack gathers it, or give --data_dir and --data_name'
    )
  folder = common.scratch().absolute() / 'data'
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / 'lock').open('w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)  # several jobs begin at once
    prepare.prepare('digits', folder)
  return {'name': 'digits', 'data_dir': str(folder)}
