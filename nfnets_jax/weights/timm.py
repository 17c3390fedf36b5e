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

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from nfnets_jax import models
from nfnets_jax.models import standardization
from nfnets_jax.weights import table
from nfnets_jax.weights import timm_layout as layout
from nfnets_jax.weights.table import AnyTree, Tree
from nfnets_jax.weights.timm_layout import overrides

# Epsilon of timm's standardisation.
_EPS = 1e-5
# Updates after which 0.99^n vanishes in float32.
_SETTLED = 10_000

# timm's names of networks.
ARCHITECTURES: Mapping[str, str] = {
  **{f'nfnet_f{n}': f'dm_nfnet_f{n}' for n in range(7)},
  **{f'nf_regnet_b{n}': f'nf_regnet_b{n}' for n in range(6)},
  **{f'nf_resnet{n}': f'nf_resnet{n}' for n in (50, 101)},
  **{f'efficientnet_b{n}': f'tf_efficientnet_b{n}' for n in range(9)},
}

# A key unique to the family, the family, and a pattern of one key per block.
_BLOCK = r'stages\.\d+\.\d+\.conv1\.weight'
_MARKS = (
  ('stem.conv1.gain', 'nfnet', _BLOCK),
  ('stages.0.0.attn.fc1.weight', 'nf_regnet', _BLOCK),
  ('stem.conv.gain', 'nf_resnet', _BLOCK),
  ('conv_stem.weight', 'efficientnet', r'blocks\.\d+\.\d+\.conv_dw\.weight'),
)


def counterpart(name: str) -> str | None:
  """Returns the variant for a name in timm, None if there is none.

  Example:
    >>> counterpart('dm_nfnet_f0'), counterpart('vit_tiny')
    ('nfnet_f0', None)
  """
  return next((k for k, v in ARCHITECTURES.items() if v == name), None)


def differences(name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the settings of timm's network that differ from a variant's.

  Regularisation is left out, since it does not act on inference.

  Args:
    name: the variant.
    changes: its overrides.

  Raises:
    ValueError: if timm has no such network.

  Example:
    >>> differences('nf_resnet50', {'skipinit': False, 'drop_rate': 0.2})
    {'padding': 'symmetric', 'pool_shortcut': True}
  """
  ours = {**models.arguments(name), **changes}
  theirs = {**models.arguments(name), **overrides(name)}
  return {
    field: value
    for field, value in theirs.items()
    if ours[field] != value and field not in table.REGULARISATION
  }


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
  entries = list(layout.entries(name, changes))
  table.check_empty(_problems(tensors, entries, like), f"timm's {name}")
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
      np.asarray(tensors.get(layout.counter_key(entry), np.zeros((), np.int64)))
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
  entries = list(layout.entries(name, changes))
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
    if layout.is_mean(entry):
      counter = int(tree[entry.module]['counter'])
      updates = np.asarray(max(0, counter - _SETTLED), np.int64)
      tensors[layout.counter_key(entry)] = updates
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
  for entry in layout.entries(name, changes):
    if not entry.standardized or entry.key is None:
      continue
    weight = f'{entry.key.removesuffix("gain")}weight'
    w = np.asarray(params[entry.module]['w'], np.float64)
    flat = w.reshape(-1, w.shape[-1])
    gain = np.asarray(params[entry.module]['gain'], np.float64)
    if entry.skip:
      gain = gain * np.float64(params[entry.skip]['skip_gain'])
    # All factors of timm's gain except the standardisation stay in the weight.
    gain = gain / entry.scale * layout.gamma(name, changes)
    norm = np.sqrt(np.maximum(flat.var(0) * len(flat), standardization.WS_EPS))
    plain = ((flat - flat.mean(0)) * (gain / norm)).reshape(w.shape)
    del tensors[entry.key]
    tensors[weight] = layout.CONV.write(plain.astype(np.float32))
  return tensors


def _problems(
  tensors: Mapping[str, Any], entries: list[layout.Entry], like: tuple[Any, Any]
) -> list[str]:
  expected = {}
  for entry in entries:
    if entry.key is not None:
      shape = like[entry.is_state][entry.module][entry.leaf].shape
      zeros = np.broadcast_to(np.float32(0), shape)
      expected[entry.key] = entry.layout.write(zeros).shape
  counters = {layout.counter_key(e) for e in entries if layout.is_mean(e)}
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
    lists[name] = _problems(tensors, list(layout.entries(name, changes)), like)
  if not lists:
    raise ValueError(f'these tensors have {blocks} blocks, and no {family} has')
  nearest = min(lists, key=lambda name: len(lists[name]))
  table.check_empty(lists[nearest], f"timm's {nearest}, the nearest of all")
  return nearest


def _num_classes(tensors: Mapping[str, Any]) -> int:
  for key in ('head.fc.bias', 'classifier.bias'):
    if key in tensors:
      return int(np.shape(tensors[key])[0])
  return 1


def _is_scaled(entry: layout.Entry) -> bool:
  return entry.scale != 1.0 or entry.standardized or entry.skip is not None


def _factor(entry: layout.Entry, params: AnyTree) -> np.ndarray:
  """Returns ours divided by timm's, without the skip gain, in float64."""
  factor = np.asarray(entry.scale, np.float64)
  if entry.standardized:
    flat = np.asarray(params[entry.module]['w'], np.float64)
    flat = flat.reshape(-1, flat.shape[-1])
    var, fan_in = flat.var(0), len(flat)
    ours = np.maximum(var * fan_in, standardization.WS_EPS)
    factor = factor * np.sqrt(ours / (fan_in * (var + _EPS)))
  return factor
