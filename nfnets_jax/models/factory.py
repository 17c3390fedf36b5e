"""Builds a network by name."""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

import haiku as hk

from nfnets_jax.models import (
  blocks,
  bn_nfnet,
  efficientnet,
  fixup_resnet,
  nf_regnet,
  nf_resnet,
  nfnet,
  resnet,
  variants,
)


def _nfnet(
  num_classes: int,
  settings: variants.NFNetSettings,
  *,
  standardized: bool,
  remat: str | None,
) -> hk.Module:
  """The paper's net, or the one of its ablation."""
  blocks.check_norm(settings.norm, settings.cross_replica_axis)
  if settings.norm is not None:
    return bn_nfnet.BNNFNet(num_classes, settings, remat=remat)
  return nfnet.NFNet(
    num_classes, settings, standardized=standardized, remat=remat
  )


_WEIGHT_STANDARDIZED: dict[str, Callable[..., hk.Module]] = {
  'nf_regnet': nf_regnet.NFRegNet,
  'nf_resnet': nf_resnet.NFResNet,
  'nfnet': _nfnet,
}
_OTHERS: dict[str, Callable[..., hk.Module]] = {
  'efficientnet': efficientnet.EfficientNet,
  'fixup_resnet': fixup_resnet.FixupResNet,
  'resnet': resnet.ResNet,
}


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
    remat: None, 'block' or 'stage', what the backward pass recomputes to save
      memory; see `blocks.ResidualNet`.
    **overrides: replace settings of the variant, for example `drop_rate=0.0` or
      `group_width=(192, 128, 128, 128)`; see the family's class in `variants`.

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
  variant = variants.get(name)
  settings = dataclasses.replace(variant.settings, **overrides)
  if variant.family in _OTHERS:
    return _OTHERS[variant.family](num_classes, settings, remat=remat)
  return _WEIGHT_STANDARDIZED[variant.family](
    num_classes, settings, standardized=standardized, remat=remat
  )


def arguments(name: str) -> dict[str, Any]:
  """Returns all that `create` can override, with the variant's values.

  Args:
    name: a variant.

  Returns:
    Values by the name of the setting.

  Raises:
    ValueError: if there is no such variant.

  Example:
    >>> arguments('nfnet_f1')['depth']
    (2, 4, 12, 6)
  """
  return dataclasses.asdict(variants.get(name).settings)
