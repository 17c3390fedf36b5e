import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

from experiments import nfnet_imagenet
from nfnets_jax.models import dropout
from nfnets_jax.runtime import parallel
from nfnets_jax.training import (
  build,
  eval_step,
  losses,
  normalize,
  programs,
  train_step,
)
from tests import golden as reference
from tests import steps

DEVICES = 8


def _create(config, micro_batches=1):
  """Net, train step and initial state, away from the SkipInit zeros."""
  net = build.create_net(config, num_classes=10)
  optimizer = build.create_optimizer(config, lambda step: 0.1)
  state = train_step.init_state(net, optimizer, config.seed, image_size=8)
  params = reference.fill_tree(state.params)
  state = state._replace(
    params=jax.tree.map(jnp.asarray, params),
    ema_params=jax.tree.map(jnp.array, params),
  )
  step = steps.constant_step(
    config, net, optimizer, micro_batches=micro_batches
  )
  return net, step, state


def _on_one_device(step):
  return jax.pmap(
    step,
    axis_name=parallel.AXIS,
    in_axes=(None, 0),
    out_axes=(None, None),
    devices=jax.devices()[:1],
  )


@pytest.fixture(scope='module')
def trained(make_config):
  """Two steps of batch 16, on eight devices and on one."""
  config = make_config()
  _, step, start = _create(config)

  eight, one = parallel.replicate(start), start
  on_eight, on_one = parallel.parallel_train_step(step), _on_one_device(step)
  metrics = []
  classifiers = [np.array(start.params['NFNet/~/linear']['w'])]
  for seed in (1, 2):
    batch = steps.random_batch(16, seed)
    eight, eight_metrics = on_eight(eight, parallel.shard(batch))
    one, one_metrics = on_one(one, jax.tree.map(lambda x: x[None], batch))
    metrics.append((eight_metrics, one_metrics))
    classifiers.append(np.array(eight.params['NFNet/~/linear']['w']))
  return {
    'start': start,
    'step': on_one,
    'eight': eight,
    'one': one,
    'metrics': metrics,
    'classifiers': classifiers,
  }


@pytest.mark.thorough
def test_metrics_do_not_depend_on_the_devices(trained):
  for eight, one in trained['metrics']:
    assert eight.keys() == {
      'loss',
      'top_1',
      'grad_norm',
      'learning_rate',
      'clipped',
      'clipped_stem',
      'clipped_stage_1',
      'clipped_head',
    }
    for name in eight:
      assert eight[name].dtype == jnp.float32
      np.testing.assert_allclose(eight[name], one[name], rtol=1e-5)
  assert trained['metrics'][0][0]['loss'] != trained['metrics'][1][0]['loss']


@pytest.mark.thorough
@pytest.mark.parametrize('part', ['params', 'ema_params', 'opt_state'])
def test_state_does_not_depend_on_the_devices(trained, part):
  eight, one, start = (
    jax.tree.leaves_with_path(getattr(trained[run], part))
    for run in ('eight', 'one', 'start')
  )
  for (path, x), (_, y), (_, old) in zip(eight, one, start, strict=True):
    # What changed is compared, a hundredth of what it is read off, so two of
    # the seven digits of float32 are gone; the order of the sums costs another.
    x, y, old = (np.asarray(z, np.float64) for z in (x, y, old))
    assert np.linalg.norm(y - old) > 0, path
    assert reference.relative_error(x - old, y - old) <= 1e-3, path


@pytest.mark.thorough
def test_replicas_stay_identical(trained):
  assert parallel.replica_spread(trained['eight']) == 0


@pytest.mark.thorough
def test_state_counts_and_keeps_its_key(trained):
  assert int(trained['eight'].step) == 2
  np.testing.assert_array_equal(trained['eight'].key, trained['start'].key)


def _dropout_step(config):
  """A step of a net that drops half of the features, and its state."""

  def forward(images, is_training, image_index=None, standardized=False):
    x = dropout.dropout(hk.Flatten()(images), 0.5, is_training, image_index)
    return {'logits': hk.Linear(10)(x)}

  net = hk.transform_with_state(forward)
  state = train_step.init_state(net, optax.sgd(0.1), seed=0, image_size=8)
  step = steps.constant_step(config, net, optax.sgd(0.1))
  return step, state


def test_each_step_and_each_run_draws_anew(make_config):
  """The same images, of which other features are dropped."""
  step, start = _dropout_step(make_config(1, {'optimizer.clip': None}))
  step = _on_one_device(step)
  batch = jax.tree.map(lambda x: x[None], steps.random_batch(2))
  losses = {
    float(step(state, batch)[1]['loss'])
    for state in (
      start,
      start._replace(step=start.step + 1),
      start._replace(key=start.key + 1),
      start,
    )
  }
  assert len(losses) == 3


def test_devices_drop_different_features(make_config):
  """Each gets the same two images: one mask for all would be as one device."""
  step, state = _dropout_step(make_config(1, {'optimizer.clip': None}))
  pair = steps.random_batch(2)
  eight = jax.tree.map(lambda x: np.stack([x] * DEVICES), pair)
  _, alone = _on_one_device(step)(state, jax.tree.map(lambda x: x[None], pair))
  _, together = parallel.parallel_train_step(step)(
    parallel.replicate(state), eight
  )
  assert abs(float(together['loss']) - float(alone['loss'])) > 0.01


SPLITS = {
  'whole': {'devices': 1, 'micro_batches': 1},
  'micro-batches': {'devices': 1, 'micro_batches': 8},
  'devices too': {'devices': 8, 'micro_batches': 4},
}


def _split_step(config, devices, micro_batches):
  """One step of 64 images: its gradient, metrics and scratch memory."""
  # The momentum of the first step is the gradient.
  net, optimizer = build.create_net(config, 10), optax.sgd(0.1, momentum=0.9)
  state = train_step.init_state(net, optimizer, 0, image_size=8)
  params = reference.fill_tree(state.params)
  state = state._replace(params=jax.tree.map(jnp.asarray, params))
  step = steps.constant_step(
    config, net, optimizer, micro_batches=micro_batches
  )
  batch = steps.random_batch(64)
  if devices == 1:
    step, batch = _on_one_device(step), jax.tree.map(lambda x: x[None], batch)
  else:
    step, batch = parallel.parallel_train_step(step), parallel.shard(batch)
    state = parallel.replicate(state)
  compiled = step.lower(state, batch).compile()
  scratch = compiled.memory_analysis().temp_size_in_bytes
  state, metrics = compiled(state, batch)
  return jax.device_get((state.opt_state[0].trace, metrics)), scratch


@pytest.fixture(
  scope='module',
  params=[
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param(
      {
        'model.depth': (2,),
        'model.drop_rate': 0.5,
        'model.stochdepth_rate': 0.9,
      },
      marks=pytest.mark.slow,
    ),
  ],
  ids=['plain', 'dropout'],
)
def splits(make_config, request):
  """The same step, split in all ways."""
  config = make_config(1, request.param)
  return {name: _split_step(config, **split) for name, split in SPLITS.items()}


@pytest.mark.parametrize('name', [name for name in SPLITS if name != 'whole'])
def test_step_does_not_depend_on_the_split(splits, name):
  (grads, metrics), _ = splits[name]
  (whole_grads, whole_metrics), _ = splits['whole']
  for metric, value in metrics.items():
    assert value == pytest.approx(whole_metrics[metric], rel=1e-6)
  flat, whole = (
    np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    for tree in (grads, whole_grads)
  )
  assert reference.relative_error(flat, whole) <= 1e-6


def test_micro_batches_take_less_memory(splits):
  _, whole = splits['whole']
  _, parts = splits['micro-batches']
  assert parts < whole / 2


@pytest.mark.thorough
def test_batch_that_cannot_be_split(make_config):
  net, optimizer = build.create_net(make_config(), 10), optax.sgd(0.1)
  state = train_step.init_state(net, optimizer, 0, image_size=8)
  step = steps.constant_step(make_config(), net, optimizer, micro_batches=3)
  batch = jax.tree.map(lambda x: x[None], steps.random_batch(16))
  with pytest.raises(
    ValueError, match='3 micro-batches do not divide a per-device batch of 16'
  ):
    _on_one_device(step).lower(state, batch)


@pytest.mark.thorough
def test_state_of_the_network_goes_through_the_micro_batches(make_config):
  """A net that counts its calls."""

  def forward(images, is_training, image_index=None, standardized=False):
    calls = hk.get_state('calls', (), init=jnp.zeros)
    hk.set_state('calls', calls + 1)
    return {'logits': hk.Linear(10)(hk.Flatten()(images))}

  net, optimizer = hk.transform_with_state(forward), optax.sgd(0.1)
  config = make_config(changes={'optimizer.clip': None})
  state = train_step.init_state(net, optimizer, 0, image_size=8)
  step = steps.constant_step(config, net, optimizer, micro_batches=4)
  batch = jax.tree.map(lambda x: x[None], steps.random_batch(16))
  before = float(state.model_state['~']['calls'])
  state, _ = _on_one_device(step)(state, batch)
  assert float(state.model_state['~']['calls']) == before + 4


@pytest.mark.thorough
def test_average_follows_the_parameters(trained):
  start, first, second = trained['classifiers']
  # The decays of the first two updates are 1/10 and 2/11.
  average = 0.1 * start + 0.9 * first
  average = 2 / 11 * average + 9 / 11 * second
  np.testing.assert_allclose(
    trained['eight'].ema_params['NFNet/~/linear']['w'], average, atol=1e-7
  )
  assert np.abs(average - second).max() > 1e-5


@pytest.mark.slow
def test_forgotten_mean_is_seen(make_config):
  """Every device trains alone, on an axis that holds only itself."""
  config = make_config()
  net = build.create_net(config, num_classes=10)
  optimizer = build.create_optimizer(config, lambda step: 0.1)
  step = steps.constant_step(config, net, optimizer, axis_name='alone')
  alone = jax.vmap(step, (None, 0), (None, None), axis_name='alone')

  def faulty(state, batch):
    state, metrics = alone(state, jax.tree.map(lambda x: x[None], batch))
    return state, jax.lax.pmean(metrics, parallel.AXIS)

  state, metrics = parallel.parallel_train_step(faulty)(
    parallel.replicate(train_step.init_state(net, optimizer, 0, image_size=8)),
    parallel.shard(steps.random_batch(16)),
  )
  assert np.isfinite(metrics['loss'])  # nothing else shows it
  assert parallel.replica_spread(state.params) > 0
  assert parallel.replica_spread(state.step) == 0


def test_labels_are_weighted_by_the_ratio():
  batch = {
    'label': np.array([0, 2, 1], np.int32),
    'mix_label': np.array([1, 2, 0], np.int32),
    'ratio': np.array([0.25, 0.75, 1], np.float32),
  }
  labels = losses.label_distributions(batch, 3)
  assert labels.dtype == jnp.float32
  expected = [[0.25, 0.75, 0], [0, 0, 1], [0, 1, 0]]
  np.testing.assert_array_equal(labels, expected)


def test_step_learns_from_normalised_images_and_both_labels():
  """The gradient of a linear net, by hand."""

  def forward(images, is_training, image_index=None, standardized=False):
    return {'logits': hk.Linear(10)(hk.Flatten()(images))}

  net = hk.transform_with_state(forward)
  batch = steps.random_batch(16)
  images = batch['image'] - np.array(normalize.IMAGENET_MEAN)
  images = (images / normalize.IMAGENET_STD).reshape(16, -1)
  ratio = batch['ratio'][:, None]
  labels = ratio * np.eye(10)[batch['label']]
  labels += (1 - ratio) * np.eye(10)[batch['mix_label']]
  params, _ = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), True)
  gradient = functools.partial(losses.loss_gradient, net=net, num_classes=10)
  batch |= {'index': np.arange(16, dtype=np.int32)}
  grads, metrics, _ = jax.jit(gradient)(params, {}, jax.random.key(1), batch)
  logits = images @ np.asarray(params['linear']['w'], np.float64)
  probabilities = np.exp(logits - logits.max(1, keepdims=True))
  probabilities /= probabilities.sum(1, keepdims=True)
  loss = -np.sum(labels * np.log(probabilities), axis=1).mean()
  assert float(metrics['loss']) == pytest.approx(loss, rel=1e-5)
  expected = images.T @ (probabilities - labels) / 16
  assert reference.relative_error(grads['linear']['w'], expected) < 1e-5


@pytest.mark.thorough
def test_bfloat16_computes_but_does_not_remember(make_config, trained):
  _, step, start = _create(make_config(1, {'compute_dtype': 'bfloat16'}))
  state, metrics = parallel.parallel_train_step(step)(
    parallel.replicate(start), parallel.shard(steps.random_batch(16, seed=1))
  )
  for x in jax.tree.leaves((state, metrics)):
    assert x.dtype != jnp.bfloat16
    assert np.isfinite(x).all()
  assert parallel.replica_spread(state) == 0
  exact, _ = trained['metrics'][0]
  # Eight bits a number.
  assert float(metrics['loss']) == pytest.approx(float(exact['loss']), rel=0.02)
  assert metrics['loss'] != exact['loss']


def _equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for inside in core.jaxprs_in_params(equation.params):
      yield from _equations(inside)


def _dtypes(variables):
  return {variable.aval.dtype for variable in variables}


@pytest.mark.thorough
@pytest.mark.parametrize('micro_batches', [1, 4])
def test_bfloat16_is_for_products_and_float32_for_sums(
  make_config, micro_batches
):
  changes = {
    'compute_dtype': 'bfloat16',
    'model.drop_rate': 0.2,
    'model.stochdepth_rate': 0.2,
  }
  config = make_config(1, changes)
  _, step, state = _create(config, micro_batches)
  batch = steps.random_batch(16)
  jaxpr, (new_state, metrics) = jax.make_jaxpr(
    step, axis_env=[(parallel.AXIS, 1)], return_shape=True
  )(state, batch)
  for leaf in jax.tree.leaves((new_state, metrics)):
    assert leaf.dtype in (jnp.float32, jnp.int32, jnp.uint32)

  equations = list(_equations(jaxpr.jaxpr))
  bfloat16, float32 = jnp.dtype('bfloat16'), jnp.dtype('float32')
  products = [
    equation
    for equation in equations
    if equation.primitive.name in ('conv_general_dilated', 'dot_general')
  ]
  # Three for each of the forward pass, but the first needs no gradient of its
  # images.
  convolutions = [x for x in products if x.invars[0].aval.ndim == 4]
  assert len(convolutions) > 3 * 4
  for equation in products:
    assert _dtypes(equation.invars) == {bfloat16}
  sums = [x for x in equations if x.primitive.name == 'reduce_sum']
  # AGC sums two squares at once, as a complex number.
  wide = {float32, jnp.dtype('int32'), jnp.dtype('complex64')}
  for equation in sums:
    # A sum over axes of length 1 is none.
    if equation.invars[0].aval.size > equation.outvars[0].aval.size:
      assert _dtypes(equation.invars) <= wide
  if micro_batches > 1:
    (accumulation,) = [
      equation
      for equation in equations
      if equation.primitive.name == 'scan'
      and equation.params['length'] == micro_batches
    ]
    assert bfloat16 not in _dtypes(accumulation.outvars)

  # AGC, momentum and moving average see nothing of it.
  update = jax.make_jaxpr(
    lambda state, grads: train_step.apply_gradients(
      state,
      grads,
      build.create_optimizer(config, lambda step: 0.1),
      config.ema_decay,
    )
  )(state, state.params)
  for equation in _equations(update.jaxpr):
    assert bfloat16 not in _dtypes(equation.outvars)


def _table_net(num_classes):
  """A net whose parameters are the logits: red is the row of an image."""

  def forward(images, is_training, image_index=None, standardized=False):
    del is_training
    shape = (256, num_classes)
    table = hk.get_parameter('table', shape, init=hk.initializers.Constant(0))
    red = images[:, 0, 0, 0] * normalize.IMAGENET_STD[0]
    row = jnp.round(red + normalize.IMAGENET_MEAN[0]).astype(jnp.int32)
    return {'logits': table[row]}

  return hk.transform_with_state(forward)


def _evaluate(logits, labels, mask, average=None):
  """The sums over eight devices for these logits of each image."""
  count, num_classes = logits.shape
  net = _table_net(num_classes)
  state = train_step.init_state(net, optax.sgd(0.1), seed=0, image_size=2)

  def params(logits):
    table = np.zeros((256, num_classes), np.float32)
    table[:count] = logits
    return jax.tree.map(lambda _: table, state.params)

  average = logits if average is None else average
  state = state._replace(params=params(logits), ema_params=params(average))
  step = functools.partial(
    eval_step.eval_step, net=net, axis_name=parallel.AXIS
  )
  image = np.zeros((count, 2, 2, 3), np.uint8)
  image[..., 0] = np.arange(count)[:, None, None]
  batch = {'image': image, 'label': labels, 'mask': mask}
  sums = parallel.parallel_eval_step(step)(
    parallel.replicate(state), parallel.shard(batch)
  )
  return jax.tree.map(float, sums)


def _oracle(logits, labels, mask):
  logits = np.asarray(logits, np.float64)[mask > 0]
  labels = labels[mask > 0]
  order = np.argsort(-logits, axis=1)
  return {
    'loss': np.sum(
      np.log(np.sum(np.exp(logits), axis=1))
      - logits[np.arange(len(labels)), labels]
    ),
    'top_1': np.sum(order[:, 0] == labels),
    'top_5': np.sum(order[:, :5] == labels[:, None]),
    'count': len(labels),
  }


@pytest.mark.parametrize('num_classes', [3, 5, 6, 20])
def test_evaluation_sums_what_the_mask_leaves(num_classes):
  rng = np.random.default_rng(0)
  logits, average = rng.normal(0, 2, (2, 32, num_classes)).astype(np.float32)
  labels = rng.integers(num_classes, size=32, dtype=np.int32)
  mask = (rng.uniform(size=32) < 0.7).astype(np.float32)
  assert 0 < mask.sum() < 32
  logits[mask == 0] = np.nan  # padding is not to be looked at
  sums = _evaluate(logits, labels, mask, average)
  assert sums['eval'] == pytest.approx(_oracle(logits, labels, mask))
  assert sums['ema_eval'] == pytest.approx(_oracle(average, labels, mask))


@pytest.mark.parametrize('where', ['label', 'others', 'all'])
def test_nan_is_a_miss(where):
  labels = np.full(16, 3, np.int32)
  logits = np.zeros((16, 10), np.float32)
  logits[:, 3] = 9.0  # all would be hits
  columns = {'label': [3], 'others': [0, 1, 2, 4, 5], 'all': range(10)}[where]
  logits[:4, columns] = np.nan
  sums = _evaluate(logits, labels, np.ones(16, np.float32))
  assert sums['eval']['top_1'] == 12
  assert sums['eval']['top_5'] == 12
  assert sums['eval']['count'] == 16
  assert np.isnan(sums['eval']['loss'])


def test_ties_are_no_hits_for_all():
  """Equal logits say nothing: of K labels, one is right."""
  labels = np.arange(20, dtype=np.int32).repeat(2)
  logits = np.zeros((40, 20), np.float32)
  sums = _evaluate(logits, labels, np.ones(40, np.float32))
  assert sums['eval']['top_1'] == 2
  assert sums['eval']['top_5'] == 10


@pytest.mark.thorough
def test_evaluation_is_float32_whatever_the_training_computes_in(golden):
  """F0's evaluation step meets the golden logits with the ImageNet config."""
  config = nfnet_imagenet.get_config('F0')
  assert config.compute_dtype == 'bfloat16'
  net = build.create_net(config, num_classes=1000)
  seen = []

  def apply(params, state, key, images, **kwargs):
    outputs, state = net.apply(params, state, key, images, **kwargs)
    jax.debug.callback(lambda x: seen.append(np.array(x)), outputs['logits'])
    return outputs, state

  shapes = jax.eval_shape(
    functools.partial(net.init, is_training=True),
    jax.random.key(0),
    jnp.zeros((1, 64, 64, 3)),
  )
  params = reference.fill_tree(shapes[0])
  state = train_step.TrainState(0, 0, params, {}, (), params, {})
  pixels = reference.image(2, 64) * np.float32(normalize.IMAGENET_STD)
  batch = {
    'image': pixels + np.float32(normalize.IMAGENET_MEAN),
    'label': np.zeros(2, np.int32),
    'mask': np.ones(2, np.float32),
  }
  step = functools.partial(
    eval_step.eval_step,
    net=hk.TransformedWithState(net.init, apply),
    axis_name=parallel.AXIS,
  )
  evaluate = jax.pmap(
    step,
    axis_name=parallel.AXIS,
    in_axes=(None, 0),
    out_axes=None,
    devices=jax.devices()[:1],
  )
  jax.block_until_ready(evaluate(state, jax.tree.map(lambda x: x[None], batch)))
  jax.effects_barrier()
  expected = np.load(golden / 'logits.npz')['NFNet/F0@64']
  assert len(seen) == 2  # the weights and their average
  for logits in seen:
    assert reference.relative_error(logits, expected) <= 2e-5


@pytest.mark.parametrize('dtype', train_step.DTYPES)
def test_evaluation_computes_in_the_dtype_of_the_config(make_config, dtype):
  config = make_config(1, {'eval_dtype': dtype, 'compute_dtype': 'bfloat16'})
  seen = set()

  def forward(images, is_training, image_index=None, standardized=False):
    del is_training
    seen.add(images.dtype.name)
    logits = hk.Linear(10)(hk.Flatten()(images).astype(jnp.float32))
    return {'logits': logits.astype(images.dtype)}

  net = hk.transform_with_state(forward)
  state = train_step.init_state(
    net, optax.sgd(0.1), seed=0, image_size=config.data.eval_image_size
  )
  seen.clear()
  step = programs.compile_eval_step(config, net, parallel.replicate(state))
  assert seen == {dtype}
  count, size = config.eval_batch_size, config.data.eval_image_size
  batch = {
    'image': np.zeros((count, size, size, 3), np.uint8),
    'label': np.zeros(count, np.int32),
    'mask': np.ones(count, np.float32),
  }
  sums = step(parallel.replicate(state), parallel.shard(batch))
  assert float(sums['eval']['count']) == count
  assert sums['eval']['loss'].dtype == jnp.float32
