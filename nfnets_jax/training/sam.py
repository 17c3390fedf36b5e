"""Sharpness-aware minimisation (SAM), for the paper's largest nets.

The descent gradient is taken at θ + ρ·g/‖g‖, one ascent step of length ρ from
the parameters. In the paper, each device computes g from the first 20 % of its
own batch, so the ascent costs a fifth of a gradient and no communication.

`optax.contrib.sam` does not fit: it alternates ascent and descent over whole,
synchronised batches.

Reference:
  Foret et al. 2021, https://arxiv.org/abs/2010.01412; Brock et al. 2021,
  appendix A.3.
"""

import chex
import jax
import jax.numpy as jnp
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


def ascent_images(
  batch_size: int, fraction: float, micro_batches: int
) -> tuple[int, int]:
  """Returns the numbers of images and micro-batches of the ascent step.

  At least one image; several micro-batches are as large as in the descent.

  Args:
    batch_size: per-device batch size, a multiple of `micro_batches`.
    fraction: requested fraction of it, in (0, 1], else a ValueError is raised.
    micro_batches: number of micro-batches of the descent.

  Example:
    >>> ascent_images(32, 0.2, 1)
    (6, 1)
    >>> ascent_images(4096, 0.2, 128)  # 26 micro-batches of 32
    (832, 26)
  """
  check_fraction(fraction)
  wanted = max(1, round(batch_size * fraction))
  part = max(1, batch_size // micro_batches)
  if wanted <= part:
    return wanted, 1
  parts = max(1, round(wanted / part))
  return parts * part, parts


def check_fraction(fraction: float) -> None:
  """Raises a ValueError for an invalid `sam_fraction`."""
  if not 0 < fraction <= 1:
    raise ValueError(f'sam_fraction must be in (0, 1], got {fraction:g}')
