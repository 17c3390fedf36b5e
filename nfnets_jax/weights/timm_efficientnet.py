"""EfficientNets between timm's `tf_efficientnet_b*` and this package.

timm holds the published weights in PyTorch's layout, under names of its own,
with the running statistics among them. Only names and layouts differ, so that
converting there and back changes no bit.

Differences:
  * PyTorch's running statistics start at 0 and 1, Haiku's correct the bias of
    their start by the number of updates. Statistics that come from timm count
    as settled, whatever `num_batches_tracked` says; what is written back is
    the corrected average.

Reference:
  timm, https://github.com/huggingface/pytorch-image-models,
  `timm/models/efficientnet.py`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import haiku as hk
import jax
import numpy as np

from nfnets_jax import models

Tree = dict[str, dict[str, np.ndarray]]

# Updates after which 0.99^n is nothing in float32.
_SETTLED = 10_000


@dataclasses.dataclass(frozen=True)
class _Layout:
  """How an array lies here, given how it lies in timm, and the reverse."""

  read: Callable[[np.ndarray], np.ndarray]
  write: Callable[[np.ndarray], np.ndarray]


_CONV = _Layout(
  lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)
_POINTWISE = _Layout(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])
_LINEAR = _Layout(np.transpose, np.transpose)
_VECTOR = _Layout(lambda x: x, lambda x: x)
_CHANNELS = _Layout(lambda x: x.reshape(1, 1, 1, -1), lambda x: x.reshape(-1))


@dataclasses.dataclass(frozen=True)
class _Entry:
  """A tensor of timm: its key, and where and how it lies here."""

  key: str
  module: str
  leaf: str
  layout: _Layout
  is_state: bool = False


def from_timm(
  tensors: Mapping[str, np.ndarray], name: str, **overrides: Any
) -> tuple[Tree, Tree]:
  """Converts a state dict of timm.

  Args:
    tensors: arrays by timm's key.
    name: the variant, such as 'efficientnet_b0'.
    **overrides: of the variant, as for `models.create`.

  Returns:
    Parameters and state, float32. They are meant to be read: arrays may be
    views of `tensors`.

  Raises:
    ValueError: if tensors are missing, left over or of another shape; the
      message lists them all.
  """
  classes = np.shape(tensors.get('classifier.bias', np.zeros(1)))[0]
  like = _shapes(name, classes, overrides)
  entries = list(_entries(name, overrides))
  problems = []
  expected = {_counter_key(e) for e in entries if _is_mean(e)}
  for entry in entries:
    expected.add(entry.key)
    shape = _timm_shape(entry, like)
    if entry.key not in tensors:
      problems.append(f'missing: {entry.key} {shape}')
    elif np.shape(tensors[entry.key]) != shape:
      actual = np.shape(tensors[entry.key])
      problems.append(f'wrong shape: {entry.key} {actual}, not {shape}')
  for key in sorted(set(tensors) - expected):
    problems.append(f'left over: {key} {np.shape(tensors[key])}')
  if problems:
    raise ValueError(f'these tensors are no {name}:\n' + '\n'.join(problems))
  params: Tree = {}
  state: Tree = {}
  for entry in entries:
    x = entry.layout.read(np.asarray(tensors[entry.key], np.float32))
    if not entry.is_state:
      params.setdefault(entry.module, {})[entry.leaf] = x
      continue
    # Not all files have the count.
    updates = int(tensors.get(_counter_key(entry), np.zeros((), np.int64)))
    counter = np.asarray(_SETTLED + updates, np.int32)
    state[entry.module] = {'counter': counter, 'hidden': x, 'average': x}
  return params, state


def to_timm(
  params: Mapping[str, Mapping[str, Any]],
  state: Mapping[str, Mapping[str, Any]],
  name: str,
  **overrides: Any,
) -> dict[str, np.ndarray]:
  """Converts parameters and state into a state dict of timm.

  Args:
    params: of the net.
    state: of the net, with the statistics.
    name: the variant, such as 'efficientnet_b0'.
    **overrides: of the variant, as for `models.create`.

  Returns:
    Arrays by timm's key.

  Raises:
    ValueError: if parameters or state are not those of the net; the message
      lists what is missing, left over or of another shape.
  """
  bias = params.get('EfficientNet/~/linear', {}).get('b', np.zeros(1))
  like = _shapes(name, np.shape(bias)[0], overrides)
  problems = []
  for what, given, wanted in zip(
    ('parameter', 'state'), (params, state), like, strict=True
  ):
    found, expected = (
      {
        f'{m} {leaf}': x.shape
        for m, leaves in t.items()
        for leaf, x in leaves.items()
      }
      for t in (given, wanted)
    )
    for path in sorted(found.keys() | expected.keys()):
      if path not in found:
        problems.append(f'missing: {what} {path} {expected[path]}')
      elif path not in expected:
        problems.append(f'left over: {what} {path} {found[path]}')
      elif found[path] != expected[path]:
        problems.append(
          f'wrong shape: {what} {path} {found[path]}, not {expected[path]}'
        )
  if problems:
    raise ValueError(f'these arrays are no {name}:\n' + '\n'.join(problems))
  tensors = {}
  for entry in _entries(name, overrides):
    tree = state if entry.is_state else params
    x = np.asarray(tree[entry.module][entry.leaf])
    tensors[entry.key] = entry.layout.write(x)
    if _is_mean(entry):
      counter = int(tree[entry.module]['counter'])
      updates = np.asarray(max(0, counter - _SETTLED), np.int64)
      tensors[_counter_key(entry)] = updates
  return tensors


def _shapes(
  name: str, num_classes: int, overrides: Mapping[str, Any]
) -> tuple[Any, Any]:
  """Shapes of the net's parameters and state."""

  def forward(images: jax.Array) -> dict[str, jax.Array]:
    net = models.create(name, num_classes, **overrides)
    return net(images, is_training=False)

  images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  init = hk.transform_with_state(forward).init
  return jax.eval_shape(init, jax.random.key(0), images)


def _entries(name: str, overrides: Mapping[str, Any]) -> Iterator[_Entry]:
  arguments = {**models.arguments(name), **overrides}
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


def _timm_shape(entry: _Entry, like: tuple[Any, Any]) -> tuple[int, ...]:
  shape = like[entry.is_state][entry.module][entry.leaf].shape
  return entry.layout.write(np.broadcast_to(np.float32(0), shape)).shape


def _is_mean(entry: _Entry) -> bool:
  return entry.key.endswith('.running_mean')


def _counter_key(entry: _Entry) -> str:
  return f'{entry.key.rpartition(".")[0]}.num_batches_tracked'
