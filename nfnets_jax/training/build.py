"""The parts of a run from its config: data, net, optimizer and steps."""

from typing import Any

from nfnets_jax.data import datasets
from nfnets_jax.runtime import workdir as workdirs


def describe_data(
  train_set: datasets.Dataset, test_set: datasets.Dataset
) -> dict[str, Any]:
  """Returns what a run depends on in its data, for `data.json`.

  Args:
    train_set: the training split.
    test_set: the test split.

  Returns:
    JSON-serialisable: the `name` of the data set, the TFDS notation and the
    number of examples of both `splits`, and the `class_names` in the order of
    their labels.

  Raises:
    ValueError: if the two splits have different classes.
  """
  names = list(train_set.class_names)
  if difference := workdirs.class_changes(names, list(test_set.class_names)):
    raise ValueError(
      f'{train_set.split} and {test_set.split} of {train_set.name} have '
      f'different classes: {difference}'
    )
  return {
    'name': train_set.name,
    'splits': {
      'train': {'split': train_set.split, 'count': len(train_set)},
      'test': {'split': test_set.split, 'count': len(test_set)},
    },
    'class_names': names,
  }
