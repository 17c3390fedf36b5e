"""One step of training and one of evaluation, as pure functions.

They run on one device's share of a batch and know of the others only the name
of the axis to average over. Images come finished from the host, and are only
normalised here. What dropout and stochastic depth drop of an image is drawn
from a key of its own, made of the run's key, the step and the image's place in
the global batch: a run does not depend on the number of devices, nor on the
number of micro-batches.

Batch normalisation is an exception: it normalises by the images that are
computed at once, those of a micro-batch of one device, or of all devices if the
net is told so. Its moving statistics, the net's state, go from micro-batch to
micro-batch, each of which moves them once; at the end of the step they are
averaged over the devices.

Sharpness-aware minimisation is another: each device takes the step up with a
fraction of its own images, so the result depends on the number of devices.

Differences:
  * The released code casts parameters to bfloat16 before the pass; here the
    layers cast them after they have standardised them in float32.
  * There each device keeps a state of its own, and a checkpoint holds that of
    the first; here all devices hold the mean, so that one device may go on
    where eight have stopped.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import optax
from ml_collections import config_dict

from nfnets_jax.models import layers
from nfnets_jax.training import ema, losses, sam
from nfnets_jax.training import optimizer as optimizers
from nfnets_jax.training.normalize import normalize

Batch = dict[str, chex.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
  """All that training changes, the same on every device.

  Attributes:
    step: number of updates made, int32 scalar.
    key: data of the run's random key, uint32; never changes.
    params: the network's parameters, float32.
    model_state: the network's Haiku state, empty for normaliser-free nets.
    opt_state: the optimiser's state.
    ema_params: moving average of `params`.
    ema_model_state: moving average of `model_state`, to go with `ema_params`.
  """

  step: jax.Array
  key: jax.Array
  params: hk.MutableParams
  model_state: hk.MutableState
  opt_state: optax.OptState
  ema_params: hk.MutableParams
  ema_model_state: hk.MutableState


# What a pass can compute in. A loss would have to be scaled for float16.
DTYPES = ('float32', 'bfloat16')


def create_policy(compute_dtype: str) -> jmp.Policy:
  """Returns float32 parameters and outputs with `compute_dtype` in between."""
  return jmp.get_policy(
    f'params=float32,compute={compute_dtype},output=float32'
  )


def init_state(
  net: hk.TransformedWithState,
  optimizer: optax.GradientTransformation,
  seed: int,
  image_size: int,
) -> TrainState:
  """Draws the initial state.

  Args:
    net: as of `train.create_net`.
    optimizer: of the parameters.
    seed: of the parameters, dropout and stochastic depth.
    image_size: side of the training images in pixels.

  Returns:
    The state before the first step.
  """
  # It runs once: compile it fast rather than well, which for F0 on two cores is
  # a matter of 10 seconds instead of minutes.
  options = {'xla_backend_optimization_level': 0}
  init = jax.jit(
    _create_init(net, optimizer, image_size), compiler_options=options
  )
  # The key is an input, so that one program does for all seeds.
  return init(jax.random.key(seed))


def state_shapes(
  net: hk.TransformedWithState,
  optimizer: optax.GradientTransformation,
  image_size: int,
) -> TrainState:
  """Returns the shapes and dtypes of what `init_state` draws."""
  init = _create_init(net, optimizer, image_size)
  return jax.eval_shape(init, jax.random.key(0))


def _create_init(
  net: hk.TransformedWithState,
  optimizer: optax.GradientTransformation,
  image_size: int,
) -> Callable[[jax.Array], TrainState]:
  def init(key: jax.Array) -> TrainState:
    init_key, run_key = jax.random.split(key)
    images = jnp.zeros((1, image_size, image_size, 3))
    params, model_state = net.init(init_key, images, is_training=True)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      key=jax.random.key_data(run_key),
      params=params,
      model_state=model_state,
      opt_state=optimizer.init(params),
      ema_params=jax.tree.map(jnp.copy, params),
      ema_model_state=jax.tree.map(jnp.copy, model_state),
    )

  return init


def batch_shapes(
  config: config_dict.ConfigDict, devices: int, several: bool = False
) -> Batch:
  """Returns the shapes and dtypes of a training batch, split over devices.

  Args:
    config: of the run.
    devices: of all processes; its first axis.
    several: whether there are several processes, which vote in the batch.

  Returns:
    Of each array of the batch, `[devices, images of a device, ...]`.
  """
  share = config.batch_size // devices
  shapes = {
    **_image_shapes(devices, share, config.data.image_size),
    'mix_label': jax.ShapeDtypeStruct((devices, share), jnp.int32),
    'ratio': jax.ShapeDtypeStruct((devices, share), jnp.float32),
  }
  if config.data.skip_corrupt:
    shapes['skipped'] = jax.ShapeDtypeStruct((devices, share), jnp.int32)
  if several:
    shapes['stop'] = jax.ShapeDtypeStruct((devices, 1), jnp.int32)
  return shapes


def eval_batch_shapes(config: config_dict.ConfigDict, devices: int) -> Batch:
  """Returns those of a batch of the evaluation; see `batch_shapes`."""
  share = config.eval_batch_size // devices
  return {
    **_image_shapes(devices, share, config.data.eval_image_size),
    'mask': jax.ShapeDtypeStruct((devices, share), jnp.float32),
  }


def _image_shapes(devices: int, share: int, size: int) -> Batch:
  image = (devices, share, size, size, 3)
  return {
    'image': jax.ShapeDtypeStruct(image, jnp.uint8),
    'label': jax.ShapeDtypeStruct((devices, share), jnp.int32),
  }


def label_distributions(batch: Batch, num_classes: int) -> jax.Array:
  """Returns the probabilities of the classes of mixed images.

  Args:
    batch: `label` and `mix_label` int32 `[B]`, and `ratio` float32 `[B]`, the
      weight of `label`; that of `mix_label` is the rest.
    num_classes: K.

  Returns:
    float32 `[B, K]`.

  Example:
    >>> batch = {'label': jnp.array([0]), 'mix_label': jnp.array([2]),
    ...          'ratio': jnp.array([0.75])}
    >>> label_distributions(batch, 3).tolist()
    [[0.75, 0.0, 0.25]]
  """
  label, mix_label = (
    jax.nn.one_hot(batch[name], num_classes, dtype=jnp.float32)
    for name in ('label', 'mix_label')
  )
  ratio = batch['ratio'][:, None]
  return ratio * label + (1 - ratio) * mix_label


def apply_gradients(
  state: TrainState,
  grads: hk.MutableParams,
  optimizer: optax.GradientTransformation,
  ema_decay: float,
) -> TrainState:
  """Makes one update from the gradient of the whole batch.

  Args:
    state: before the update.
    grads: of the parameters, float32.
    optimizer: maps the gradient to the update.
    ema_decay: upper bound of the decay of the moving average.

  Returns:
    The state after it, one step further.
  """
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  return state._replace(
    step=state.step + 1,
    params=params,
    opt_state=opt_state,
    ema_params=ema.update(state.ema_params, params, state.step, ema_decay),
  )


def create_gradient(
  net: hk.TransformedWithState,
  config: config_dict.ConfigDict,
  num_classes: int,
) -> Callable[..., tuple[hk.MutableParams, Metrics, hk.MutableState]]:
  """Builds the gradient of the mean loss of some images of a batch.

  Args:
    net: as of `train.create_net`.
    config: of the run.
    num_classes: K.

  Returns:
    `gradient(params, model_state, key, batch, first_image, standardized=False)
    → (grads, metrics, model_state)`. `key` is the step's; `batch` holds `image`
    uint8 `[B, H, W, 3]`, `label` and `mix_label` int32 `[B]` and `ratio`
    float32 `[B]`, and `first_image` is the index of its first image in the
    global batch. The gradients are float32, and the metrics are the means of
    `loss` and `top_1`.
  """
  policy = create_policy(config.compute_dtype)

  def gradient(
    params: hk.MutableParams,
    model_state: hk.MutableState,
    key: jax.Array,
    batch: Batch,
    first_image: jax.Array,
    standardized: bool = False,
  ):
    images = normalize(batch['image'])
    labels = label_distributions(batch, num_classes)
    index = first_image + jnp.arange(images.shape[0], dtype=jnp.int32)

    def loss_fn(params: hk.MutableParams):
      outputs, new_model_state = net.apply(
        params,
        model_state,
        key,
        policy.cast_to_compute(images),
        is_training=True,
        image_index=index,
        standardized=standardized,
      )
      logits = policy.cast_to_output(outputs['logits'])
      loss = losses.cross_entropy(logits, labels, config.label_smoothing)
      return jnp.mean(loss), (logits, new_model_state)

    (loss, (logits, new_model_state)), grads = jax.value_and_grad(
      loss_fn, has_aux=True
    )(params)
    hits = jnp.argmax(logits, axis=1) == jnp.argmax(labels, axis=1)
    metrics = {'loss': loss, 'top_1': jnp.mean(hits.astype(jnp.float32))}
    return grads, metrics, new_model_state

  return gradient


def create_train_step(
  net: hk.TransformedWithState,
  optimizer: optax.GradientTransformation,
  schedule: Callable[[chex.Numeric], chex.Numeric],
  config: config_dict.ConfigDict,
  num_classes: int,
  axis_name: str,
  micro_batches: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Builds the training step.

  Args:
    net: as of `train.create_net`.
    optimizer: maps the gradient of the whole batch to the update.
    schedule: step → learning rate; only to report it.
    config: of the run.
    num_classes: K.
    axis_name: of the devices that share the batch.
    micro_batches: parts that the device's share is computed in, one after the
      other. Without batch normalisation the update is that of the whole batch,
      but for the rounding of sums; the memory that activations take falls with
      the number of parts.

  Returns:
    `step(state, batch) → (state, metrics)`, to be mapped over `axis_name`.
    `batch` holds this device's `image` uint8 `[B, H, W, 3]`, `label` and
    `mix_label` int32 `[B]` and `ratio` float32 `[B]`. The metrics are float32
    scalars of the whole batch: `loss`, `top_1` (a fraction, against the
    likelier label of a mixed image), `grad_norm` before clipping,
    `learning_rate`, and the fractions of units that AGC clipped
    (`optimizer.clipping_metrics`). With `skip_nonfinite`: `nonfinite`, whether
    the step was skipped, and `nonfinite_in_a_row`. Two more if the batch has
    them, summed over it: how many examples were `skipped` before each, and
    which processes ask to `stop`.
    It raises a ValueError when it is traced with a share that cannot be split
    so.
  """
  gradient = create_gradient(net, config, num_classes)

  def train_step(state: TrainState, batch: Batch):
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    batch = dict(batch)
    stop = batch.pop('stop', None)
    skipped = batch.pop('skipped', None)
    size = batch['image'].shape[0]
    if size % micro_batches:
      raise ValueError(
        f'{size} images cannot be split into {micro_batches} micro-batches; '
        f'give a divisor of {size}'
      )
    first_image = jax.lax.axis_index(axis_name) * size
    params = state.params
    if config.optimizer.sam_rho is not None:
      count, parts = sam.ascent_images(
        size, config.optimizer.sam_fraction, micro_batches
      )
      leading = jax.tree.map(lambda x: x[:count], batch)
      # Each device goes up its own way.
      ascent, *_ = mean_gradient(
        params, state.model_state, key, leading, first_image, parts
      )
      params = sam.ascend(params, ascent, config.optimizer.sam_rho)
    grads, metrics, model_state = mean_gradient(
      params, state.model_state, key, batch, first_image, micro_batches
    )
    # One mean over the whole batch, before AGC looks at the gradient.
    grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
    model_state = _mean_state(model_state, axis_name)
    if skipped is not None:
      metrics['skipped'] = jax.lax.psum(jnp.sum(skipped), axis_name)
    metrics['grad_norm'] = optimizers.global_norm(grads)
    metrics['learning_rate'] = jnp.asarray(schedule(state.step), jnp.float32)
    old_step, old_model_state = state.step, state.model_state
    state = apply_gradients(state, grads, optimizer, config.ema_decay)
    metrics |= optimizers.clipping_metrics(state.opt_state)
    if config.optimizer.skip_nonfinite:
      # A step that is left out leaves no trace in the net's state either.
      finite = optax.tree.get(state.opt_state, 'last_finite')
      model_state = jax.tree.map(
        functools.partial(jnp.where, finite), model_state, old_model_state
      )
      metrics['nonfinite'] = jnp.logical_not(finite).astype(jnp.float32)
      metrics['nonfinite_in_a_row'] = optax.tree.get(
        state.opt_state, 'notfinite_count'
      )
    ema_model_state = ema.update(
      state.ema_model_state, model_state, old_step, config.ema_decay
    )
    if stop is not None:
      metrics['stop'] = jax.lax.psum(jnp.sum(stop), axis_name)
    state = state._replace(
      model_state=model_state, ema_model_state=ema_model_state
    )
    return state, metrics

  def mean_gradient(
    params: hk.MutableParams,
    model_state: hk.MutableState,
    key: jax.Array,
    batch: Batch,
    first_image: jax.Array,
    micro_batches: int,
  ):
    """Averages gradients and metrics over the micro-batches."""
    if micro_batches == 1:
      return gradient(params, model_state, key, batch, first_image)
    parts = jax.tree.map(
      lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch
    )
    size = parts['image'].shape[1]
    first = first_image + size * jnp.arange(micro_batches, dtype=jnp.int32)

    def add(carry, part):
      sums, model_state = carry
      grads, metrics, model_state = gradient(
        folded, model_state, key, *part, standardized=True
      )
      sums = jax.tree.map(jnp.add, sums, (grads, metrics))
      return (sums, model_state), None

    # Weights are standardised, and the gradient taken through that, once.
    folded, pull_back = jax.vjp(layers.fold, params)
    metrics = {'loss': jnp.zeros(()), 'top_1': jnp.zeros(())}
    zeros = (jax.tree.map(jnp.zeros_like, folded), metrics)
    (sums, model_state), _ = jax.lax.scan(
      add, (zeros, model_state), (parts, first)
    )
    grads, metrics = jax.tree.map(lambda x: x / micro_batches, sums)
    return *pull_back(grads), metrics, model_state

  return train_step


def _mean_state(state: hk.MutableState, axis_name: str) -> hk.MutableState:
  """Averages a net's state over devices; its counters agree on all of them."""

  def mean(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
      return jax.lax.pmean(x, axis_name)
    return jax.lax.pmax(x, axis_name)

  return jax.tree.map(mean, state)


def create_eval_step(
  net: hk.TransformedWithState,
  axis_name: str,
  micro_batches: int = 1,
  compute_dtype: str = 'float32',
) -> Callable[[TrainState, Batch], dict[str, Metrics]]:
  """Builds the evaluation step.

  Args:
    net: as of `train.create_net`.
    axis_name: of the devices that share the batch.
    micro_batches: parts that the device's share is computed in, one after the
      other; it must divide the share.
    compute_dtype: of the pass, whatever that of the training: in bfloat16 many
      of 1000 logits are equal, and ties decide ranks.

  Returns:
    `step(state, batch) → {'eval': sums, 'ema_eval': sums}`, with the current
    and the averaged parameters, to be mapped over `axis_name`. `batch` holds
    this device's `image` uint8 `[B, H, W, 3]`, `label` int32 `[B]` and `mask`
    `[B]`, false or 0 for padding. The sums over all devices are of `loss`
    (nats, no smoothing), `top_1` and `top_5` hits, and the `count` of images.
  """
  policy = create_policy(compute_dtype)
  # By default a TPU multiplies float32 in bfloat16, and a GPU in TF32.
  precision = 'float32' if compute_dtype == 'float32' else None

  def part_sums(state: TrainState, batch: Batch) -> dict[str, Metrics]:
    images = normalize(batch['image'])
    mask = batch['mask'].astype(jnp.float32)
    label = batch['label']

    def sums(params: hk.MutableParams, model_state: hk.MutableState) -> Metrics:
      with jax.default_matmul_precision(precision):
        outputs, _ = net.apply(
          params,
          model_state,
          None,
          policy.cast_to_compute(images),
          is_training=False,
          standardized=True,
        )
      logits = policy.cast_to_output(outputs['logits'])
      loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
      target = jnp.take_along_axis(logits, label[:, None], axis=1)
      # How many classes come before the label. Of equal logits the first comes
      # first, as in argmax, or a net that says the same of all would be right;
      # and a NaN is a miss.
      first = jnp.arange(logits.shape[1])[None, :] < label[:, None]
      before = (logits > target) | ((logits == target) & first)
      unordered = jnp.isnan(logits) | jnp.isnan(target)
      rank = jnp.sum(before | unordered, axis=1)
      per_image = {
        'loss': loss,
        'top_1': (rank < 1).astype(jnp.float32),
        'top_5': (rank < 5).astype(jnp.float32),
        'count': jnp.ones_like(mask),
      }
      # `where`, because a padded image may have any loss, also a NaN.
      return jax.tree.map(
        lambda x: jnp.sum(jnp.where(mask > 0, x, 0.0)), per_image
      )

    return {
      'eval': sums(state.params, state.model_state),
      'ema_eval': sums(state.ema_params, state.ema_model_state),
    }

  def eval_step(state: TrainState, batch: Batch):
    state = state._replace(
      params=layers.fold(state.params), ema_params=layers.fold(state.ema_params)
    )
    if micro_batches == 1:
      both = part_sums(state, batch)
    else:
      parts = jax.tree.map(
        lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch
      )
      each = jax.lax.map(functools.partial(part_sums, state), parts)
      both = jax.tree.map(functools.partial(jnp.sum, axis=0), each)
    return jax.lax.psum(both, axis_name)

  return eval_step
