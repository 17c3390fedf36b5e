"""The nets that the paper compares with train by the same loop."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
  ablation_imagenet,
  efficientnet_imagenet,
  nf_regnet_imagenet,
  nf_resnet_imagenet,
  resnet_imagenet,
)
from nfnets_jax.runtime import parallel
from nfnets_jax.training import build, train_step
from tests import steps

CONFIGS = {
  'nf_resnet': (nf_resnet_imagenet, '50'),
  'nf_regnet': (nf_regnet_imagenet, 'B0'),
  'resnet': (resnet_imagenet, '50'),
  'efficientnet': (efficientnet_imagenet, 'B0'),
  'batch_norm': (ablation_imagenet, 'F0,batch_norm'),
}

# A net of two blocks for each family; the rest of the recipe stays.
SHRUNK = {
  'nf_resnet': {
    'width': (32, 64),
    'depth': (1, 1),
    'strides': (1, 2),
    'stem_width': 16,
    'stem_pool': False,
  },
  'nf_regnet': {
    'width': (16, 32),
    'depth': (1, 1),
    'strides': (1, 2),
  },
  'resnet': {
    'width': (32, 64),
    'depth': (1, 1),
    'strides': (1, 2),
    'stem_width': 16,
    'stem_pool': False,
  },
  'efficientnet': {
    'width': (16, 24),
    'depth': (1, 1),
    'strides': (1, 2),
    'kernel_sizes': (3, 5),
    'expansions': (1, 6),
    'stem_width': 16,
    'final_width': 64,
  },
  'batch_norm': {
    'width': (32, 64),
    'depth': (1, 1),
    'strides': (1, 2),
    'group_width': (16, 16),
    'stem_width': (16, 16),
    'stem_strides': (2, 1),
  },
}


def shrunk(family, **model):
  module, argument = CONFIGS[family]
  config = module.get_config(argument)
  config.model.update({**SHRUNK[family], **model})
  config.batch_size = 16
  config.compute_dtype = 'float32'
  config.data.image_size = config.data.eval_image_size = 16
  return config


def step_of(config, devices=8, micro_batches=1, learning_rate=0.1):
  """A training step on the first `devices`, and the state before it."""
  net = build.create_net(config, num_classes=10)
  optimizer = build.create_optimizer(config, lambda step: learning_rate)
  state = train_step.init_state(net, optimizer, 0, config.data.image_size)
  step = steps.constant_step(
    config, net, optimizer, micro_batches=micro_batches
  )
  step = jax.pmap(
    step,
    axis_name=parallel.AXIS,
    in_axes=(None, 0),
    out_axes=(None, None),
    devices=jax.devices()[:devices],
  )
  return step, state


def batch_of(config, devices=8):
  rng = np.random.default_rng(0)
  count = config.batch_size
  size = config.data.image_size
  batch = {
    'image': rng.integers(0, 256, (count, size, size, 3), np.uint8),
    'label': rng.integers(0, 10, count, np.int32),
    'mix_label': rng.integers(0, 10, count, np.int32),
    'ratio': rng.random(count, np.float32),
  }
  return jax.tree.map(
    lambda x: x.reshape(devices, count // devices, *x.shape[1:]), batch
  )


@pytest.mark.thorough
@pytest.mark.parametrize(
  'family',
  [
    pytest.param(family, marks=pytest.mark.slow if slow else ())
    for family, slow in {
      'nf_resnet': False,
      'nf_regnet': True,
      'resnet': True,
      'efficientnet': True,
      'batch_norm': True,
    }.items()
  ],
)
def test_recipe_takes_a_shrunk_step(family):
  config = shrunk(family)
  step, state = step_of(config)
  after, metrics = step(state, batch_of(config))
  assert np.isfinite(metrics['loss'])
  moved = [
    float(jnp.abs(new - old).max())
    for old, new in zip(
      jax.tree.leaves(state.params), jax.tree.leaves(after.params), strict=True
    )
  ]
  assert np.isfinite(moved).all() and np.mean(np.array(moved) > 0) > 0.3
  assert parallel.replica_spread(after) == 0
  stateful = family in ('resnet', 'efficientnet', 'batch_norm')
  assert bool(after.model_state) == stateful
  for leaf in jax.tree.leaves(after.model_state):
    assert np.isfinite(leaf).all() and jnp.any(leaf != 0)


def averages(state):
  return {
    f'{module}/{name}': np.asarray(x)
    for module, leaves in state.items()
    for name, x in leaves.items()
    if name == 'average'
  }


@pytest.mark.slow
def test_statistics_of_a_device_are_averaged():
  """Without a shared axis: the mean over devices of each one's statistics."""
  config = shrunk('resnet')
  step, state = step_of(config)
  batch = batch_of(config)
  after, _ = step(state, batch)
  alone, one = step_of(config, devices=1)
  images, labels = batch['image'], batch['label']
  each = [
    averages(alone(one, {'image': x[None], 'label': y[None]})[0].model_state)
    for x, y in zip(images, labels, strict=True)
  ]
  for name, value in averages(after.model_state).items():
    mean = np.mean([x[name] for x in each], axis=0)
    np.testing.assert_allclose(value, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_shared_statistics_make_devices_one():
  """With a shared axis eight devices make the step of one, and not without."""
  results = {}
  for axis in (parallel.AXIS, None):
    config = shrunk('resnet', cross_replica_axis=axis)
    for devices in (1, 8):
      step, state = step_of(config, devices)
      after, metrics = step(state, batch_of(config, devices))
      results[axis, devices] = averages(after.model_state), metrics['grad_norm']
  (one, norm), (eight, eight_norm) = (
    results[parallel.AXIS, devices] for devices in (1, 8)
  )
  for name, value in one.items():
    np.testing.assert_allclose(eight[name], value, rtol=1e-3, atol=1e-4)
  assert float(eight_norm) == pytest.approx(float(norm), rel=1e-3)
  assert float(results[None, 8][1]) != pytest.approx(float(norm), rel=1e-2)


@pytest.mark.thorough
def test_micro_batches_hand_on_the_statistics():
  config = shrunk('resnet')
  step, state = step_of(config, devices=1, micro_batches=4)
  after, _ = step(state, batch_of(config, devices=1))
  counters = [
    leaves['counter']
    for leaves in after.model_state.values()
    if 'counter' in leaves
  ]
  assert counters and all(int(x) == 4 for x in counters)


@pytest.mark.slow
def test_average_of_the_parameters_has_its_own_statistics():
  config = shrunk('resnet')
  config.ema_decay = 0.9
  step, state = step_of(config)
  for _ in range(2):
    state, _ = step(state, batch_of(config))
  raw, average = (
    averages(x) for x in (state.model_state, state.ema_model_state)
  )
  assert raw.keys() == average.keys()
  assert any(np.abs(raw[k] - average[k]).max() > 1e-4 for k in raw)
  config.ema_decay = 0.0  # no average: the same parameters and statistics
  step, state = step_of(config)
  state, _ = step(state, batch_of(config))
  jax.tree.map(
    np.testing.assert_array_equal, state.model_state, state.ema_model_state
  )
  jax.tree.map(np.testing.assert_array_equal, state.params, state.ema_params)


@pytest.mark.slow
@pytest.mark.parametrize('family', CONFIGS)
def test_recipe_learns_digits_by_override(family, tmp_path):
  """The command of the docs: every change is a flag, no code."""
  module, argument = CONFIGS[family]
  name = module.__name__.rsplit('.', maxsplit=1)[1]
  fields = {
    **{f'model.{k}': v for k, v in SHRUNK[family].items()},
    'model.stochdepth_rate': 0.0,
    'model.drop_rate': 0.0,
    'data.name': 'digits',
    'data.prepare': True,
    'data.data_dir': tmp_path / 'data',
    'data.test_split': 'test',
    'data.image_size': 16,
    'data.eval_image_size': 16,
    'data.crop': 'pad_2',
    'data.eval_crop': 'resize',
    'data.flip': False,
    'augment.mixup_alpha': None,
    'augment.cutmix': False,
    'augment.rand_augment': None,
    'batch_size': 64,
    'eval_batch_size': 120,
    'epochs': 12.0,
    'optimizer.warmup_epochs': 1.0,
    'optimizer.learning_rate_per_256': 0.05
    if family == 'efficientnet'
    else 0.4,
    'optimizer.decay_epochs': 0.5,
    'ema_decay': 0.99,
    'compute_dtype': 'float32',
    'eval_every_epochs': 12.0,
  }
  subprocess.run(
    [
      sys.executable,
      '-m',
      'nfnets_jax.main',
      f'--config=experiments/{name}.py:{argument}',
      f'--workdir={tmp_path / "run"}',
      *(f'--config.{field}={value}' for field, value in fields.items()),
    ],
    cwd=pathlib.Path(__file__).parents[1],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''},
    check=True,
  )
  report = json.loads((tmp_path / 'run' / 'report.json').read_text())
  print(family, report['eval_top_1'], report['ema_eval_top_1'])
  assert report['eval_top_1'] > 0.8
  assert report['ema_eval_top_1'] > 0.8
