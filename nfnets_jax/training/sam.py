"""Sharpness-aware minimisation (SAM), for the paper's largest nets.

The descent gradient is taken at θ + ρ·g/‖g‖, one ascent step of length ρ from
the parameters. g is the gradient over a fifth of the images of the descent, so
that the ascent costs a fifth of a gradient.

`optax.contrib.sam` does not fit: it alternates ascent and descent over whole
batches.

Differences:
  * By default g is averaged over the devices, and its images are chosen by
    their index in the global batch, so that the result does not depend on the
    number of devices or micro-batches. That costs a second all-reduce of the
    gradient in each step: 1.5 GB for NFNet-F5, some 20 ms of the paper's two
    seconds on TPU v3 by the speed of its links.
  * With `sam_per_device`, as in the paper, each device ascends on its own
    images without communication. The result then depends on the number of
    devices, but not on that of micro-batches.

Reference:
  Foret et al. 2021, https://arxiv.org/abs/2010.01412; Brock et al. 2021,
  appendix A.3.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax


def ascend(
  params: chex.ArrayTree, grads: chex.ArrayTree, rho: float
) -> chex.ArrayTree:
  """Takes an ascent step θ + ρ·g/‖g‖, ρ > 0; none if the gradient is zero.

  Example:
    >>> params, grads = {'w': jnp.zeros(2)}, {'w': jnp.array([3.0, 4.0])}
    >>> ascend(params, grads, 0.05)['w'].round(4).tolist()
    [0.029999999329447746, 0.03999999910593033]
  """
  norm = optax.tree.norm(grads)
  scale = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1.0), 0.0)
  return jax.tree.map(lambda p, g: p + scale * g, params, grads)


def choose(batch_size: int, fraction: float) -> np.ndarray:
  """Returns the indices of the ascent's images in a batch, evenly spaced.

  Even and odd indices alternate, as MixUp makes the even images and CutMix the
  odd ones. At least one image; `fraction` is in (0, 1].

  Example:
    >>> choose(32, 0.2).tolist()
    [0, 5, 10, 17, 20, 27]
  """
  count = max(1, round(fraction * batch_size))
  order = np.arange(count)
  return order * batch_size // count // 2 * 2 + order % 2


class Plan(NamedTuple):
  """How devices compute the ascent's gradient.

  Attributes:
    rows: int32 `[devices, n]`, rows of each device's batch.
    weights: float32 `[devices, n]`, weights of their losses; 0 for padding.
    micro_batches: number of micro-batches; divides n.
  """

  rows: np.ndarray
  weights: np.ndarray
  micro_batches: int


def plan(
  batch_size: int, devices: int, fraction: float, micro_batches: int
) -> Plan:
  """Distributes the images of `choose` over devices and micro-batches.

  The mean over devices of each device's mean weighted loss is the mean loss of
  the images chosen from the global batch. Devices that have one image fewer
  than others, or whose images do not fill their micro-batches, are padded.

  Args:
    batch_size: per-device batch size, a multiple of `micro_batches`.
    devices: number of devices.
    fraction: fraction of the global batch, in (0, 1].
    micro_batches: number of micro-batches of the descent; those of the ascent
      are at most as large.

  Example:
    >>> rows, weights, micro_batches = plan(16, 2, 0.2, 2)
    >>> rows.tolist(), micro_batches
    ([[0, 5, 10], [1, 4, 11]], 1)
  """
  chosen = choose(devices * batch_size, fraction)
  owners = chosen // batch_size
  most = int(np.max(np.bincount(owners)))
  parts = -(-most * micro_batches // batch_size)
  padded = -(-most // parts) * parts
  rows = np.zeros((devices, padded), np.int32)
  weights = np.zeros((devices, padded), np.float32)
  for device in range(devices):
    own = chosen[owners == device] % batch_size
    rows[device, : len(own)] = own
    weights[device, : len(own)] = devices * padded / len(chosen)
  return Plan(rows, weights, parts)


def ascent_batch(
  batch: dict[str, chex.Array],
  fraction: float,
  micro_batches: int,
  axis_name: str | None,
) -> tuple[dict[str, chex.Array], int]:
  """Returns a device's batch for the ascent and its number of micro-batches.

  Adds `weight` to the batch; see `plan`. `axis_name` is the mapped axis of the
  devices, and None chooses from each device's batch alone.
  """
  devices = 1
  device: chex.Numeric = 0
  if axis_name is not None:
    devices = jax.lax.axis_size(axis_name)
    device = jax.lax.axis_index(axis_name)
  rows, weights, parts = plan(
    batch['image'].shape[0], devices, fraction, micro_batches
  )
  own = jnp.asarray(rows)[device]
  chosen = jax.tree.map(lambda x: x[own], batch)
  return chosen | {'weight': jnp.asarray(weights)[device]}, parts


def check(rho: float | None, fraction: float) -> None:
  """Raises a ValueError for an invalid `sam_rho` or `sam_fraction`."""
  if rho is None:
    return
  if not 0 < rho < float('inf'):
    raise ValueError(
      f'optimizer.sam_rho must be positive, got {rho:g}; None turns SAM off'
    )
  if not 0 < fraction <= 1:
    raise ValueError(
      f'optimizer.sam_fraction must be in (0, 1], got {fraction:g}'
    )
