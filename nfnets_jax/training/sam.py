"""Sharpness-aware minimisation, as the paper has it for its largest nets.

The gradient that descends is taken at a neighbour of the parameters, one step
of length ρ up the loss: θ + ρ·g/‖g‖. The paper takes g from a leading fifth of
each device's share of the batch, and each device for itself, so that the step
up costs a fifth of a gradient and no communication.

`optax.contrib.sam` takes turns with the optimiser instead, over whole batches
and synchronised, and so is of no use here.

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
  """Takes one step up the loss: θ + ρ·g/‖g‖.

  Args:
    params: θ, a tree of arrays.
    grads: g, the same structure.
    rho: ρ, length of the step, above 0.

  Returns:
    Like `params`. Where the gradient is zero, `params`.

  Example:
    >>> params, grads = {'w': jnp.zeros(2)}, {'w': jnp.array([3.0, 4.0])}
    >>> ascend(params, grads, 0.05)['w'].round(4).tolist()
    [0.029999999329447746, 0.03999999910593033]
  """
  norm = optax.tree.norm(grads)
  scale = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1.0), 0.0)
  return jax.tree.map(lambda p, g: p + scale * g, params, grads)


def ascent_images(
  share: int, fraction: float, micro_batches: int
) -> tuple[int, int]:
  """Returns how many images of a device's share the step up is taken with.

  Args:
    share: images of the device, a multiple of `micro_batches`.
    fraction: of them that is wanted, in (0, 1].
    micro_batches: parts that the share is computed in.

  Returns:
    Images, at least one, and the parts that they are computed in:
    parts as large as those of the descent, if they need more than one.

  Raises:
    ValueError: for an impossible fraction.

  Example:
    >>> ascent_images(32, 0.2, 1)
    (6, 1)
    >>> ascent_images(4096, 0.2, 128)  # 26 parts of 32
    (832, 26)
  """
  check_fraction(fraction)
  wanted = max(1, round(share * fraction))
  part = share // micro_batches
  if wanted <= part:
    return wanted, 1
  parts = max(1, round(wanted / part))
  return parts * part, parts


def check_fraction(fraction: float) -> None:
  """Raises a ValueError for an impossible `sam_fraction`."""
  if not 0 < fraction <= 1:
    raise ValueError(
      f'sam_fraction {fraction:g} is no part of a batch; use one in (0, 1]'
    )
