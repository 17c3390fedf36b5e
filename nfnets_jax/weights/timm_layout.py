"""The arrays of timm's networks and their counterparts here.

`entries` pairs timm's keys with Haiku's modules, in the order of the network.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from nfnets_jax import models
from nfnets_jax.models import activations, variants

# Overrides that match timm's networks, except for the widths.
OVERRIDES: dict[str, dict[str, Any]] = {
  'efficientnet': {},
  'nfnet': {},
  'nf_regnet': {'padding': 'symmetric', 'rounding': 'nearest'},
  'nf_resnet': {
    'padding': 'symmetric',
    'pool_shortcut': True,
    'skipinit': False,
  },
}


@dataclasses.dataclass(frozen=True)
class Layout:
  """Layout conversions from and to timm."""

  read: Callable[[np.ndarray], np.ndarray]
  write: Callable[[np.ndarray], np.ndarray]


CONV = Layout(
  lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)
_POINTWISE = Layout(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])
_LINEAR = Layout(np.transpose, np.transpose)
_VECTOR = Layout(lambda x: x, lambda x: x)
_CHANNELS = Layout(lambda x: x.reshape(1, 1, 1, -1), lambda x: x.reshape(-1))
_GAIN = Layout(lambda x: x.reshape(-1), lambda x: x.reshape(-1, 1, 1, 1))


@dataclasses.dataclass(frozen=True)
class Entry:
  """An array here and in timm, and the conversion between the two.

  Attributes:
    key: name in timm; None if timm has no such array, and it is all ones here.
    module: Haiku module here.
    leaf: name of the parameter or state here.
    layout: conversion of the layout.
    is_state: whether it is state here.
    scale: ours divided by timm's.
    standardized: whether it is the gain of a weight that timm standardises.
    skip: module of a `skip_gain` that timm's number includes.
  """

  key: str | None
  module: str
  leaf: str
  layout: Layout
  is_state: bool = False
  scale: float = 1.0
  standardized: bool = False
  skip: str | None = None


def overrides(name: str) -> dict[str, Any]:
  """Returns overrides for `models.create` that match timm's network.

  Raises:
    ValueError: if timm has no such network.

  Example:
    >>> overrides('nfnet_f0')
    {}
  """
  family = variants.get(name).family
  if family not in OVERRIDES:
    raise ValueError(
      f'{name} has no counterpart in timm; only the families '
      f'{", ".join(sorted(OVERRIDES))} do'
    )
  changes = dict(OVERRIDES[family])
  if family == 'nf_regnet':
    # timm rounds three quarters of the RegNet's widths to multiples of 8. This
    # package rounds the remainder to whole groups.
    width = variants.get(name).settings.width
    full = [-(-x * 4 // 3) for x in width]
    changes['width'] = tuple(_to_eights(0.75 * x) for x in full)
    changes['final_width'] = _to_eights(0.75 * (1280 * full[-1] // 440))
  return changes


def _to_eights(channels: float) -> int:
  return max(8, int(channels + 4) // 8 * 8)


def gamma(name: str, changes: Mapping[str, Any]) -> float:
  """Returns the factor of each convolution's weight in timm."""
  if variants.get(name).family == 'nfnet':
    return 1.0  # the nonlinearity is scaled instead
  activation = {**models.arguments(name), **changes}['activation']
  return activations.gain(activation)


def entries(name: str, changes: Mapping[str, Any]) -> Iterator[Entry]:
  """Yields the arrays of a variant with the given overrides."""
  arguments = {**models.arguments(name), **changes}
  family = variants.get(name).family
  if family == 'efficientnet':
    return _efficientnet(arguments)
  return _normalizer_free(family, arguments, gamma(name, changes))


def _normalizer_free(
  family: str, arguments: Mapping[str, Any], gamma: float
) -> Iterator[Entry]:
  root, block_name = {
    'nfnet': ('NFNet/~', 'nf_block'),
    'nf_regnet': ('NF_RegNet/~', 'nf_block'),
    'nf_resnet': ('NF_ResNet/~', 'nf_res_block'),
  }[family]

  def conv(
    key: str, module: str, scale: float = 1.0, skip: str | None = None
  ) -> Iterator[Entry]:
    # The weight first: the scale of the gain depends on it.
    yield Entry(f'{key}.weight', module, 'w', CONV)
    yield Entry(
      f'{key}.gain',
      module,
      'gain',
      _GAIN,
      scale=scale,
      standardized=True,
      skip=skip,
    )
    yield Entry(f'{key}.bias', module, 'bias', _VECTOR, skip=skip)

  def gate(key: str, module: str) -> Iterator[Entry]:
    for layer, linear in (('fc1', 'linear'), ('fc2', 'linear_1')):
      name = f'{module}/squeeze_excite/~/{linear}'
      yield Entry(f'{key}.{layer}.weight', name, 'w', _POINTWISE)
      yield Entry(f'{key}.{layer}.bias', name, 'b', _VECTOR)

  if family == 'nfnet':
    for i in range(len(arguments['stem_width'])):
      yield from conv(f'stem.conv{i + 1}', f'{root}/stem_conv{i}')
  else:
    yield from conv('stem.conv', f'{root}/initial_conv', gamma)
  parts = {'conv1': 'conv0', 'conv2': 'conv1', 'conv3': 'conv2'}
  if arguments.get('use_two_convs'):
    parts['conv2b'] = 'conv1b'
  index, channels = 0, _stem_channels(family, arguments)
  for stage, (depth, width, stride) in enumerate(
    zip(
      arguments['depth'], arguments['width'], arguments['strides'], strict=True
    )
  ):
    for block in range(depth):
      timm = f'stages.{stage}.{block}'
      module = f'{root}/{block_name}' + (f'_{index}' if index else '')
      skip = None
      if family == 'nfnet':
        yield Entry(f'{timm}.skipinit_gain', module, 'skip_gain', _VECTOR)
      elif arguments.get('skipinit', True):
        yield Entry(None, module, 'skip_gain', _VECTOR)
        skip = module
      for theirs, ours in parts.items():
        yield from conv(
          f'{timm}.{theirs}',
          f'{module}/~/{ours}',
          skip=skip if theirs == 'conv3' else None,
        )
      if width != channels or (stride > 1 and block == 0):
        yield from conv(f'{timm}.downsample.conv', f'{module}/~/conv_shortcut')
      if family == 'nf_regnet':
        yield from gate(f'{timm}.attn', f'{module}/~')
      elif family == 'nfnet' or arguments['use_se']:
        yield from gate(f'{timm}.attn_last', f'{module}/~')
      index, channels = index + 1, width
  if family != 'nf_resnet':
    yield from conv('final_conv', f'{root}/final_conv', gamma)
  yield Entry('head.fc.weight', f'{root}/linear', 'w', _LINEAR, scale=1 / gamma)
  yield Entry('head.fc.bias', f'{root}/linear', 'b', _VECTOR)


def _stem_channels(family: str, arguments: Mapping[str, Any]) -> int:
  match family:
    case 'nfnet':
      return arguments['stem_width'][-1]
    case 'nf_regnet':
      return arguments['width'][0]
  return arguments['stem_width']


def _efficientnet(arguments: Mapping[str, Any]) -> Iterator[Entry]:
  root = 'EfficientNet/~'

  def conv_bn(conv: str, bn: str, module: str) -> Iterator[Entry]:
    yield Entry(f'{conv}.weight', f'{module}_conv', 'w', CONV)
    norm = f'{module}_bn'
    yield Entry(f'{bn}.weight', norm, 'scale', _CHANNELS)
    yield Entry(f'{bn}.bias', norm, 'offset', _CHANNELS)
    for timm, ours in (('mean', 'mean_ema'), ('var', 'var_ema')):
      yield Entry(
        f'{bn}.running_{timm}', f'{norm}/~/{ours}', 'average', _CHANNELS, True
      )

  yield from conv_bn('conv_stem', 'bn1', f'{root}/stem')
  index = 0
  for stage, (depth, expansion) in enumerate(
    zip(arguments['depth'], arguments['expansions'], strict=True)
  ):
    convs = (
      ['conv_dw', 'conv_pw']
      if expansion == 1
      else ['conv_pw', 'conv_dw', 'conv_pwl']
    )
    parts = ['expand', 'depthwise', 'project'][-len(convs) :]
    for block in range(depth):
      timm = f'blocks.{stage}.{block}'
      module = f'{root}/mb_conv_block' + (f'_{index}' if index else '') + '/~'
      for i, (conv, part) in enumerate(zip(convs, parts, strict=True)):
        yield from conv_bn(
          f'{timm}.{conv}', f'{timm}.bn{i + 1}', f'{module}/{part}'
        )
      for conv, linear in (('reduce', 'linear'), ('expand', 'linear_1')):
        key = f'{timm}.se.conv_{conv}'
        gate = f'{module}/squeeze_excite/~/{linear}'
        yield Entry(f'{key}.weight', gate, 'w', _POINTWISE)
        yield Entry(f'{key}.bias', gate, 'b', _VECTOR)
      index += 1
  yield from conv_bn('conv_head', 'bn2', f'{root}/final')
  yield Entry('classifier.weight', f'{root}/linear', 'w', _LINEAR)
  yield Entry('classifier.bias', f'{root}/linear', 'b', _VECTOR)


def is_mean(entry: Entry) -> bool:
  """Returns whether it is a running mean, which has a counter in timm."""
  return entry.key is not None and entry.key.endswith('.running_mean')


def counter_key(entry: Entry) -> str:
  """Returns timm's key for the number of updates of a running mean."""
  return f'{(entry.key or "").rpartition(".")[0]}.num_batches_tracked'
