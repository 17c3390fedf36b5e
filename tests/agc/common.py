"""Random leaves, AGC in float64 numpy, and parameters by path."""

import jax
import jax.numpy as jnp
import numpy as np

from nfnets_jax import agc

SHAPES = {
  'HWIO': ((3, 3, 4, 5), (0, 1, 2)),
  'OIHW': ((5, 4, 3, 3), (1, 2, 3)),
  'IO': ((4, 5), (0,)),
  'OI': ((5, 4), (1,)),
  'WIO': ((3, 4, 5), (0, 1)),
  'SIO': ((2, 4, 5), (1,)),
  'SHWIO': ((2, 3, 3, 4, 5), (1, 2, 3)),
  'DHWIO': ((2, 3, 3, 4, 5), (0, 1, 2, 3)),
  'IOO': ((4, 2, 5), (0,)),
  'OOI': ((2, 5, 4), (2,)),
  'I': ((4,), (0,)),
  'O': ((4,), ()),
  'S*': ((2, 3, 3, 4, 5), (1, 2, 3)),
  'SS*': ((2, 3, 4, 5), (2,)),
  '*': ((3, 3, 4, 5), (0, 1, 2)),
}


def draw(shape, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  return (scale * rng.standard_normal(shape)).astype(np.float32)


def oracle(g, w, axes, clipping, eps=1e-3):
  g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)

  def norm(x):
    return np.sqrt(np.sum(x**2, axis=axes, keepdims=True))

  limit = clipping * np.maximum(norm(w), eps)
  return np.where(norm(g) < limit, g, g * limit / np.maximum(norm(g), 1e-6))


def clip(grads, params, *args, compiled=False, **kwargs):
  """Clips, in a single program if `compiled`, which is faster."""
  transform = agc.adaptive_grad_clip(*args, **kwargs)
  update = jax.jit(transform.update) if compiled else transform.update
  updates, _ = update(grads, transform.init(params), params)
  return updates


def tree(*paths, shape=(2, 2)):
  """Parameters of these paths."""
  found = {}
  for path in paths:
    *modules, name = path.split('/')
    node = found
    for module in modules:
      node = node.setdefault(module, {})
    node[name] = jnp.ones(shape)
  return found
