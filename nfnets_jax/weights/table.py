"""Parameter shapes of the networks, and how to identify a network by them."""

import re
from collections.abc import Mapping
from typing import Any

import haiku as hk
import jax
import numpy as np

from nfnets_jax import models
from nfnets_jax.models import variants

Tree = dict[str, dict[str, np.ndarray]]
AnyTree = Mapping[str, Mapping[str, Any]]

# The outermost module of each supported family.
ROOTS = {
  'efficientnet': 'EfficientNet',
  'nf_regnet': 'NF_RegNet',
  'nf_resnet': 'NF_ResNet',
  'nfnet': 'NFNet',
  'resnet': 'ResNet',
}
# Regularisation arguments, which may differ between uses of the same weights.
REGULARISATION = ('cross_replica_axis', 'drop_rate', 'stochdepth_rate')
_BLOCK = re.compile(r'/~/(\w*block(?:_\d+)?)(?:/|$)')
# Longest list of differences in a message.
_MAX_LINES = 40


def shapes(
  name: str, num_classes: int, changes: Mapping[str, Any]
) -> tuple[Any, Any]:
  """Returns parameters and state as trees of `jax.ShapeDtypeStruct`.

  `changes` are overrides of the variant `name`, as in `models.create`.
  """

  def forward(images: jax.Array) -> dict[str, jax.Array]:
    net = models.create(name, num_classes, **changes)
    return net(images, is_training=False)

  images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  # A shape: a real key would start a backend, too early in several processes.
  key = jax.ShapeDtypeStruct((2,), np.uint32)
  return jax.eval_shape(hk.transform_with_state(forward).init, key, images)


def compare(
  found: Mapping[str, tuple[int, ...]],
  expected: Mapping[str, tuple[int, ...]],
  prefix: str = '',
) -> list[str]:
  """Lists missing paths, surplus paths and wrong shapes, one a line."""
  problems = []
  for path in sorted(found.keys() | expected.keys()):
    if path not in found:
      problems.append(f'missing: {prefix}{path} {expected[path]}')
    elif path not in expected:
      problems.append(f'surplus: {prefix}{path} {found[path]}')
    elif found[path] != expected[path]:
      problems.append(
        f'wrong shape: {prefix}{path} {found[path]}, not {expected[path]}'
      )
  return problems


def differences(
  given: tuple[AnyTree, AnyTree], name: str, changes: Mapping[str, Any]
) -> list[str]:
  """Lists how parameters and state differ from those of a network.

  `given` are two trees of anything with a shape.
  """
  wanted = shapes(name, num_classes(given[0], name), changes)
  problems = []
  for what, *trees in zip(('parameter', 'state'), given, wanted, strict=True):
    found, expected = (
      {
        f'{module} {leaf}': tuple(np.shape(x))
        for module, leaves in tree.items()
        for leaf, x in leaves.items()
      }
      for tree in trees
    )
    problems += compare(found, expected, f'{what} ')
  return problems


def check(
  given: tuple[AnyTree, AnyTree], name: str, changes: Mapping[str, Any]
) -> None:
  """Raises a ValueError that lists the `differences`, if any."""
  check_empty(differences(given, name, changes), name)


def check_empty(problems: list[str], name: str) -> None:
  """Raises a ValueError that lists the problems, if there are any."""
  if not problems:
    return
  shown = problems[:_MAX_LINES]
  if len(problems) > _MAX_LINES:
    shown.append(f'and {len(problems) - _MAX_LINES} more')
  raise ValueError(
    f'these weights are not those of {name}:\n  ' + '\n  '.join(shown)
  )


def num_classes(params: AnyTree, name: str) -> int:
  """Returns the number of classes; 1000 if there is no head."""
  root = ROOTS.get(variants.get(name).family, '')
  head = params.get(f'{root}/~/linear', {})
  return int(np.shape(head['b'])[0]) if 'b' in head else 1000


def candidates(family: str, depth: int) -> list[str]:
  """Returns the variants of a family with a total of `depth` blocks."""
  return [
    name
    for name, variant in variants.VARIANTS.items()
    if variant.family == family and sum(variant.settings.depth) == depth
  ]


def identify(params: AnyTree, state: AnyTree) -> str:
  """Returns the variant with these parameters and state.

  Raises:
    ValueError: if there is none; the message lists the differences from the
      nearest.
  """
  modules = list(params)
  family = next(
    (
      f
      for f, root in ROOTS.items()
      if modules and all(m.startswith(f'{root}/') for m in modules)
    ),
    None,
  )
  if family is None:
    raise ValueError(
      'these weights are of no known family; their modules begin with '
      f'{sorted({m.split("/")[0][:40] for m in modules})[:5]}, not all with '
      f'one of {", ".join(sorted(ROOTS.values()))}'
    )
  blocks = {match[1] for m in modules if (match := _BLOCK.search(m))}
  lists = {
    name: differences((params, state), name, {})
    for name in candidates(family, len(blocks))
  }
  if not lists:
    raise ValueError(
      f'these weights have {len(blocks)} blocks, and no {ROOTS[family]} has'
    )
  nearest = min(lists, key=lambda name: len(lists[name]))
  check_empty(lists[nearest], f'{nearest}, the nearest of all')
  return nearest
