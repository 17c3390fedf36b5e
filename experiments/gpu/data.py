"""The data set of parts 3 and 4."""

import fcntl
from typing import Any

from experiments.gpu import common
from nfnets_jax.data import prepare


def fields() -> dict[str, Any]:
  """Returns the fields of `config.data` for CIFAR-10.

  The data set is that of the pack or of `--data_dir` and `--data_name`. Without
  one, a dry run uses scikit-learn's handwritten digits.

  Raises:
    FileNotFoundError: if the data set is missing.
  """
  name, folder = common.data_set()
  if (folder / name).is_dir():
    return {'name': name, 'data_dir': str(folder.absolute())}
  if not common.dry_run():
    raise FileNotFoundError(
      f'there is no data set {name} in {folder} or {common.pack()}; run make '
      'gpu-pack, or give --data_dir and --data_name'
    )
  folder = common.scratch().absolute() / 'data'
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / 'lock').open('w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)  # several jobs start at once
    prepare.prepare('digits', folder)
  return {'name': 'digits', 'data_dir': str(folder)}
