"""Dropout and stochastic depth.

Differences:
  Stochastic depth draws in float32. The released code draws in the dtype of the
  features, and bfloat16 rounds the rates to about 1/128.
"""

import functools

import haiku as hk
import jax
import jax.numpy as jnp


def stochastic_depth(
  x: jax.Array,
  rate: float,
  is_training: bool,
  image_index: jax.Array | None = None,
  *,
  rescale: bool = False,
) -> jax.Array:
  """Drops the whole residual branch of an image with probability `rate`.

  As in the released code, kept branches are not rescaled by default.

  Args:
    x: residual branch `[B, H, W, C]`.
    rate: probability of dropping, in [0, 1).
    is_training: whether to drop, which needs a Haiku random key if `rate` > 0.
    image_index: int32 `[B]`; see `dropout`.
    rescale: whether to divide kept branches by 1 − rate.

  Reference:
    Huang et al. 2016, https://arxiv.org/abs/1603.09382.
  """
  if not is_training or rate == 0.0:
    return x
  keep = _draw_kept(rate, (x.shape[0], 1, 1, 1), image_index).astype(x.dtype)
  return x * (keep / (1.0 - rate) if rescale else keep)


def dropout(
  x: jax.Array,
  rate: float,
  is_training: bool,
  image_index: jax.Array | None = None,
) -> jax.Array:
  """Zeroes each element with probability `rate` and rescales the others.

  With `image_index`, the mask of an image depends only on the Haiku key and its
  index, so that it does not depend on how a batch is split over devices and
  micro-batches.

  Args:
    x: `[B, ...]`.
    rate: probability of zeroing, in [0, 1).
    is_training: whether to drop, which needs a Haiku random key if `rate` > 0.
    image_index: index of each image in the global batch, int32 `[B]`.

  Example:
    >>> net = hk.transform(lambda x, index: dropout(x, 0.5, True, index))
    >>> key, x, index = jax.random.key(0), jnp.ones((4, 8)), jnp.arange(4)
    >>> whole = net.apply({}, key, x, index)
    >>> half = net.apply({}, key, x[2:], index[2:])
    >>> bool((half == whole[2:]).all())
    True

  Reference:
    Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html.
  """
  if not is_training or rate == 0.0:
    return x
  kept = _draw_kept(rate, x.shape, image_index)
  return jnp.where(kept, x / (1.0 - rate), 0.0)


def _draw_kept(
  rate: float, shape: tuple[int, ...], image_index: jax.Array | None
) -> jax.Array:
  """Draws which elements of `[B, ...]` are kept, each with 1 − `rate`."""
  key = hk.next_rng_key()
  if image_index is None:
    return jax.random.bernoulli(key, 1.0 - rate, shape)
  keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, image_index)
  draw = functools.partial(jax.random.bernoulli, p=1.0 - rate, shape=shape[1:])
  return jax.vmap(draw)(keys)
