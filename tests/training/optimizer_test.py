import functools
import inspect
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import config_dict

from nfnets_jax.training import build, schedules, train_step
from nfnets_jax.training import config as defaults
from nfnets_jax.training import optimizer as optimizers
from tests import golden as reference

DEPTH = (1,)
F0_DEPTH = (1, 2, 6, 3)


def _config(**changes):
  """The released settings of the recipe, with `changes`."""
  fields = {
    'name': 'sgd',
    'clip': 'agc',
    'clipping': 0.01,
    'clip_eps': 1e-3,
    'unclipped': r'^[^/]+/~/linear/w$',
    'max_norm': 1.0,
    'momentum': 0.9,
    'weight_decay': 2e-5,
    'decayed': '/w$',
    'skip_nonfinite': 0,
    'learning_rate_groups': None,
  }
  return config_dict.ConfigDict({**fields, **changes})


def _create(config, schedule, depth):
  """The optimizer of the fields that it has."""
  names = inspect.signature(optimizers.create_optimizer).parameters
  fields = {name: config[name] for name in names if name in config}
  fields |= {'schedule': schedule, 'depth': depth}
  return optimizers.create_optimizer(**fields)


def _create_schedule(config, batch_size, epoch_steps, total_steps):
  return schedules.create_schedule(
    config.schedule,
    config.learning_rate_per_256 * batch_size / 256,
    config.warmup_epochs * epoch_steps,
    total_steps,
    end=config.get('end_learning_rate', 0.0),
    decay_rate=config.get('decay_rate', 0.97),
    decay_steps=config.get('decay_epochs', 2.4) * epoch_steps,
  )


def _random_tree(seed, scale=1.0):
  """A net's kinds of parameters, as float64 numpy arrays."""
  rng = np.random.default_rng(seed)
  shapes = {
    'NFNet/~/conv': {'w': (3, 3, 2, 4), 'gain': (4,), 'bias': (4,)},
    'NFNet/~/nf_block': {'skip_gain': ()},
    'NFNet/~/linear': {'w': (4, 5), 'b': (5,)},
  }
  return jax.tree.map(
    lambda shape: np.asarray(rng.normal(0, scale, shape)),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def _float32(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def _run(optimizer, params, grads):
  """The parameters after one update for each of `grads`."""
  params = _float32(params)
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  # The bias correction of optax's Adam mixes dtypes.
  with jax.numpy_dtype_promotion('standard'):
    for grad in grads:
      updates, state = update(_float32(grad), state, params)
      params = optax.apply_updates(params, updates)
  return params


def _assert_close(tree, expected, rtol=1e-5):
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  for (path, x), y in zip(
    jax.tree.leaves_with_path(tree), jax.tree.leaves(expected), strict=True
  ):
    assert x.dtype == jnp.float32
    assert reference.relative_error(x, y) <= rtol, jax.tree_util.keystr(path)


def _golden_tree(arrays, prefix):
  tree = {}
  for key in arrays.files:
    if key.startswith(f'{prefix}/'):
      module, name = key.removeprefix(f'{prefix}/').rsplit('/', 1)
      tree.setdefault(module, {})[name] = arrays[key]
  return tree


def test_eight_steps_are_the_released(golden):
  arrays = np.load(golden / 'recipe.npz')
  total_steps, warmup_steps, batch_size, steps = arrays['meta']
  schedule = schedules.warmup_cosine(
    0.1 * batch_size / 256, warmup_steps, int(total_steps)
  )
  np.testing.assert_allclose(
    jax.jit(jax.vmap(schedule))(np.arange(len(arrays['learning_rate']))),
    arrays['learning_rate'],
    rtol=1e-5,
    atol=1e-7,
  )

  optimizer = _create(_config(), schedule, DEPTH)
  params = _float32(_golden_tree(arrays, 'param0'))
  state = train_step.TrainState(
    step=jnp.zeros((), jnp.int32),
    key=jnp.zeros((2,), jnp.uint32),
    params=params,
    model_state={},
    opt_state=optimizer.init(params),
    ema_params=params,
    ema_model_state={},
  )
  apply = jax.jit(
    lambda state, grads: train_step.apply_gradients(
      state, grads, optimizer, 0.99999
    )
  )
  for step in range(int(steps)):
    state = apply(state, _float32(_golden_tree(arrays, f'grad{step}')))
  _assert_close(state.params, _golden_tree(arrays, 'param8'))
  _assert_close(state.ema_params, _golden_tree(arrays, 'ema8'))


@pytest.fixture(scope='module')
def f0(golden):
  """Shapes of F0's parameters."""
  shapes = json.loads((golden / 'nfnet_f0_shapes.json').read_text())
  return {
    module: {
      name: jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
      for name, shape in leaves.items()
    }
    for module, leaves in shapes.items()
  }


def _marked(marks, value):
  return {
    (module, name)
    for module, leaves in marks.items()
    for name, mark in leaves.items()
    if mark is value
  }


def test_matrices_and_kernels_decay(f0):
  marks = optimizers.decay_mask(f0, _config().decayed)
  decayed, others = (_marked(marks, value) for value in (True, False))
  assert len(decayed) + len(others) == len(jax.tree.leaves(f0))
  assert all(f0[module][name].ndim >= 2 for module, name in decayed)
  assert all(f0[module][name].ndim <= 1 for module, name in others)
  assert {name for _, name in others} == {'b', 'bias', 'gain', 'skip_gain'}
  gates = {module for module, _ in decayed if 'squeeze_excite' in module}
  assert len(gates) == 2 * 12  # two matrices in each of F0's twelve blocks


def test_what_decays_is_an_expression(f0):
  config = _config(decayed='/(w|b)$', unclipped=None)
  marks = optimizers.decay_mask(f0, config.decayed)
  assert {name for _, name in _marked(marks, True)} == {'w', 'b'}
  params = {'net/~/head': {'w': jnp.ones((2, 3))}}
  _create(config, lambda step: 1.0, DEPTH).init(params)
  config.decayed = '/kernel$'
  with pytest.raises(ValueError, match=r'decayed: .*kernel.* net/~/head/w'):
    _create(config, lambda step: 1.0, DEPTH).init(params)


def _clipped(params, unclipped):
  """Marks what AGC clips: gradients of 1 where parameters are 0."""
  # The other blocks have parameters of the same names.
  params = {
    module: leaves
    for module, leaves in params.items()
    if not re.search(r'/nf_block_\d', module)
  }
  config = _config(unclipped=unclipped, weight_decay=0.0, momentum=0.0)
  optimizer = _create(config, lambda step: -1.0, F0_DEPTH)
  zeros = jax.tree.map(lambda x: jnp.zeros((2,) * x.ndim), params)
  ones = jax.tree.map(jnp.ones_like, zeros)
  # Not compiled as one program: the leaves have four shapes only.
  updates, _ = optimizer.update(ones, optimizer.init(zeros), zeros)
  return jax.tree.map(lambda x: bool((np.asarray(x) < 0.5).all()), updates)


def test_all_but_the_classifiers_matrix_is_clipped(f0):
  marks = _clipped(f0, _config().unclipped)
  assert _marked(marks, False) == {('NFNet/~/linear', 'w')}
  assert len(_marked(marks, True)) > 20


def test_agc_needs_a_classifier_to_leave_out():
  params = {'net/~/head': {'w': jnp.ones((2, 3))}}
  with pytest.raises(ValueError, match='unclipped: .*linear.* net/~/head/w'):
    _create(_config(), lambda step: 1.0, DEPTH).init(params)


def test_everything_is_clipped_if_nothing_is_excluded(f0):
  assert not _marked(_clipped(f0, None), False)


@pytest.mark.thorough
def test_what_is_left_out_is_an_expression():
  params = jax.tree.map(jnp.float32, _random_tree(0))
  grads = jax.tree.map(lambda x: jnp.float32(1e3 * x), _random_tree(1))
  config = _config(unclipped='conv/(w|gain)$', weight_decay=0.0, momentum=0.0)
  optimizer = _create(config, lambda step: -1.0, DEPTH)
  updates, state = optimizer.update(grads, optimizer.init(params), params)
  same = jax.tree.map(lambda x, y: bool(np.allclose(x, y)), updates, grads)
  assert same == {
    'NFNet/~/conv': {'w': True, 'gain': True, 'bias': False},
    'NFNet/~/nf_block': {'skip_gain': False},
    'NFNet/~/linear': {'w': False, 'b': False},
  }
  shares = optimizers.clipping_metrics(state)
  assert shares['clipped_head'] == 1


def test_an_expression_that_is_none_is_named():
  with pytest.raises(ValueError, match=r"unclipped '\(' is no regular"):
    _create(_config(unclipped='('), lambda step: 1.0, DEPTH)


def test_weights_decay_by_what_clipping_never_saw():
  params = {
    'NFNet/~/conv': {'w': np.full((2, 3), 2.0), 'gain': np.ones(3)},
    'NFNet/~/linear': {'w': np.full((3, 1), 2.0)},
  }
  grads = {
    'NFNet/~/conv': {'w': np.full((2, 3), 50.0), 'gain': np.zeros(3)},
    'NFNet/~/linear': {'w': np.full((3, 1), 50.0)},
  }
  config = _config(weight_decay=0.5, momentum=0.0)
  optimizer = _create(config, lambda step: 1.0, DEPTH)
  new = _run(optimizer, params, [grads])
  conv, classifier = new['NFNet/~/conv'], new['NFNet/~/linear']
  # A column's gradient is as long as λ times its weights, then λ_decay · 2 is
  # added in full; clipped after the decay, the step would be 0.02.
  np.testing.assert_allclose(conv['w'], 2 - (0.01 * 2 + 0.5 * 2), rtol=1e-5)
  np.testing.assert_array_equal(conv['gain'], 1)
  np.testing.assert_allclose(classifier['w'], 2 - (50 + 0.5 * 2), rtol=1e-6)


RATES = (0.3, 0.2, 0.1)


def _schedule(step):
  return jnp.asarray(RATES)[step]


def _oracle(params, grads, update):
  """The parameters after float64 updates `update(param, grad, memory, i)`.

  `memory` is a dict of the parameter's own, for what it keeps between updates.
  """
  params = {module: dict(leaves) for module, leaves in params.items()}
  memory = {}
  for i, grad in enumerate(grads):
    for module, leaves in grad.items():
      for name, g in leaves.items():
        own = memory.setdefault((module, name), {})
        param = params[module][name]
        params[module][name] = param - update(name, param, g, own, i)
  return params


def _nesterov(direction, memory):
  memory['trace'] = direction + 0.9 * memory.get('trace', 0)
  return direction + 0.9 * memory['trace']


def _adam(grad, memory, i):
  memory['m'] = 0.9 * memory.get('m', 0) + 0.1 * grad
  memory['v'] = 0.999 * memory.get('v', 0) + 0.001 * grad**2
  m, v = (
    memory['m'] / (1 - 0.9 ** (i + 1)),
    memory['v'] / (1 - 0.999 ** (i + 1)),
  )
  return m / (np.sqrt(v) + 1e-8)


def _sgd_update(name, param, grad, memory, i):
  decay = 0.01 * param if name == 'w' else 0
  return RATES[i] * _nesterov(grad + decay, memory)


def _lars_update(name, param, grad, memory, i):
  """You et al. 2017, algorithm 1: the rate lies inside the momentum."""
  if name == 'w':
    grad = grad + 0.01 * param
    grad = grad * 1e-3 * np.linalg.norm(param) / np.linalg.norm(grad)
  return _nesterov(RATES[i] * grad, memory)


def _adam_update(name, param, grad, memory, i):
  decay = 0.01 * param if name == 'w' else 0
  return RATES[i] * _adam(grad + decay, memory, i)


def _adamw_update(name, param, grad, memory, i):
  decay = 0.01 * param if name == 'w' else 0
  return RATES[i] * (_adam(grad, memory, i) + decay)


@pytest.mark.parametrize(
  ('name', 'update'),
  [
    ('sgd', _sgd_update),
    ('lars', _lars_update),
    ('adam', _adam_update),
    ('adamw', _adamw_update),
  ],
)
def test_without_clipping_it_equals_float64(name, update):
  params, grads = _random_tree(0), [_random_tree(i) for i in (1, 2, 3)]
  config = _config(name=name, clip=None, weight_decay=0.01)
  optimizer = _create(config, _schedule, DEPTH)
  _assert_close(
    _run(optimizer, params, grads), _oracle(params, grads, update), rtol=2e-5
  )


def _step_of(config, grads):
  """The change that one update of learning rate 1 makes."""
  params = _random_tree(0)
  optimizer = _create(config, lambda step: 1.0, DEPTH)
  updates, _ = jax.jit(optimizer.update)(
    _float32(grads), optimizer.init(_float32(params)), _float32(params)
  )
  return updates


def test_global_norm_is_bounded_and_small_gradients_pass():
  config = _config(
    clip='global_norm', max_norm=0.5, weight_decay=0.0, momentum=0.0
  )
  grads = _random_tree(1)
  norm = float(
    np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(grads)))
  )
  assert norm > 0.5
  _assert_close(
    _step_of(config, grads), jax.tree.map(lambda x: -x * 0.5 / norm, grads)
  )
  small = jax.tree.map(lambda x: x * 0.4 / norm, grads)
  _assert_close(_step_of(config, small), jax.tree.map(np.negative, small))


@pytest.mark.parametrize(
  ('name', 'step'),
  [
    ('adam', lambda w: -np.sign(w)),  # L2: Adam divides the decay by itself
    ('adamw', lambda w: -0.1 * w),  # decoupled
  ],
)
def test_decay_of_adam_without_a_gradient(name, step):
  config = _config(name=name, clip=None, weight_decay=0.1)
  params = _random_tree(0)
  with jax.numpy_dtype_promotion('standard'):
    updates = _step_of(config, jax.tree.map(np.zeros_like, params))
  for module, leaves in updates.items():
    for leaf, x in leaves.items():
      expected = step(params[module][leaf]) if leaf == 'w' else 0.0
      np.testing.assert_allclose(x, expected, rtol=1e-4)


@pytest.mark.parametrize('name', ['sgd', 'rmsprop', 'lars', 'adam', 'adamw'])
@pytest.mark.parametrize('clip', ['agc', 'global_norm', None])
def test_every_combination_moves_every_parameter(name, clip):
  with jax.numpy_dtype_promotion('standard'):
    updates = _step_of(_config(name=name, clip=clip), _random_tree(1))
  for x in map(np.asarray, jax.tree.leaves(updates)):
    assert (x != 0).all()
    assert np.isfinite(x).all()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'name': 'sdg'},
      "optimizer.name is 'sdg'; choose one of sgd, rmsprop, lars, adam",
    ),
    (
      {'clip': 'norm'},
      "optimizer.clip is 'norm'; choose one of None, agc, global_norm",
    ),
    ({'clipping': 0.0}, 'must be positive, got 0.0'),
  ],
)
def test_unknown_choices_list_the_known(changes, message):
  with pytest.raises(ValueError, match=message):
    _create(_config(**changes), lambda step: 1.0, DEPTH)


def test_fractional_warmup():
  schedule = schedules.warmup_cosine(1.6, warmup_steps=2.5, total_steps=10)
  steps = np.arange(13)
  progress = np.clip((steps - 2.5) / 7.5, 0, 1)
  expected = np.where(
    steps < 2.5, 1.6 * steps / 2.5, 0.8 * (1 + np.cos(np.pi * progress))
  )
  rates = jax.jit(jax.vmap(schedule))(steps)
  assert rates.dtype == jnp.float32
  np.testing.assert_allclose(rates, expected, atol=1e-6)


@pytest.mark.parametrize('warmup_steps', [0.0, 0.3])
def test_short_warmup_reaches_the_peak_at_once(warmup_steps):
  schedule = jax.jit(
    schedules.warmup_cosine(1.6, warmup_steps, total_steps=1000)
  )
  assert float(schedule(0)) == pytest.approx(1.6 if warmup_steps == 0 else 0)
  assert float(schedule(1)) == pytest.approx(1.6, rel=1e-4)


@pytest.mark.parametrize(
  ('warmup_steps', 'total_steps', 'message'),
  [
    (50, 40, 'warm-up of 50 steps does not fit into a run of 40'),
    (40, 40, 'warm-up of 40 steps does not fit into a run of 40'),
    (-1, 40, 'warm-up of -1 steps'),
    (0, 0, 'a run of 0; train longer'),
  ],
)
def test_warmup_that_does_not_fit_is_refused(
  warmup_steps, total_steps, message
):
  with pytest.raises(ValueError, match=message):
    schedules.warmup_cosine(1.6, warmup_steps, total_steps)


def test_cosine_ends_where_it_is_told():
  schedule = schedules.warmup_cosine(0.4, 0, total_steps=100, end=0.001)
  rates = jax.jit(jax.vmap(schedule))(np.asarray([0, 50, 100, 200]))
  assert rates.tolist() == pytest.approx([0.4, 0.2005, 0.001, 0.001], rel=1e-5)


def test_exponential_decays_from_the_first_step_on():
  """0.97 every 2.4 epochs, also of those of the warm-up, as published."""
  config = _config(
    schedule='exponential',
    learning_rate_per_256=0.016,
    warmup_epochs=5.0,
    decay_rate=0.97,
    decay_epochs=2.4,
    end_learning_rate=0.0,
  )
  schedule = jax.jit(_create_schedule(config, 4096, 10.0, 3500))
  assert float(schedule(25)) == pytest.approx(0.128)  # half of the warm-up
  for epoch in (5, 10, 100, 349):
    expected = 0.256 * 0.97 ** (epoch // 2.4)
    assert float(schedule(10 * epoch + 1)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'schedule': 'linear'}, "schedule is 'linear'; choose one of cosine, exp"),
    ({'schedule': 'exponential', 'decay_rate': 1.5}, 'decay by 1.5 every 24'),
    ({'schedule': 'exponential', 'decay_epochs': 0.0}, 'by 0.97 every 0 steps'),
    (
      {'schedule': 'exponential', 'warmup_epochs': 9.0},
      'warm-up of 90 steps does not fit into a run of 80',
    ),
  ],
)
def test_schedules_that_make_no_sense_are_refused(changes, message):
  config = defaults.get_config().optimizer
  config.update(changes)
  with pytest.raises(ValueError, match=message):
    _create_schedule(config, 256, 10.0, total_steps=80)


def test_rmsprop_is_that_of_tensorflow():
  """Averages of squares from 1, ε inside the root, the rate inside the sum."""
  config = _config(name='rmsprop', clip=None, weight_decay=0.0)
  rate, momentum = 0.01, config.momentum
  optimizer = _create(config, lambda step: rate, DEPTH)
  params = {'net/~/linear': {'w': jnp.ones((2, 2))}}
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  square, moved = np.ones((2, 2)), np.zeros((2, 2))
  for step in range(3):
    grad = np.full((2, 2), 0.5 + step)
    grads = {'net/~/linear': {'w': jnp.asarray(grad, jnp.float32)}}
    updates, state = update(grads, state, params)
    square = 0.9 * square + 0.1 * grad**2
    moved = momentum * moved + rate * grad / np.sqrt(square + 1e-3)
    np.testing.assert_allclose(updates['net/~/linear']['w'], -moved, rtol=1e-5)


@pytest.mark.parametrize(
  ('module', 'part'),
  [
    ('NF_ResNet/~/initial_conv', 'stem'),
    ('NF_ResNet/~/nf_res_block/~/conv0', 'stage_1'),
    ('ResNet/~/res_block_v2_3/~/bn1', 'stage_2'),
    ('NF_RegNet/~/nf_block_4', 'stage_2'),
    ('EfficientNet/~/mb_conv_block_2/~/expand', 'stage_1'),
    ('ResNet/~/final_bn', 'head'),
    ('NF_ResNet/~/linear', 'head'),
  ],
)
def test_parts_of_all_families_are_known(module, part):
  assert optimizers._part(module, (3, 4)) == part


def _shares(config, grads, params, depth):
  optimizer = _create(config, lambda step: 0.1, depth)

  def shares(grads, params):
    _, state = optimizer.update(grads, optimizer.init(params), params)
    return optimizers.clipping_metrics(state)

  return jax.jit(shares)(_float32(grads), _float32(params))


def test_clipping_metrics_are_those_of_the_units():
  params = {
    'NFNet/~/stem_conv0': {'w': np.ones((3, 3, 2, 4)), 'gain': np.ones(4)},
    'NFNet/~/nf_block': {'skip_gain': np.zeros(())},
    'NFNet/~/nf_block_2/~/conv0': {'w': np.ones((1, 1, 2, 5))},
    'NFNet/~/linear': {'w': np.ones((4, 5)), 'b': np.zeros(5)},
  }
  rng = np.random.default_rng(0)
  grads = jax.tree.map(
    lambda x: np.asarray(rng.normal(0, 0.1, x.shape)), params
  )
  shares = _shares(_config(clipping=0.2), grads, params, depth=(2, 2))

  def clipped(module, name, axes):
    def norm(tree):
      return np.sqrt((tree[module][name] ** 2).sum(axis=axes))

    return norm(grads) > 0.2 * np.maximum(norm(params), 1e-3)

  stem = [
    *clipped('NFNet/~/stem_conv0', 'w', (0, 1, 2)),
    clipped('NFNet/~/stem_conv0', 'gain', 0),
  ]
  first = [clipped('NFNet/~/nf_block', 'skip_gain', None)]
  second = [*clipped('NFNet/~/nf_block_2/~/conv0', 'w', (0, 1, 2))]
  head = [clipped('NFNet/~/linear', 'b', 0)]  # its weights are never clipped
  assert {0, 1} == {*stem, *first, *second, *head}
  expected = {
    'clipped': np.mean([*stem, *first, *second, *head]),
    'clipped_stem': np.mean(stem),
    'clipped_stage_1': np.mean(first),
    'clipped_stage_2': np.mean(second),
    'clipped_head': np.mean(head),
  }
  assert shares.keys() == expected.keys()
  for name, share in expected.items():
    np.testing.assert_allclose(shares[name], share, rtol=1e-6)


def test_nothing_is_clipped_without_agc():
  tree = _random_tree(0)
  assert _shares(_config(clip='global_norm'), tree, tree, DEPTH) == {}


def test_a_gradient_that_is_not_finite_is_left_out():
  params, grads = _random_tree(0), [_random_tree(i) for i in (1, 2)]
  broken = jax.tree.map(np.copy, grads[0])
  broken['NFNet/~/conv']['w'][0, 0, 0, 0] = np.nan

  def create(config):
    return _create(config, lambda step: 0.1, DEPTH)

  expected = _run(create(_config()), params, grads)
  skipping = create(_config(skip_nonfinite=2))
  left_out = [grads[0], broken, broken, grads[1]]
  actual = _run(skipping, params, left_out)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_clipping_metrics_of_a_skipped_step_are_its_own():
  params, grads = _float32(_random_tree(0)), _float32(_random_tree(1))
  config = _config(skip_nonfinite=2, clipping=1e3)
  optimizer = _create(config, lambda step: 0.1, DEPTH)

  @jax.jit
  def update(grads, state):
    updates, state = optimizer.update(grads, state, params)
    return updates, state, optimizers.clipping_metrics(state)

  _, state, metrics = update(grads, optimizer.init(params))
  assert metrics['clipped'] == 0
  grads['NFNet/~/linear']['b'] = jnp.full(5, jnp.inf)
  updates, state, metrics = update(grads, state)
  assert not any(np.any(x) for x in jax.tree.leaves(updates))
  assert not optax.tree.get(state, 'last_finite')
  assert metrics['clipped_head'] == pytest.approx(1 / 7)
  assert metrics['clipped_stage_1'] == 0
  # Units: four kernels, gain, bias, SkipInit gain and the head's bias.
  assert metrics['clipped'] == pytest.approx(1 / 8)
  # What is checked before a checkpoint.
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
  ('name', 'update'),
  [('sgd', _sgd_update), ('lars', _lars_update), ('adam', _adam_update)],
)
def test_the_rate_follows_the_steps_also_those_that_are_skipped(name, update):
  params, grads = _random_tree(0), [_random_tree(i) for i in (1, 2)]
  broken = jax.tree.map(np.copy, grads[0])
  broken['NFNet/~/linear']['b'][0] = np.inf
  config = _config(name=name, clip=None, weight_decay=0.01, skip_nonfinite=2)
  rates = jnp.asarray([RATES[0], 7.0, 7.0, RATES[1]])
  optimizer = _create(config, lambda step: rates[step], DEPTH)
  actual = _run(optimizer, params, [grads[0], broken, broken, grads[1]])
  _assert_close(actual, _oracle(params, grads, update), rtol=2e-5)


@pytest.mark.parametrize('clip', [None, 'agc', 'global_norm'])
def test_rate_and_thresholds_may_be_inputs(clip):
  params, grads = _random_tree(0), _random_tree(1)
  programs = []

  def update(values, config, params, grads, step):
    programs.append(values)
    schedule = build.create_schedule(config, 2.5, values)
    optimizer = build.create_optimizer(config, schedule, values)
    state = optimizer.init(params)
    # As after some steps: at the first the rate is zero.
    state = optax.tree.set(state, count=step)
    return optimizer.update(grads, state, params)[0]

  first = defaults.get_config()
  first.batch_size, first.epochs = 384, 16.0  # 40 steps
  first.model.depth = DEPTH
  first.optimizer.update(clip=clip, warmup_epochs=2.0, end_learning_rate=0.01)
  second = first.copy_and_resolve_references()
  second.optimizer.update(
    learning_rate_per_256=0.7, clipping=0.03, max_norm=0.2
  )
  compiled = jax.jit(lambda values, *args: update(values, first, *args))
  found = []
  for config in (first, second):
    fixed = jax.jit(functools.partial(update, {}, config))
    for step in (3, 20):
      args = _float32(params), _float32(grads), jnp.asarray(step, jnp.int32)
      found.append(compiled(build.initial_hyperparams(config), *args))
      expected = fixed(*args)
      jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-8),
        found[-1],
        expected,
      )
  assert len(programs) == 1 + 2  # traced once for all values
  weights = [x['NFNet/~/conv']['w'] for x in found]
  for one, other in itertools.combinations(weights, 2):
    assert not np.allclose(one, other, rtol=1e-2)


@pytest.mark.thorough
def test_global_norm_is_that_of_all_elements():
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = [(), (5,), (6, 7), (3, 3, 4, 5)]
  tree = [
    jax.random.normal(key, shape)
    for key, shape in zip(keys, shapes, strict=True)
  ]
  np.testing.assert_allclose(
    optimizers.global_norm(tree), optax.tree.norm(tree), rtol=1e-6
  )
