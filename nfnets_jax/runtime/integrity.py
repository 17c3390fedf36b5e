"""State fingerprints, and packing of small arrays for checkpoints."""

import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nfnets_jax.runtime import parallel

# Arrays up to this size are packed. Summing them in numpy is faster than
# compiling a program for their shape.
_SMALL = 1 << 16


def pack(state: Any) -> dict[str, Any]:
  """Concatenates the small arrays of each dtype and keeps the others.

  Maps names to one device's copy of each large array and, on the host, a vector
  of the small arrays of each dtype.
  """
  copy = _named(jax.tree.map(parallel.local_copy, state))
  large = {name: x for name, x in copy.items() if x.size > _SMALL}
  small: dict[str, list[np.ndarray]] = {}
  for x in jax.device_get([x for x in copy.values() if x.size <= _SMALL]):
    small.setdefault(f'small {np.dtype(x.dtype).name}', []).append(np.ravel(x))
  return large | {name: np.concatenate(parts) for name, parts in small.items()}


def unpack(packed: dict[str, Any], template: Any) -> Any:
  """Inverts `pack`, given a template of numpy arrays."""
  offsets = dict.fromkeys(packed, 0)

  def array(name: str, like: np.ndarray) -> np.ndarray:
    if like.size > _SMALL:
      return packed[name]
    small = f'small {like.dtype.name}'
    start, offsets[small] = offsets[small], offsets[small] + like.size
    return packed[small][start : offsets[small]].reshape(like.shape)

  leaves = [array(name, like) for name, like in _named(template).items()]
  return jax.tree.unflatten(jax.tree.structure(template), leaves)


def fingerprint_of(state: Any, loader_state: dict[str, Any]) -> str:
  """Returns a hex digest of the bits of a state and of the loader state.

  Detects every single-bit change; misses other corruption with probability
  2^-32 per corrupt array. The same on every kind of device. Elements have up to
  32 bits; `loader_state` is JSON-serialisable.

  Example:
    >>> x = np.zeros(3, np.float32)
    >>> fingerprint_of([x], {}) == fingerprint_of([-x], {})  # -0.0
    False
  """
  return fingerprint(describe(state), pack(state), loader_state)


def fingerprint(
  arrays: dict[str, Any], packed: dict[str, Any], loader_state: dict[str, Any]
) -> str:
  """Returns `fingerprint_of` a state from its `describe` and `pack`."""
  sums = {
    name: (_sum_of_bits if x.size <= _SMALL else _compiled_sum_of_bits)(x)
    for name, x in packed.items()
  }
  sums = {name: int(x) for name, x in jax.device_get(sums).items()}
  return digest([arrays, sums, loader_state])


def _sum_of_bits(x: Any, xp: Any = np) -> Any:
  """Sums a hash of each element and its index, modulo 2^32."""
  if x.dtype == np.bool_:
    x = x.astype(np.uint8)
  bits = x.ravel().view(f'uint{8 * x.dtype.itemsize}').astype(np.uint32)
  indices = xp.arange(bits.size, dtype=np.uint32)
  return xp.sum(_scramble(bits + _scramble(indices)), dtype=np.uint32)


# Runs in one pass where the array lives; compiles once per shape.
_compiled_sum_of_bits = jax.jit(functools.partial(_sum_of_bits, xp=jnp))


def _scramble(x: Any) -> Any:
  """Mixes the bits of 32-bit integers, bijectively."""
  # Odd factors and right shifts are invertible: no information is lost.
  for factor in (0x7FEB352D, 0x846CA68B):
    x = (x ^ (x >> np.uint32(16))) * np.uint32(factor)
  return x ^ (x >> np.uint32(15))


def digest(value: Any) -> str:
  """Returns the SHA-256 hex digest of a JSON-serialisable value."""
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _named(tree: Any) -> dict[str, Any]:
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def describe(tree: Any) -> dict[str, list]:
  """Returns name → [dtype, shape] of the arrays, JSON-serialisable."""
  return {
    name: [np.dtype(x.dtype).name, list(x.shape)]
    for name, x in _named(tree).items()
  }
