"""Converts weights between timm and this package.

| here | in timm |
|---|---|
| `nfnet_f0` … | `dm_nfnet_f0` … |
| `nf_resnet50` … | `nf_resnet50` …, with `overrides('nf_resnet50')` |
| `nf_regnet_b0` … | `nf_regnet_b0` …, with `overrides('nf_regnet_b0')` |
| `efficientnet_b0` … | `tf_efficientnet_b0` … |

timm has PyTorch layouts, its own names, and running statistics among the
weights. Renaming and transposing are exact. Where timm's arithmetic differs,
the numbers are rescaled to compensate:

  * timm standardises a weight with (w − μ) / √(σ² + 1e-5), the released code
    and this package with (w − μ) / √max(N·σ², 1e-4) for a fan-in of N. The
    ratio, a factor per output channel, is absorbed by the gain.
  * timm's NF-ResNets and NF-RegNets scale the weight of each convolution by the
    gain γ of the nonlinearity; this package scales the nonlinearity. So γ is
    absorbed by the gain of convolutions that follow none, and by the
    classifier.
  * Those networks have no SkipInit in timm. An NF-ResNet can omit it; in an
    NF-RegNet it is absorbed by gain and bias of the branch's last convolution.

A rescaled number may be off by a rounding after the way back. `originals`
stores those numbers, for a bit-exact round trip.

Remaining differences:
  * timm computes the exact GELU of NFNets, this package, as released, the tanh
    approximation: a difference of 2e-4 in the logits of F0.
  * PyTorch's running statistics start at 0 and 1; Haiku's are debiased by the
    number of updates. Statistics from timm are treated as converged, whatever
    `num_batches_tracked` says; the debiased average is written.

Reference:
  timm, https://github.com/huggingface/pytorch-image-models,
  `timm/models/nfnet.py`, `timm/models/efficientnet.py` and
  `timm/layers/std_conv.py`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from nfnets_jax import models
from nfnets_jax.models import activations, standardization, variants
from nfnets_jax.weights import table
from nfnets_jax.weights.table import AnyTree, Tree

# Epsilon of timm's standardisation.
_EPS = 1e-5
# Updates after which 0.99^n vanishes in float32.
_SETTLED = 10_000

# timm's prefixes for weights that were ported to it.
_PREFIXES = {'efficientnet': 'tf_', 'nfnet': 'dm_'}
# Overrides that match timm's networks, except for the widths.
_OVERRIDES: dict[str, dict[str, Any]] = {
  'efficientnet': {},
  'nfnet': {},
  'nf_regnet': {'padding': 'symmetric', 'rounding': 'nearest'},
  'nf_resnet': {
    'padding': 'symmetric',
    'pool_shortcut': True,
    'skipinit': False,
  },
}


# A key unique to the family, the family, and a pattern of one key per block.
_BLOCK = r'stages\.\d+\.\d+\.conv1\.weight'
_MARKS = (
  ('stem.conv1.gain', 'nfnet', _BLOCK),
  ('stages.0.0.attn.fc1.weight', 'nf_regnet', _BLOCK),
  ('stem.conv.gain', 'nf_resnet', _BLOCK),
  ('conv_stem.weight', 'efficientnet', r'blocks\.\d+\.\d+\.conv_dw\.weight'),
)


@dataclasses.dataclass(frozen=True)
class _Layout:
  """Layout conversions from and to timm."""

  read: Callable[[np.ndarray], np.ndarray]
  write: Callable[[np.ndarray], np.ndarray]


_CONV = _Layout(
  lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)
_POINTWISE = _Layout(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])
_LINEAR = _Layout(np.transpose, np.transpose)
_VECTOR = _Layout(lambda x: x, lambda x: x)
_CHANNELS = _Layout(lambda x: x.reshape(1, 1, 1, -1), lambda x: x.reshape(-1))
_GAIN = _Layout(lambda x: x.reshape(-1), lambda x: x.reshape(-1, 1, 1, 1))


@dataclasses.dataclass(frozen=True)
class _Entry:
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
  layout: _Layout
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
  if family not in _OVERRIDES:
    raise ValueError(
      f'{name} has no counterpart in timm; those of '
      f'{", ".join(sorted(_OVERRIDES))} have'
    )
  changes = dict(_OVERRIDES[family])
  if family == 'nf_regnet':
    # timm rounds three quarters of the RegNet's widths to multiples of 8. This
    # package rounds the remainder to whole groups.
    width = variants.get(name).settings.width
    full = [-(-x * 4 // 3) for x in width]
    changes['width'] = tuple(_to_eights(0.75 * x) for x in full)
    changes['final_width'] = _to_eights(0.75 * (1280 * full[-1] // 440))
  return changes


def counterpart(name: str) -> str | None:
  """Returns the variant for a name in timm, None if there is none.

  Example:
    >>> counterpart('dm_nfnet_f0'), counterpart('vit_tiny')
    ('nfnet_f0', None)
  """
  for ours, variant in variants.VARIANTS.items():
    theirs = f'{_PREFIXES.get(variant.family, "")}{ours}'
    if name == theirs and variant.family in _OVERRIDES:
      return ours
  return None


def _to_eights(channels: float) -> int:
  return max(8, int(channels + 4) // 8 * 8)


def from_timm(
  tensors: Mapping[str, Any],
  name: str,
  exact: AnyTree | None = None,
  **changes: Any,
) -> tuple[Tree, Tree]:
  """Converts a state dict of timm.

  Args:
    tensors: arrays by timm's keys.
    name: the variant here, such as 'nfnet_f0'.
    exact: result of `originals`, used if `tensors` are unchanged.
    **changes: overrides of the variant besides `overrides`, as in
      `models.create`.

  Returns:
    Parameters and state, float32. Read-only: arrays may be views of `tensors`.

  Raises:
    ValueError: if tensors are missing, surplus or of the wrong shape; the
      message lists them all.
  """
  changes = {**overrides(name), **changes}
  like = table.shapes(name, _num_classes(tensors), changes)
  entries = list(_entries(name, changes))
  table.complain(_problems(tensors, entries, like), f"timm's {name}")
  params: Tree = {}
  state: Tree = {}
  for entry in entries:
    shape = like[entry.is_state][entry.module][entry.leaf].shape
    if entry.key is None:
      x = np.ones(shape, np.float32)
    else:
      x = entry.layout.read(np.asarray(tensors[entry.key], np.float32))
      if _is_scaled(entry):
        x = (x * _factor(entry, params)).astype(np.float32)
    if not entry.is_state:
      params.setdefault(entry.module, {})[entry.leaf] = x
      continue
    # Some files have no counter.
    updates = int(
      np.asarray(tensors.get(_counter_key(entry), np.zeros((), np.int64)))
    )
    counter = np.asarray(_SETTLED + updates, np.int32)
    state[entry.module] = {'counter': counter, 'hidden': x, 'average': x}
  if exact:
    restored = {
      m: {**leaves, **exact.get(m, {})} for m, leaves in params.items()
    }
    if not _differing(to_timm(restored, state, name, **changes), tensors):
      return restored, state
  return params, state


def to_timm(
  params: AnyTree, state: AnyTree, name: str, **changes: Any
) -> dict[str, np.ndarray]:
  """Converts parameters and state to a state dict of timm.

  Args:
    params: of the network, float32.
    state: of the network, with the statistics.
    name: as in `from_timm`.
    **changes: as in `from_timm`.

  Returns:
    Arrays by timm's keys.

  Raises:
    ValueError: if parameters or state do not match the network; the message
      lists what is missing, surplus or of the wrong shape.
  """
  changes = {**overrides(name), **changes}
  entries = list(_entries(name, changes))
  table.check((params, state), name, changes)
  tensors = {}
  for entry in entries:
    if entry.key is None:
      continue
    tree = state if entry.is_state else params
    x = np.asarray(tree[entry.module][entry.leaf])
    if _is_scaled(entry):
      skip = params[entry.skip]['skip_gain'] if entry.skip else 1.0
      x = (x * np.float64(skip) / _factor(entry, params)).astype(np.float32)
    tensors[entry.key] = entry.layout.write(x)
    if _is_mean(entry):
      counter = int(tree[entry.module]['counter'])
      updates = np.asarray(max(0, counter - _SETTLED), np.int64)
      tensors[_counter_key(entry)] = updates
  return tensors


def originals(
  params: AnyTree,
  state: AnyTree,
  tensors: Mapping[str, np.ndarray],
  name: str,
  **changes: Any,
) -> Tree:
  """Returns the parameters that `from_timm` cannot restore bit by bit.

  They are its argument `exact`. `tensors` is the result of `to_timm` for the
  same arguments.
  """
  del state  # not rescaled
  back, _ = from_timm(tensors, name, **changes)
  inexact: Tree = {}
  for module, leaves in params.items():
    for leaf, x in leaves.items():
      if not np.array_equal(back[module][leaf], x):
        inexact.setdefault(module, {})[leaf] = np.asarray(x)
  return inexact


def folded(
  params: AnyTree, state: AnyTree, name: str, **changes: Any
) -> dict[str, np.ndarray]:
  """Converts to a PyTorch network with plain convolutions.

  As `to_timm`, but weights are standardised and scaled by the gains, which are
  removed.
  """
  tensors = to_timm(params, state, name, **changes)
  changes = {**overrides(name), **changes}
  for entry in _entries(name, changes):
    if not entry.standardized or entry.key is None:
      continue
    weight = f'{entry.key.removesuffix("gain")}weight'
    w = np.asarray(params[entry.module]['w'], np.float64)
    flat = w.reshape(-1, w.shape[-1])
    gain = np.asarray(params[entry.module]['gain'], np.float64)
    if entry.skip:
      gain = gain * np.float64(params[entry.skip]['skip_gain'])
    # All factors of timm's gain except the standardisation stay in the weight.
    gain = gain / entry.scale * _gamma(name, changes)
    norm = np.sqrt(np.maximum(flat.var(0) * len(flat), standardization.WS_EPS))
    plain = ((flat - flat.mean(0)) * (gain / norm)).reshape(w.shape)
    del tensors[entry.key]
    tensors[weight] = _CONV.write(plain.astype(np.float32))
  return tensors


def _problems(
  tensors: Mapping[str, Any], entries: list[_Entry], like: tuple[Any, Any]
) -> list[str]:
  expected = {}
  for entry in entries:
    if entry.key is not None:
      shape = like[entry.is_state][entry.module][entry.leaf].shape
      zeros = np.broadcast_to(np.float32(0), shape)
      expected[entry.key] = entry.layout.write(zeros).shape
  counters = {_counter_key(e) for e in entries if _is_mean(e)}
  given = {
    k: tuple(np.shape(x)) for k, x in tensors.items() if k not in counters
  }
  return table.compare(given, expected)


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
  return any(not np.array_equal(x, np.asarray(b[key])) for key, x in a.items())


def identify(tensors: Mapping[str, Any]) -> str:
  """Returns the variant for a state dict of timm, by keys and shapes.

  Raises:
    ValueError: if there is none; the message lists the differences from the
      nearest.
  """
  family, pattern = next(
    (known for key, *known in _MARKS if key in tensors), (None, '')
  )
  if family is None:
    some = sorted(str(key)[:60] for key in tensors)[:5]
    raise ValueError(
      f'these tensors are of no net of timm that is known; some are {some}'
    )
  blocks = sum(re.fullmatch(pattern, key) is not None for key in tensors)
  lists = {}
  for name in table.candidates(family, blocks):
    changes = overrides(name)
    like = table.shapes(name, _num_classes(tensors), changes)
    lists[name] = _problems(tensors, list(_entries(name, changes)), like)
  if not lists:
    raise ValueError(f'these tensors have {blocks} blocks, and no {family} has')
  nearest = min(lists, key=lambda name: len(lists[name]))
  table.complain(lists[nearest], f"timm's {nearest}, the nearest of all")
  return nearest


def _num_classes(tensors: Mapping[str, Any]) -> int:
  for key in ('head.fc.bias', 'classifier.bias'):
    if key in tensors:
      return int(np.shape(tensors[key])[0])
  return 1


def _is_scaled(entry: _Entry) -> bool:
  return entry.scale != 1.0 or entry.standardized or entry.skip is not None


def _factor(entry: _Entry, params: AnyTree) -> np.ndarray:
  """Returns ours divided by timm's, without the skip gain, in float64."""
  factor = np.asarray(entry.scale, np.float64)
  if entry.standardized:
    flat = np.asarray(params[entry.module]['w'], np.float64)
    flat = flat.reshape(-1, flat.shape[-1])
    var, fan_in = flat.var(0), len(flat)
    ours = np.maximum(var * fan_in, standardization.WS_EPS)
    factor = factor * np.sqrt(ours / (fan_in * (var + _EPS)))
  return factor


def _gamma(name: str, changes: Mapping[str, Any]) -> float:
  """Returns the factor of each convolution's weight in timm."""
  if variants.get(name).family == 'nfnet':
    return 1.0  # the nonlinearity is scaled instead
  activation = {**models.arguments(name), **changes}['activation']
  return activations.gain(activation)


def _entries(name: str, changes: Mapping[str, Any]) -> Iterator[_Entry]:
  arguments = {**models.arguments(name), **changes}
  family = variants.get(name).family
  if family == 'efficientnet':
    return _efficientnet(arguments)
  return _normalizer_free(family, arguments, _gamma(name, changes))


def _normalizer_free(
  family: str, arguments: Mapping[str, Any], gamma: float
) -> Iterator[_Entry]:
  root, block_name = {
    'nfnet': ('NFNet/~', 'nf_block'),
    'nf_regnet': ('NF_RegNet/~', 'nf_block'),
    'nf_resnet': ('NF_ResNet/~', 'nf_res_block'),
  }[family]

  def conv(
    key: str, module: str, scale: float = 1.0, skip: str | None = None
  ) -> Iterator[_Entry]:
    # The weight first: the scale of the gain depends on it.
    yield _Entry(f'{key}.weight', module, 'w', _CONV)
    yield _Entry(
      f'{key}.gain',
      module,
      'gain',
      _GAIN,
      scale=scale,
      standardized=True,
      skip=skip,
    )
    yield _Entry(f'{key}.bias', module, 'bias', _VECTOR, skip=skip)

  def gate(key: str, module: str) -> Iterator[_Entry]:
    for layer, linear in (('fc1', 'linear'), ('fc2', 'linear_1')):
      name = f'{module}/squeeze_excite/~/{linear}'
      yield _Entry(f'{key}.{layer}.weight', name, 'w', _POINTWISE)
      yield _Entry(f'{key}.{layer}.bias', name, 'b', _VECTOR)

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
        yield _Entry(f'{timm}.skipinit_gain', module, 'skip_gain', _VECTOR)
      elif arguments.get('skipinit', True):
        yield _Entry(None, module, 'skip_gain', _VECTOR)
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
  yield _Entry(
    'head.fc.weight', f'{root}/linear', 'w', _LINEAR, scale=1 / gamma
  )
  yield _Entry('head.fc.bias', f'{root}/linear', 'b', _VECTOR)


def _stem_channels(family: str, arguments: Mapping[str, Any]) -> int:
  match family:
    case 'nfnet':
      return arguments['stem_width'][-1]
    case 'nf_regnet':
      return arguments['width'][0]
  return arguments['stem_width']


def _efficientnet(arguments: Mapping[str, Any]) -> Iterator[_Entry]:
  root = 'EfficientNet/~'

  def conv_bn(conv: str, bn: str, module: str) -> Iterator[_Entry]:
    yield _Entry(f'{conv}.weight', f'{module}_conv', 'w', _CONV)
    norm = f'{module}_bn'
    yield _Entry(f'{bn}.weight', norm, 'scale', _CHANNELS)
    yield _Entry(f'{bn}.bias', norm, 'offset', _CHANNELS)
    for timm, ours in (('mean', 'mean_ema'), ('var', 'var_ema')):
      yield _Entry(
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
        yield _Entry(f'{key}.weight', gate, 'w', _POINTWISE)
        yield _Entry(f'{key}.bias', gate, 'b', _VECTOR)
      index += 1
  yield from conv_bn('conv_head', 'bn2', f'{root}/final')
  yield _Entry('classifier.weight', f'{root}/linear', 'w', _LINEAR)
  yield _Entry('classifier.bias', f'{root}/linear', 'b', _VECTOR)


def _is_mean(entry: _Entry) -> bool:
  return entry.key is not None and entry.key.endswith('.running_mean')


def _counter_key(entry: _Entry) -> str:
  return f'{(entry.key or "").rpartition(".")[0]}.num_batches_tracked'
