"""Learning rate schedules with linear warm-up."""

import difflib
import math
from collections.abc import Callable, Iterable

import chex
import jax
import jax.numpy as jnp

Schedule = Callable[[chex.Numeric], chex.Numeric]


def create_schedule(
  name: str,
  peak: chex.Numeric,
  warmup_steps: float,
  total_steps: int,
  *,
  end: float,
  decay_rate: float,
  decay_steps: float,
) -> Schedule:
  """Returns `warmup_cosine` (name 'cosine') or `warmup_exponential`.

  The arguments are those of the two. Raises a ValueError for unknown names.
  """
  check_known('schedule', name, ('cosine', 'exponential'))
  if name == 'cosine':
    return warmup_cosine(peak, warmup_steps, total_steps, end)
  return warmup_exponential(
    peak, warmup_steps, total_steps, decay_rate, decay_steps
  )


def warmup_cosine(
  peak: chex.Numeric,
  warmup_steps: float,
  total_steps: int,
  end: float = 0.0,
) -> Schedule:
  """Linear warm-up from 0 to `peak`, then cosine decay to `end`.

  Like `optax.warmup_cosine_decay_schedule`, but `peak` may be traced and
  `warmup_steps` fractional: five epochs of ImageNet are 1563.9 batches of 4096.

  Args:
    peak: learning rate at the end of the warm-up.
    warmup_steps: length of the warm-up in steps, at least 0.
    total_steps: total length in steps, greater than `warmup_steps`.
    end: final learning rate.

  Returns:
    A function from the step, counted from 0, to the learning rate, float32.

  Raises:
    ValueError: if the warm-up is not shorter than the run.

  Example:
    >>> schedule = warmup_cosine(1.6, warmup_steps=2.5, total_steps=10)
    >>> [round(float(schedule(step)), 2) for step in (0, 1, 10)]
    [0.0, 0.64, 0.0]

  Reference:
    Brock et al. 2021, appendix A.
  """
  _check_warmup(warmup_steps, total_steps)

  def decayed(t: jax.Array) -> jax.Array:
    progress = jnp.clip((t - warmup_steps) / (total_steps - warmup_steps), 0, 1)
    return end + (peak - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

  return _after_warmup(decayed, peak, warmup_steps)


def warmup_exponential(
  peak: chex.Numeric,
  warmup_steps: float,
  total_steps: int,
  decay_rate: float,
  decay_steps: float,
) -> Schedule:
  """Linear warm-up from 0 to `peak`, then staircase exponential decay.

  The rate is `peak * decay_rate ** (step // decay_steps)`, with `decay_rate` in
  (0, 1] and `decay_steps` > 0. As in the published recipe, steps count from the
  start of the warm-up. Otherwise like `warmup_cosine`.

  Raises:
    ValueError: if the warm-up or the decay is invalid.

  Example:
    >>> schedule = warmup_exponential(1.0, 0, 100, 0.5, decay_steps=10)
    >>> [float(schedule(step)) for step in (0, 9, 10, 20)]
    [1.0, 1.0, 0.5, 0.25]

  Reference:
    Tan and Le 2019, https://arxiv.org/abs/1905.11946, section 5.2.
  """
  _check_warmup(warmup_steps, total_steps)
  if not (0 < decay_rate <= 1 and decay_steps > 0):
    raise ValueError(
      f'a learning rate cannot decay by {decay_rate:g} every {decay_steps:g} '
      'steps; use optimizer.decay_rate in (0, 1] and optimizer.decay_epochs '
      'above 0'
    )

  def decayed(t: jax.Array) -> jax.Array:
    return peak * decay_rate ** jnp.floor(t / decay_steps)

  return _after_warmup(decayed, peak, warmup_steps)


def _check_warmup(warmup_steps: float, total_steps: int) -> None:
  if not 0 <= warmup_steps < total_steps:
    raise ValueError(
      f'a warm-up of {warmup_steps:g} steps does not fit into a run of '
      f'{total_steps}; train longer or lower optimizer.warmup_epochs'
    )


def _after_warmup(
  decayed: Callable[[jax.Array], jax.Array],
  peak: chex.Numeric,
  warmup_steps: float,
) -> Schedule:
  def schedule(step: chex.Numeric) -> jax.Array:
    t = jnp.asarray(step, jnp.float32)
    warmup = peak * t / max(warmup_steps, 1.0)
    return jnp.where(t < warmup_steps, warmup, decayed(t))

  return schedule


def count_steps(epochs: float, epoch_steps: float) -> int:
  """Returns the whole steps of a run, rounded down as in the released code.

  Example:
    >>> count_steps(360.0, 1_281_167 / 4096)
    112602
    >>> count_steps(15_000 / (50_000 / 2048), 50_000 / 2048)
    15000
  """
  # Epochs computed from steps carry a rounding error.
  return math.floor(epochs * epoch_steps + 1e-6)


def check_known(field: str, value: str | None, known: Iterable) -> None:
  """Raises a ValueError if an optimizer field has an unknown value."""
  if value not in known:
    names = [str(name) for name in known]
    similar = difflib.get_close_matches(str(value), names, n=1)
    hint = f' (did you mean {similar[0]}?)' if similar else ''
    raise ValueError(
      f'optimizer.{field} is {value!r}; choose one of {", ".join(names)}{hint}'
    )
