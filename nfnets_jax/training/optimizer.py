"""The optimiser of the paper, and the baselines that it is compared with.

The update is, in this order and as released: gradient of the whole batch → AGC
on everything but the classifier's weight matrix → L2 decay of the weights →
Nesterov momentum → −learning rate.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import config_dict

from nfnets_jax import agc

Schedule = Callable[[chex.Numeric], chex.Numeric]

# Numbers that are tuned: the compiled step takes them as inputs, so that one
# program does for all of their values.
_INPUTS = ('learning_rate_per_256', 'clipping', 'max_norm')


def step_inputs(config: config_dict.ConfigDict) -> dict[str, np.float32]:
  """Returns the numbers that a compiled training step takes as inputs.

  Args:
    config: the `optimizer` part of the config.

  Returns:
    Field to number, of the rate and the thresholds of clipping that it has.

  Example:
    >>> config = config_dict.ConfigDict({'clipping': 0.5, 'momentum': 0.9})
    >>> {field: float(value) for field, value in step_inputs(config).items()}
    {'clipping': 0.5}
  """
  return {
    field: np.float32(config[field])
    for field in _INPUTS
    if config.get(field) is not None
  }


def with_inputs(
  config: config_dict.ConfigDict, inputs: Mapping[str, chex.Numeric]
) -> config_dict.ConfigDict:
  """Returns a copy of a config with other numbers, which may be traced.

  Args:
    config: the `optimizer` part of the config, locked.
    inputs: as of `step_inputs`, or the tracers of them.

  Returns:
    The copy, for `create_schedule` and `create_optimizer`.

  Raises:
    KeyError: if the config has no such field.

  Example:
    >>> config = config_dict.ConfigDict({'clipping': 0.5}).lock()
    >>> traced = jax.jit(lambda x: 2 * with_inputs(config, x).clipping)
    >>> float(traced(step_inputs(config)))
    1.0
  """
  config = config.copy_and_resolve_references()
  with config.ignore_type():
    config.update(inputs)
  return config


def create_schedule(
  config: config_dict.ConfigDict,
  batch_size: int,
  epoch_steps: float,
  total_steps: int,
) -> Schedule:
  """Builds the learning rate's schedule that a config describes.

  Args:
    config: with the fields
      `schedule`: 'cosine' or 'exponential';
      `learning_rate_per_256`: peak, for each 256 images of a batch; may be
        traced;
      `warmup_epochs`: length of the linear warm-up from 0;
      `end_learning_rate`: where the cosine ends, whatever the batch;
      `decay_rate` and `decay_epochs`: of the exponential.
    batch_size: global.
    epoch_steps: steps of an epoch, not necessarily whole.
    total_steps: of the run.

  Returns:
    A function from the step, counted from 0, to the learning rate.

  Raises:
    ValueError: for an unknown `schedule`, or a warm-up that does not fit.
  """
  peak = config.learning_rate_per_256 * batch_size / 256
  warmup = config.warmup_epochs * epoch_steps
  schedules = {
    'cosine': lambda: warmup_cosine(
      peak, warmup, total_steps, config.end_learning_rate
    ),
    'exponential': lambda: warmup_exponential(
      peak,
      warmup,
      total_steps,
      config.decay_rate,
      config.decay_epochs * epoch_steps,
    ),
  }
  _check_known('schedule', config.schedule, schedules)
  return schedules[config.schedule]()


def warmup_cosine(
  peak: chex.Numeric,
  warmup_steps: float,
  total_steps: int,
  end: float = 0.0,
) -> Schedule:
  """Linear warm-up from 0 to `peak`, then half a cosine down to `end`.

  As `optax.warmup_cosine_decay_schedule`, with `end` as a rate of its own and a
  `peak` that may be traced. The number of warm-up steps may be fractional: five
  epochs of ImageNet are 1563.9 batches of 4096.

  Args:
    peak: learning rate at the end of the warm-up.
    warmup_steps: its length in steps, at least 0.
    total_steps: length of both, in steps, more than `warmup_steps`.
    end: learning rate at the end.

  Returns:
    A function from the step, counted from 0, to the learning rate, float32.

  Raises:
    ValueError: if the warm-up is not shorter than the whole.

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
  """Linear warm-up from 0 to `peak`, then `peak` times powers of `decay_rate`.

  The power is the number of whole `decay_steps` since the first step, so that
  some of the decay falls into the warm-up, as in the published recipe.

  Args:
    peak: learning rate at the end of the warm-up.
    warmup_steps: its length in steps, at least 0.
    total_steps: length of the run, in steps, more than `warmup_steps`.
    decay_rate: factor of each decay, in (0, 1].
    decay_steps: steps between decays, above 0.

  Returns:
    A function from the step, counted from 0, to the learning rate, float32.

  Raises:
    ValueError: if the warm-up is not shorter than the run, or the decay makes
      no sense.

  Example:
    >>> schedule = warmup_exponential(1.0, 0, 100, 0.5, decay_steps=10)
    >>> [float(schedule(step)) for step in (0, 9, 10, 20)]
    [1.0, 1.0, 0.5, 0.25]

  Reference:
    Tan and Le 2019, https://arxiv.org/abs/1905.11946, section 5.2.
  """
  _check_warmup(warmup_steps, total_steps)
  if not 0 < decay_rate <= 1 or decay_steps <= 0:
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


def decay_mask(params: chex.ArrayTree) -> chex.ArrayTree:
  """Marks the parameters that weight decay acts on: those named `w`.

  That is every weight, also of the classifier and of squeeze-excite; gains,
  biases and SkipInit scalars do not decay.

  Args:
    params: a Haiku parameter tree.

  Returns:
    The same structure with True or False at each leaf.
  """
  return _mark(params, lambda module, name: name == 'w')


def global_norm(grads: chex.ArrayTree) -> jax.Array:
  """Returns the L2 norm of a whole gradient, as `optax.tree.norm`.

  It is that of the norms of the units, which AGC takes anyway: compiled
  together, the gradient is read once for both.

  Args:
    grads: of the parameters, of at most four dimensions each.

  Returns:
    A float32 scalar.

  Example:
    >>> float(global_norm({'w': jnp.array([[3.0, 0.0], [0.0, 4.0]])}))
    5.0
  """
  units = [agc.unitwise_norm(x) for x in jax.tree.leaves(grads)]
  return jnp.sqrt(sum(jnp.sum(jnp.square(norm)) for norm in units))


def clipping_metrics(opt_state: optax.OptState) -> dict[str, jax.Array]:
  """Reads the fractions of units that AGC clipped in the last update.

  Args:
    opt_state: of `create_optimizer`.

  Returns:
    `clipped`, of all units that AGC applies to, and of parts of the net:
    `clipped_stem`, `clipped_stage_1` and so on, and `clipped_head` for what
    follows. Float32 scalars in [0, 1]. Empty without AGC.
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


def _part(module: str, depth: Sequence[int]) -> str:
  """Returns the part of the net that a module belongs to."""
  if 'stem' in module or 'initial_conv' in module:
    return 'stem'
  match = re.search(r'block(?:_v2)?(?:_(\d+))?(?:/|$)', module)
  if match is None:
    return 'head'
  block = int(match[1] or 0)
  stage = next(i for i in range(len(depth)) if block < sum(depth[: i + 1]))
  return f'stage_{stage + 1}'


def _mark(
  params: chex.ArrayTree, rule: Callable[[str, str], Any]
) -> chex.ArrayTree:
  def at(path: tuple, _) -> Any:
    module, name = (key.key for key in path)
    return rule(module, name)

  return jax.tree_util.tree_map_with_path(at, params)


def create_optimizer(
  config: config_dict.ConfigDict, schedule: Schedule, depth: Sequence[int]
) -> optax.GradientTransformation:
  """Builds the optimiser that a config describes.

  Args:
    config: with the fields
      `name`: 'sgd' (Nesterov momentum), 'rmsprop' (as of EfficientNet),
        'lars', 'adam' or 'adamw';
      `clip`: 'agc', 'global_norm' or None;
      `clipping` and `clip_eps`: λ and ε of AGC; a traced λ is not checked;
      `unclipped`: a regular expression, searched for in 'module/parameter', of
        the parameters that AGC excludes: in the paper the classifier's weights,
        of the net's own module `linear`; None excludes nothing;
      `max_norm`: the largest norm that 'global_norm' lets pass; may be traced;
      `learning_rate_groups`: as for `parse_groups`, or None;
      `skip_nonfinite`: how many consecutive steps may have a gradient that is
        not finite; they are skipped, through `optax.apply_if_finite`, and count
        for the schedule;
      `momentum`: of 'sgd', 'rmsprop' and 'lars', in [0, 1);
      `weight_decay`: added to the gradient of the weights (L2), at least 0; for
        'adamw' decoupled from it.
    schedule: step → learning rate.
    depth: blocks per stage, for `clipping_metrics`.

  Returns:
    A transformation of the gradient of the whole batch into the update. Its
    `init` raises a ValueError if `unclipped` matches no parameter.

  Raises:
    ValueError: for an unknown `name` or `clip`, listing the known ones, or an
      `unclipped` that is no regular expression.
  """
  clips = {
    None: optax.identity,
    'agc': lambda: _adaptive_grad_clip(config, depth),
    'global_norm': lambda: optax.clip_by_global_norm(config.max_norm),
  }
  decay, momentum = config.weight_decay, config.momentum
  l2 = optax.add_decayed_weights(decay, decay_mask)
  optimizers = {
    'sgd': lambda: optax.chain(
      l2, optax.sgd(schedule, momentum, nesterov=True)
    ),
    # The averages of squares start at 1 and have ε inside the root, as in
    # tensorflow, which the published recipe is for.
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
    # The trust ratio holds for what decays, as is usual: scaled by their own
    # tiny norm, gains and biases would stop.
    'lars': lambda: optax.lars(
      schedule,
      weight_decay=decay,
      weight_decay_mask=decay_mask,
      trust_ratio_mask=decay_mask,
      momentum=momentum,
      nesterov=True,
    ),
    'adam': lambda: optax.chain(l2, optax.adam(schedule)),
    'adamw': lambda: optax.adamw(schedule, weight_decay=decay, mask=decay_mask),
  }
  _check_known('clip', config.clip, clips)
  _check_pattern(config.unclipped)
  _check_known('name', config.name, optimizers)
  optimizer = optimizers[config.name]()
  if config.learning_rate_groups is not None:
    optimizer = optax.chain(
      optimizer, scale_groups(parse_groups(config.learning_rate_groups))
    )
  if config.skip_nonfinite:
    optimizer = _skip_nonfinite(optimizer, config.skip_nonfinite)
  # AGC precedes the check, so that it has statistics of skipped steps too. What
  # is not finite is not finite after clipping.
  return optax.chain(clips[config.clip](), optimizer)


def _adaptive_grad_clip(
  config: config_dict.ConfigDict, depth: Sequence[int]
) -> optax.GradientTransformation:
  """AGC as configured, with statistics by part of the net."""
  pattern = None if config.unclipped is None else re.compile(config.unclipped)
  clip = agc.adaptive_grad_clip(
    config.clipping,
    config.clip_eps,
    exclude=pattern and (lambda path, _: bool(pattern.search(path))),
    group=lambda path, _: _part(path.rpartition('/')[0], depth),
    statistics=True,
  )

  def init(params: chex.ArrayTree) -> Any:
    if pattern is not None:
      _check_found('unclipped', pattern, params)
    return clip.init(params)

  return optax.GradientTransformation(init, clip.update)


def _skip_nonfinite(
  optimizer: optax.GradientTransformation, max_consecutive: int
) -> optax.GradientTransformation:
  """As `optax.apply_if_finite`, but schedules count the skipped steps too."""
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


def parse_groups(text: str) -> list[tuple[re.Pattern[str], float]]:
  """Reads factors of the learning rate of some parameters.

  Args:
    text: 'PATTERN=FACTOR,...', regular expressions without commas, and factors
      that are at least 0.

  Returns:
    Patterns and factors.

  Raises:
    ValueError: if it is written otherwise.

  Example:
    >>> parse_groups('/linear/=1,.=0')
    [(re.compile('/linear/'), 1.0), (re.compile('.'), 0.0)]
  """
  groups = []
  for part in text.split(','):
    pattern, equals, factor = part.rpartition('=')
    try:
      groups.append((re.compile(pattern), float(factor)))
      right = bool(equals and pattern) and 0 <= groups[-1][1] < math.inf
    except (re.error, ValueError):
      right = False
    if not right:
      raise ValueError(
        f'optimizer.learning_rate_groups has the part {part!r}; write '
        'PATTERN=FACTOR, a regular expression and a number of at least 0'
      )
  return groups


def scale_groups(
  groups: Sequence[tuple[re.Pattern[str], float]],
) -> optax.GradientTransformation:
  """Multiplies the updates of some parameters; 0 freezes them.

  Args:
    groups: as of `parse_groups`; the first pattern that is found in
      'module/parameter' counts.

  Returns:
    A transformation of a Haiku tree of updates, to be the last. It raises a
    ValueError if a pattern is found nowhere.
  """

  def factor(module: str, name: str) -> float:
    path = f'{module}/{name}'
    return next((f for p, f in groups if p.search(path)), 1.0)

  def update(updates: chex.ArrayTree, params: Any = None) -> chex.ArrayTree:
    del params
    for pattern, _ in groups:
      _check_found('learning_rate_groups', pattern, updates)
    # What is frozen stays so where an update is infinite or no number.
    return jax.tree.map(
      lambda x, scale: x * scale if scale else jnp.zeros_like(x),
      updates,
      _mark(updates, factor),
    )

  return optax.stateless(update)


def _check_pattern(text: str | None) -> None:
  try:
    re.compile(text or '')
  except re.error as error:
    raise ValueError(
      f'optimizer.unclipped {text!r} is no regular expression: {error}'
    ) from error


def _check_found(
  field: str, pattern: re.Pattern[str], params: chex.ArrayTree
) -> None:
  paths = [f'{m}/{name}' for m, leaves in params.items() for name in leaves]
  if not any(pattern.search(path) for path in paths):
    raise ValueError(
      f'optimizer.{field}: {pattern.pattern!r} is found in no parameter; some '
      f'are {", ".join(sorted(paths)[:3])}'
    )


def _check_known(field: str, value: str | None, known: Iterable) -> None:
  if value not in known:
    names = [str(name) for name in known]
    similar = difflib.get_close_matches(str(value), names, n=1)
    hint = f' (did you mean {similar[0]}?)' if similar else ''
    raise ValueError(
      f'optimizer.{field} is {value!r}; choose one of {", ".join(names)}{hint}'
    )
