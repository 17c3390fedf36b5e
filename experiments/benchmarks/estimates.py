"""Reads estimates of `nfnets_jax.compile --json`."""

import json
from typing import Any

from nfnets_jax import paths


def read(path: str) -> dict[str, Any]:
  """Reads an estimate from its own file, or from a cell of `compile_table`.

  Raises:
    FileNotFoundError: if there is no file.
    ValueError: if it has no estimate, or that of its training step has no time.
  """
  file = paths.existing(path, 'FILE', 'file')
  try:
    result = json.loads(file.read_text())
    result = result.get('result', result)
    training = result.get('training')
  except (AttributeError, ValueError) as error:
    raise ValueError(
      f'{path} is no JSON of nfnets_jax.compile --json: {error}'
    ) from error
  if training is None:
    reason = result.get('reason', 'none is recorded')
    raise ValueError(f'{path} has no training step: {reason}')
  if not training['seconds']:
    raise ValueError(
      f'{path} has no time for {result["topology"]}; compile for a TPU or GPU'
    )
  return result
