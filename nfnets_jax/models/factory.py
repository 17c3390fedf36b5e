"""Builds a network by name."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import haiku as hk

from nfnets_jax.models import (
  efficientnet,
  fixup_resnet,
  nf_regnet,
  nf_resnet,
  nfnet,
  resnet,
  variants,
)

_FAMILIES: dict[str, Callable[..., hk.Module]] = {
  'efficientnet': efficientnet.EfficientNet,
  'fixup_resnet': fixup_resnet.FixupResNet,
  'nf_regnet': nf_regnet.NFRegNet,
  'nf_resnet': nf_resnet.NFResNet,
  'nfnet': nfnet.NFNet,
  'resnet': resnet.ResNet,
}


# Arguments of a module that are not part of its variant.
_NOT_OF_A_VARIANT = ('num_classes', 'name', 'remat', 'standardized')


def create(
  name: str,
  num_classes: int = 1000,
  *,
  standardized: bool = False,
  remat: str | None = None,
  **overrides: Any,
) -> Any:
  """Returns the network `name`; call it inside `hk.transform_with_state`.

  Args:
    name: a variant, such as 'nfnet_f0'; `variants.VARIANTS` holds them all.
    num_classes: K, number of logits.
    standardized: whether the net is applied to the parameters of `layers.fold`,
      whose weights are standardised already. Without effect on the families
      without weight standardisation, whose parameters `layers.fold` returns
      unchanged.
    remat: what is computed again in the backward pass to save memory, such as
      'block'; see the variant's module. None is nothing.
    **overrides: replace arguments of the variant's module, for example
      `drop_rate=0.0` or `group_width=(192, 128, 128, 128)`.

  Returns:
    A module whose call `(images, is_training, image_index=None)` takes images
    `[B, H, W, 3]` and returns a dict with at least `logits` `[B, K]` and `pool`
    `[B, C]`. Dropout and stochastic depth draw from `image_index`, int32 `[B]`,
    the index of each image in the global batch; see `layers.dropout`.

  Raises:
    ValueError: if the name, an override's name or a size is impossible; the
      message lists what would be right.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> def forward(images):
    ...   return create('nfnet_tiny', num_classes=10)(images, is_training=False)
    >>> net = hk.transform_with_state(forward)
    >>> images = jnp.zeros((2, 32, 32, 3))
    >>> params, state = jax.jit(net.init)(jax.random.key(0), images)
    >>> outputs, _ = jax.jit(net.apply)(params, state, None, images)
    >>> outputs['logits'].shape
    (2, 10)
  """
  known = arguments(name)
  unknown = sorted(set(overrides) - set(known))
  if unknown:
    near = difflib.get_close_matches(unknown[0], known)
    raise ValueError(
      f'{name} has no argument {", ".join(unknown)}; it takes '
      f'{", ".join(sorted(known))}'
      + (f' (did you mean {" or ".join(near)}?)' if near else '')
    )
  family = _FAMILIES[variants.get(name).family]
  if 'standardized' in inspect.signature(family).parameters:
    overrides['standardized'] = standardized
  return family(num_classes, **{**known, **overrides}, remat=remat)


def arguments(name: str) -> dict[str, Any]:
  """Returns all that `create` can override, with the variant's values.

  Args:
    name: a variant.

  Returns:
    Values by the name of the argument.

  Raises:
    ValueError: if there is no such variant.

  Example:
    >>> arguments('nfnet_f1')['depth']
    (2, 4, 12, 6)
  """
  variant = variants.get(name)
  parameters = inspect.signature(_FAMILIES[variant.family]).parameters
  defaults = {
    argument: parameter.default
    for argument, parameter in parameters.items()
    if argument not in _NOT_OF_A_VARIANT
  }
  return {**defaults, **variant.architecture}
