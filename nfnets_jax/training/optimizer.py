"""The paper's optimizer and its baselines.

The update as released: gradient of the whole batch → AGC on all parameters but
the classifier's weights → L2 decay → Nesterov momentum → −learning rate.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from nfnets_jax import agc
from nfnets_jax.training import groups
from nfnets_jax.training.schedules import Schedule, check_known


def create_optimizer(
  name: str,
  schedule: Schedule,
  *,
  momentum: float,
  weight_decay: float,
  decayed: str,
  clip: str | None,
  clipping: chex.Numeric,
  clip_eps: float,
  unclipped: str | None,
  max_norm: chex.Numeric,
  learning_rate_groups: str | None,
  skip_nonfinite: int,
  depth: Sequence[int],
) -> optax.GradientTransformation:
  """Builds an optimizer.

  Args:
    name: 'sgd' (Nesterov momentum), 'rmsprop' (as in EfficientNet), 'lars',
      'adam' or 'adamw'.
    schedule: step → learning rate.
    momentum: for 'sgd', 'rmsprop' and 'lars', in [0, 1).
    weight_decay: L2 coefficient, at least 0; decoupled for 'adamw'.
    decayed: regular expression of the parameters that decay; see `decay_mask`.
    clip: 'agc', 'global_norm' or None.
    clipping: λ of AGC; may be traced, then unchecked.
    clip_eps: ε of AGC.
    unclipped: regular expression searched in 'module/parameter' for what AGC
      excludes, in the paper the classifier's weights; None excludes nothing.
    max_norm: threshold of 'global_norm'; may be traced.
    learning_rate_groups: as in `groups.parse`, or None.
    skip_nonfinite: maximum consecutive non-finite gradients, skipped through
      `optax.apply_if_finite`; skipped steps advance the schedule.
    depth: blocks per stage, for `clipping_metrics`.

  Returns:
    A transformation of the gradient of the whole batch into the update. Its
    `init` raises a ValueError if `unclipped` or `decayed` matches no parameter.

  Raises:
    ValueError: for an unknown `name` or `clip`, or an invalid `unclipped` or
      `decayed`.
  """
  clips = {
    None: optax.identity,
    'agc': lambda: _adaptive_grad_clip(clipping, clip_eps, unclipped, depth),
    'global_norm': lambda: optax.clip_by_global_norm(max_norm),
  }
  check_known('clip', clip, clips)
  _check_pattern('unclipped', unclipped or '')
  _check_pattern('decayed', decayed)
  optimizer = _base_optimizer(name, schedule, momentum, weight_decay, decayed)
  if learning_rate_groups is not None:
    optimizer = optax.chain(
      optimizer, groups.scale(groups.parse(learning_rate_groups))
    )
  if skip_nonfinite:
    optimizer = _skip_nonfinite(optimizer, skip_nonfinite)
  # AGC precedes the check, for statistics of skipped steps too; NaN stays NaN.
  return optax.chain(clips[clip](), optimizer)


def _base_optimizer(
  name: str,
  schedule: Schedule,
  momentum: float,
  weight_decay: float,
  decayed: str,
) -> optax.GradientTransformation:
  """Returns an optimizer with its weight decay, without clipping."""
  mask = functools.partial(decay_mask, decayed=decayed)
  l2 = optax.add_decayed_weights(weight_decay, mask)
  optimizers = {
    'sgd': lambda: optax.chain(
      l2, optax.sgd(schedule, momentum, nesterov=True)
    ),
    # Averages start at 1, with ε inside the root, as in TensorFlow's RMSProp,
    # which the published recipe uses.
    'rmsprop': lambda: optax.chain(
      l2,
      optax.rmsprop(
        schedule,
        decay=0.9,
        eps=1e-3,
        initial_scale=1.0,
        eps_in_sqrt=True,
        momentum=momentum,
      ),
    ),
    # As usual, only decayed parameters have a trust ratio: scaled by their own
    # small norm, gains and biases would not train.
    'lars': lambda: optax.lars(
      schedule,
      weight_decay=weight_decay,
      weight_decay_mask=mask,
      trust_ratio_mask=mask,
      momentum=momentum,
      nesterov=True,
    ),
    'adam': lambda: optax.chain(l2, optax.adam(schedule)),
    'adamw': lambda: optax.adamw(
      schedule, weight_decay=weight_decay, mask=mask
    ),
  }
  check_known('name', name, optimizers)
  return optimizers[name]()


def _adaptive_grad_clip(
  clipping: chex.Numeric,
  eps: float,
  unclipped: str | None,
  depth: Sequence[int],
) -> optax.GradientTransformation:
  """AGC with statistics per part of the net."""
  pattern = None if unclipped is None else re.compile(unclipped)
  clip = agc.adaptive_grad_clip(
    clipping,
    eps,
    exclude=pattern and (lambda path, _: bool(pattern.search(path))),
    group=lambda path, _: _part(path.rpartition('/')[0], depth),
    statistics=True,
  )

  def init(params: chex.ArrayTree) -> Any:
    if pattern is not None:
      groups.check_matches('unclipped', pattern, params)
    return clip.init(params)

  return optax.GradientTransformation(init, clip.update)


def decay_mask(params: chex.ArrayTree, decayed: str) -> chex.ArrayTree:
  """Marks the parameters of a Haiku tree to decay.

  `decayed` is searched in 'module/parameter'; a ValueError is raised if it
  matches none. '/w$' is all weights, including classifier and squeeze-excite,
  without gains, biases and SkipInit scalars.
  """
  pattern = re.compile(decayed)
  groups.check_matches('decayed', pattern, params)
  return {
    module: {name: bool(pattern.search(f'{module}/{name}')) for name in leaves}
    for module, leaves in params.items()
  }


def global_norm(grads: chex.ArrayTree) -> jax.Array:
  """Returns the L2 norm of a gradient, float32, as `optax.tree.norm`.

  Each array is summed over all but its last axis, as by AGC, so that XLA reads
  it once for both; a kernel for each remaining sum would take longer than its
  work.

  Example:
    >>> float(global_norm({'w': jnp.array([[3.0, 0.0], [0.0, 4.0]])}))
    5.0
  """
  sums = [
    jnp.sum(x**2, range(x.ndim - 1)).ravel() for x in jax.tree.leaves(grads)
  ]
  return jnp.sqrt(jnp.sum(jnp.concatenate(sums)))


def clipping_metrics(opt_state: optax.OptState) -> dict[str, jax.Array]:
  """Returns the fractions of units that AGC clipped in the last update.

  Float32 scalars: `clipped`, over all units subject to AGC, `clipped_stem`,
  `clipped_stage_1` etc., and `clipped_head` for the rest. Empty without AGC.
  """
  parts = optax.tree.get(opt_state, 'statistics', {})
  if not parts:
    return {}
  clipped = sum(part.clipped * part.units for part in parts.values())
  units = sum(part.units for part in parts.values())
  return {
    'clipped': clipped / units,
    **{f'clipped_{name}': part.clipped for name, part in parts.items()},
  }


def update_metrics(opt_state: optax.OptState) -> dict[str, jax.Array]:
  """Returns `clipping_metrics`, and those of skipped steps if they are skipped.

  These are `nonfinite`, whether the last gradient was not finite, and
  `nonfinite_in_a_row`.
  """
  metrics = clipping_metrics(opt_state)
  finite = optax.tree.get(opt_state, 'last_finite')
  if finite is not None:
    metrics['nonfinite'] = jnp.logical_not(finite).astype(jnp.float32)
    in_a_row = optax.tree.get(opt_state, 'notfinite_count')
    metrics['nonfinite_in_a_row'] = in_a_row
  return metrics


def _part(module: str, depth: Sequence[int]) -> str:
  if 'stem' in module or 'initial_conv' in module:
    return 'stem'
  match = re.search(r'block(?:_v2)?(?:_(\d+))?(?:/|$)', module)
  if match is None:
    return 'head'
  block = int(match[1] or 0)
  stage = next(i for i in range(len(depth)) if block < sum(depth[: i + 1]))
  return f'stage_{stage + 1}'


def _skip_nonfinite(
  optimizer: optax.GradientTransformation, max_consecutive: int
) -> optax.GradientTransformation:
  """Like `optax.apply_if_finite`, but skipped steps advance schedules."""
  inner = optax.apply_if_finite(optimizer, max_consecutive)

  def advance(old: Any, new: Any) -> Any:
    if isinstance(old, optax.ScaleByScheduleState):
      return new._replace(count=optax.safe_increment(old.count))
    return new

  def update(
    updates: Any, state: optax.ApplyIfFiniteState, params: Any = None
  ) -> tuple[Any, optax.ApplyIfFiniteState]:
    updates, new = inner.update(updates, state, params)
    inner_state = jax.tree.map(
      advance,
      state.inner_state,
      new.inner_state,
      is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState),
    )
    return updates, new._replace(inner_state=inner_state)

  return optax.GradientTransformation(inner.init, update)


def _check_pattern(field: str, text: str) -> None:
  try:
    re.compile(text)
  except re.error as error:
    raise ValueError(
      f'optimizer.{field} {text!r} is no regular expression: {error}'
    ) from error
