"""Builds a network by name."""

from collections.abc import Callable
from typing import Any

import haiku as hk

from nfnets_jax.models import (
  bn_nfnet,
  efficientnet,
  fixup_resnet,
  nf_regnet,
  nf_resnet,
  nfnet,
  resnet,
  variants,
)
from nfnets_jax.models.settings import NFNetSettings


def _nfnet(
  num_classes: int,
  settings: NFNetSettings,
  *,
  standardized: bool,
  remat: str | None,
) -> hk.Module:
  """Builds the paper's network, or that of its ablation."""
  if settings.norm is not None:
    return bn_nfnet.BNNFNet(num_classes, settings, remat=remat)
  return nfnet.NFNet(
    num_classes, settings, standardized=standardized, remat=remat
  )


_WEIGHT_STANDARDIZED: dict[str, Callable[..., Any]] = {
  'nf_regnet': nf_regnet.NFRegNet,
  'nf_resnet': nf_resnet.NFResNet,
  'nfnet': _nfnet,
}
_OTHERS: dict[str, Callable[..., Any]] = {
  'efficientnet': efficientnet.EfficientNet,
  'fixup_resnet': fixup_resnet.FixupResNet,
  'resnet': resnet.ResNet,
}


def create(
  name: str,
  num_classes: int = 1000,
  *,
  features_only: bool = False,
  standardized: bool = False,
  remat: str | None = None,
  **overrides: Any,
) -> Any:
  """Returns a network by name, for use inside `hk.transform_with_state`.

  Args:
    name: a variant, such as 'nfnet_f0'; `models.list` lists them.
    num_classes: K, number of logits.
    features_only: whether to return feature maps instead of logits; the network
      then has no classifier, and ignores parameters of one.
    standardized: whether the parameters come from `models.fold`.
    remat: granularity of rematerialisation: 'block', 'stage', or None; see
      `residual_net.ResidualNet`.
    **overrides: settings of the variant to replace, such as `drop_rate=0.0`;
      see the family's class in `settings`.

  Returns:
    A callable `(images, is_training, image_index=None)` of images
    `[B, H, W, 3]`. It returns a dict with at least `logits` `[B, K]` and `pool`
    `[B, C]`; with `features_only`, a list of maps
    `[B, H / stride, W / stride, C]`, finest first, as timm does: the last one
    at each stride, before its activation. `models.feature_info` gives channels
    and strides. Dropout and stochastic depth depend on `image_index`, the index
    of each image in the global batch, int32 `[B]`; see `dropout.dropout`.

  Raises:
    ValueError: if the variant or a setting does not exist, or a value is
      invalid.

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
  settings = variants.override(name, overrides)
  family = variants.get(name).family
  if family in _OTHERS:
    net = _OTHERS[family](num_classes, settings, remat=remat)
  else:
    net = _WEIGHT_STANDARDIZED[family](
      num_classes, settings, standardized=standardized, remat=remat
    )
  return net.features if features_only else net
