"""Parameters and images that anyone can rebuild, for the golden values.

The golden files come from the released implementation (float32, CPU, jax
0.10.2, highest matmul precision) run on these parameters and images.
"""

import hashlib
import zlib

import numpy as np


def fill(module: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """The value of one Haiku parameter, float32."""
  rng = np.random.default_rng([0, zlib.crc32(f'{module}:{name}'.encode())])
  x = np.asarray(
    rng.standard_normal(shape or None, dtype=np.float32), np.float32
  )
  if name == 'w':
    return x / np.float32(np.sqrt(max(1, np.prod(shape[:-1]))))
  if name in ('gain', 'scale'):
    return np.float32(1) + np.float32(0.1) * x
  if name == 'skip_gain':
    return np.float32(0.5) + np.float32(0.1) * x
  return np.float32(0.1) * x


def fill_tree(shapes) -> dict[str, dict[str, np.ndarray]]:
  """Fills a tree of anything that has a shape."""
  return {
    module: {name: fill(module, name, x.shape) for name, x in leaves.items()}
    for module, leaves in shapes.items()
  }


def digest(shapes) -> str:
  """What `families.json` says of a tree of anything that has a shape."""
  table = '\n'.join(
    f'{module} {name} {tuple(shapes[module][name].shape)}'
    for module in sorted(shapes)
    for name in sorted(shapes[module])
  )
  return hashlib.sha256(table.encode()).hexdigest()


def image(n: int, px: int) -> np.ndarray:
  """White noise `[n, px, px, 3]`."""
  rng = np.random.default_rng([0, px, n])
  return rng.standard_normal((n, px, px, 3), dtype=np.float32)


def relative_error(ours, golden) -> float:
  """‖ours − golden‖₂ / ‖golden‖₂ in float64."""
  ours, golden = np.asarray(ours, np.float64), np.asarray(golden, np.float64)
  return float(np.linalg.norm(ours - golden) / np.linalg.norm(golden))
