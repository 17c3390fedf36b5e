"""Weights and their metadata: network, evaluation and class names.

`.npz` and `.safetensors` files hold the metadata. For a file that cannot, it is
in JSON beside it, such as `net.stablehlo.json`; see `sidecar`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from nfnets_jax.models import variants
from nfnets_jax.weights import table
from nfnets_jax.weights.table import Tree

# The published evaluation, a name for `data.transforms.eval_transform`.
CROP = 'resize_crop_32'


@dataclasses.dataclass(frozen=True)
class Weights:
  """Weights of a network.

  Attributes:
    name: the variant, such as 'nfnet_f0'.
    params: Haiku parameters, `{module: {parameter: float32 array}}`.
    state: Haiku state, such as the statistics of batch normalisation.
    overrides: arguments of `models.create` besides the name; timm's NF-ResNets
      and NF-RegNets pad and pool differently.
    image_size: side of evaluation images in pixels; None is the test size of
      the variant.
    crop: evaluation crop, a name for `data.transforms.eval_transform`; None is
      its default.
    class_names: K names; None if unknown.
  """

  name: str
  params: Tree
  state: Tree = dataclasses.field(default_factory=dict)
  overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
  image_size: int | None = None
  crop: str | None = None
  class_names: tuple[str, ...] | None = None

  @property
  def num_classes(self) -> int:
    """Number of classes K of the classifier."""
    return table.num_classes(self.params, self.name)


def evaluation_of(weights: Any) -> tuple[int, str]:
  """Returns the image size in pixels and the crop to evaluate weights with.

  Those of `Weights` or of an `exported.Program`; by default the published ones,
  the test size of the variant and 'resize_crop_32'.

  Example:
    >>> evaluation_of(Weights('nfnet_f1', {}, image_size=400))
    (400, 'resize_crop_32')
  """
  size = variants.get(weights.name).test_size
  return weights.image_size or size, weights.crop or CROP


def describe(weights: Weights) -> dict[str, Any]:
  """Returns the known metadata as JSON values.

  Example:
    >>> describe(Weights('nfnet_f1', {}, image_size=400))
    {'model': 'nfnet_f1', 'overrides': {}, 'image_size': 400}
  """
  facts = {
    'model': weights.name,
    'overrides': weights.overrides,
    'image_size': weights.image_size,
    'crop': weights.crop,
    'class_names': weights.class_names and list(weights.class_names),
  }
  return {key: value for key, value in facts.items() if value is not None}


def encode(facts: Mapping[str, Any]) -> dict[str, str]:
  """Converts metadata to texts, as in a `.safetensors` file."""
  return {
    key: value if key in ('model', 'crop') else json.dumps(value)
    for key, value in facts.items()
  }


def decode(texts: Mapping[str, str]) -> dict[str, Any]:
  """Inverts `encode`; ignores other entries.

  Raises:
    ValueError: if one is not JSON.
  """
  facts: dict[str, Any] = {k: texts[k] for k in ('model', 'crop') if k in texts}
  for key in ('overrides', 'image_size', 'class_names'):
    if key in texts:
      facts[key] = json.loads(texts[key])
  return facts


def add(weights: Weights, facts: Mapping[str, Any]) -> Weights:
  """Adds image size, crop and class names.

  Raises:
    ValueError: if they are invalid; see `check`.
  """
  names = facts.get('class_names')
  weights = dataclasses.replace(
    weights,
    image_size=facts.get('image_size'),
    crop=facts.get('crop'),
    class_names=tuple(names) if isinstance(names, list) else names,
  )
  check(weights)
  return weights


def check(weights: Weights) -> None:
  """Checks image size, crop and class names.

  Raises:
    ValueError: if one has the wrong type or range, or there are not K names.
  """
  check_values(
    weights.image_size, weights.crop, weights.class_names, weights.num_classes
  )


def check_values(size: Any, crop: Any, names: Any, num_classes: int) -> None:
  """Checks metadata; see `check`."""
  if size is not None and (type(size) is not int or size < 1):
    raise ValueError(f'image_size is {size!r}; it must be at least 1 pixel')
  if crop is not None and not (isinstance(crop, str) and crop):
    raise ValueError(f'crop is {crop!r}; it must be the name of a crop')
  if names is None:
    return
  if not isinstance(names, tuple) or not all(
    isinstance(name, str) and name.strip() for name in names
  ):
    raise ValueError(f'class_names is {str(names)[:80]}; it must hold strings')
  if len(names) != num_classes:
    raise ValueError(
      f'there are {len(names)} class names, but {num_classes} classes'
    )


def sidecar(path: pathlib.Path) -> pathlib.Path:
  """Returns the path of the JSON file beside a file without metadata."""
  return path.with_name(f'{path.name}.json')


def read_sidecar(path: pathlib.Path) -> dict[str, Any]:
  """Returns the metadata beside a file; empty if there is none.

  Raises:
    ValueError: if it is not JSON with the name of a model.
    OSError: if it cannot be read.
  """
  file = sidecar(path)
  if not file.exists():
    return {}
  try:
    facts = json.loads(file.read_bytes())
  except ValueError as error:
    raise ValueError(f'{file} is not JSON: {error}') from error
  if not isinstance(facts, dict) or not isinstance(facts.get('model'), str):
    raise ValueError(f'{file} does not name a model; move it away')
  return facts
