"""The optimiser of the paper, and the baselines that it is compared with.

The update is, in this order and as released: gradient of the whole batch → AGC
on everything but the classifier's weight matrix → L2 decay of the weights →
Nesterov momentum → −learning rate.
"""

import re
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import optax
from ml_collections import config_dict

from nfnets_jax import agc

Schedule = Callable[[chex.Numeric], chex.Numeric]


def warmup_cosine(
  peak: float, warmup_steps: float, total_steps: int
) -> Schedule:
  """Linear warm-up from 0 to `peak`, then half a cosine down to 0.

  Unlike `optax.warmup_cosine_decay_schedule` this takes a fractional number of
  warm-up steps: five epochs of ImageNet are 1563.9 batches of 4096.

  Args:
    peak: learning rate at the end of the warm-up.
    warmup_steps: its length in steps, at least 0.
    total_steps: length of both, in steps, more than `warmup_steps`.

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
  if not 0 <= warmup_steps < total_steps:
    raise ValueError(
      f'a warm-up of {warmup_steps:g} steps does not fit into a run of '
      f'{total_steps}; train longer or lower optimizer.warmup_epochs'
    )

  def schedule(step: chex.Numeric) -> jax.Array:
    t = jnp.asarray(step, jnp.float32)
    progress = jnp.clip((t - warmup_steps) / (total_steps - warmup_steps), 0, 1)
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    warmup = t / max(warmup_steps, 1.0)
    return peak * jnp.where(t < warmup_steps, warmup, cosine)

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


def clip_mask(params: chex.ArrayTree) -> chex.ArrayTree:
  """Marks the parameters that AGC acts on: all but the classifier's weights.

  The classifier is the module `linear` of the net itself, not that of a
  squeeze-excite gate; its bias is clipped.

  Args:
    params: a Haiku parameter tree.

  Returns:
    The same structure with True or False at each leaf.

  Raises:
    ValueError: if there is no classifier.

  Example:
    >>> marks = clip_mask({'NFNet/~/linear': {'w': 0, 'b': 0}})
    >>> marks['NFNet/~/linear']['w'], marks['NFNet/~/linear']['b']
    (False, True)

  Reference:
    Brock et al. 2021, section 4.1.
  """
  mask = _mark(params, _is_clipped)
  if all(jax.tree.leaves(mask)):
    raise ValueError(
      'AGC found no classifier to leave out: there is no module NET/~/linear '
      f'among {", ".join(sorted(params))}'
    )
  return mask


def _is_clipped(module: str, name: str) -> bool:
  return name != 'w' or module.split('/')[1:] != ['~', 'linear']


def clipped_shares(
  grads: chex.ArrayTree,
  params: chex.ArrayTree,
  config: config_dict.ConfigDict,
  depth: Sequence[int],
) -> dict[str, jax.Array]:
  """Measures how many units AGC clips.

  Args:
    grads: of the whole batch, before clipping.
    params: a Haiku parameter tree.
    config: as for `create_optimizer`.
    depth: blocks of each stage.

  Returns:
    `clipped`, the share of all units that AGC acts on, and the shares of parts
    of the net: `clipped_stem`, `clipped_stage_1` and so on, and `clipped_head`
    for what follows. Float32 scalars in [0, 1]. Nothing if `config.clip` is not
    'agc'.
  """
  if config.clip != 'agc':
    return {}
  counts: dict[str, list[tuple[jax.Array, int]]] = {}

  def count(path: tuple, marked: bool, grad: jax.Array, param: jax.Array):
    if marked:
      norm = agc.unitwise_norm(param)
      limit = config.clipping * jnp.maximum(norm, config.clip_eps)
      clipped = jnp.sum(agc.unitwise_norm(grad) > limit, dtype=jnp.float32)
      part = _part(path[0].key, depth)
      counts.setdefault(part, []).append((clipped, norm.size))

  marks = _mark(params, _is_clipped)
  jax.tree_util.tree_map_with_path(count, marks, grads, params)
  counts['all'] = [unit for units in counts.values() for unit in units]
  return {
    'clipped' if part == 'all' else f'clipped_{part}': (
      jnp.sum(jnp.stack([clipped for clipped, _ in units]))
      / sum(size for _, size in units)
    )
    for part, units in counts.items()
  }


def _part(module: str, depth: Sequence[int]) -> str:
  """Returns which part of the net a module belongs to."""
  if 'stem' in module or 'initial_conv' in module:
    return 'stem'
  match = re.search(r'block(?:_v2)?(?:_(\d+))?(?:/|$)', module)
  if match is None:
    return 'head'
  block = int(match[1] or 0)
  stage = next(i for i in range(len(depth)) if block < sum(depth[: i + 1]))
  return f'stage_{stage + 1}'


def _mark(
  params: chex.ArrayTree, rule: Callable[[str, str], bool]
) -> chex.ArrayTree:
  def at(path: tuple, _) -> bool:
    module, name = (key.key for key in path)
    return rule(module, name)

  return jax.tree_util.tree_map_with_path(at, params)


def create_optimizer(
  config: config_dict.ConfigDict, schedule: Schedule
) -> optax.GradientTransformation:
  """Builds the optimiser that a config describes.

  Args:
    config: with the fields
      `name`: 'sgd' (Nesterov momentum), 'lars', 'adam' or 'adamw';
      `clip`: 'agc', 'global_norm' or None;
      `clipping` and `clip_eps`: λ and ε of AGC;
      `max_norm`: the largest norm that 'global_norm' lets pass;
      `skip_nonfinite`: how many steps in a row may have a gradient that is not
        finite; they are left out, through `optax.apply_if_finite`;
      `momentum`: of 'sgd' and 'lars', in [0, 1);
      `weight_decay`: added to the gradient of the weights (L2), at least 0; for
        'adamw' decoupled from it.
    schedule: step → learning rate.

  Returns:
    A transformation of the gradient of the whole batch into the update.

  Raises:
    ValueError: for an unknown `name` or `clip`, listing the known ones.
  """
  clips = {
    None: optax.identity,
    'agc': lambda: optax.masked(
      agc.adaptive_grad_clip(config.clipping, config.clip_eps), clip_mask
    ),
    'global_norm': lambda: optax.clip_by_global_norm(config.max_norm),
  }
  decay, momentum = config.weight_decay, config.momentum
  l2 = optax.add_decayed_weights(decay, decay_mask)
  optimizers = {
    'sgd': lambda: optax.chain(
      l2, optax.sgd(schedule, momentum, nesterov=True)
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
  for field, known in (('clip', clips), ('name', optimizers)):
    if config[field] not in known:
      raise ValueError(
        f'optimizer.{field} is {config[field]!r}; choose one of '
        f'{", ".join(map(str, known))}'
      )
  optimizer = optax.chain(clips[config.clip](), optimizers[config.name]())
  if config.skip_nonfinite:
    return optax.apply_if_finite(optimizer, config.skip_nonfinite)
  return optimizer
