"""The configs of experiments/ are complete and build what they say."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from ml_collections import config_dict

from experiments import base, cifar10, digits, nfnet_imagenet, overfit
from experiments.benchmarks import gradient_step
from nfnets_jax import models
from nfnets_jax.training import train

# The paper's table 1: dropout, training and test size, RandAugment.
TABLE = {
  'F0': (0.2, 192, 256, '4x5'),
  'F1': (0.3, 224, 320, '4x10'),
  'F2': (0.4, 256, 352, '4x10'),
  'F3': (0.4, 320, 416, '4x15'),
  'F4': (0.5, 384, 512, '4x15'),
  'F5': (0.5, 416, 544, '4x15'),
  'F6': (0.5, 448, 576, '4x15'),
  'F7': (0.5, 480, 608, '4x15'),
}


@pytest.mark.parametrize('plus', ['', '+'])
@pytest.mark.parametrize('name', TABLE)
def test_nfnet_imagenet_is_the_paper(name, plus):
  config = nfnet_imagenet.get_config(name + plus)
  assert (
    config.model.drop_rate,
    config.data.image_size,
    config.data.eval_image_size,
    config.augment.rand_augment,
  ) == TABLE[name]
  assert config.model.name == f'nfnet_{name.lower()}{"plus" if plus else ""}'
  assert config.model.stochdepth_rate == 0.25
  assert (config.epochs, config.batch_size) == (360, 4096)
  assert config.data.name == 'imagenet2012'
  assert config.data.eval_crop == 'resize_crop_32'
  assert config.augment.mixup_alpha == 0.2
  assert config.augment.cutmix
  assert config.augment.raw_per_image == 2
  assert config.optimizer.to_dict() == {
    'name': 'sgd',
    'learning_rate_per_256': 0.1,
    'warmup_epochs': 5,
    'momentum': 0.9,
    'weight_decay': 2e-5,
    'clip': 'agc',
    'clipping': 0.01,
    'clip_eps': 1e-3,
    'max_norm': 1.0,
    'skip_nonfinite': 0,
  }
  assert config.label_smoothing == 0.1
  assert config.ema_decay == 0.99999
  assert config.compute_dtype == 'bfloat16'


def test_unknown_variant_lists_the_known():
  with pytest.raises(ValueError, match=r"'nfnet_f9'.*nfnet_f0plus"):
    nfnet_imagenet.get_config('F9')


@pytest.mark.parametrize(
  'config',
  [
    digits.get_config(),
    cifar10.get_config(),
    overfit.get_config(),
    nfnet_imagenet.get_config('F6'),
  ],
  ids=['digits', 'cifar10', 'overfit', 'imagenet'],
)
def test_net_is_built_from_the_config(config):
  net = train.create_net(config, num_classes=10)
  size = config.data.image_size
  images = jax.ShapeDtypeStruct((2, size, size, 3), 'float32')

  def forward(key: jax.Array, images: jax.Array):
    params, state = net.init(key, images, is_training=True)
    return net.apply(params, state, key, images, is_training=True)[0]

  outputs = jax.eval_shape(forward, jax.random.key(0), images)
  assert outputs['logits'].shape == (2, 10)
  # Every argument is written out: none is left for an override to miss.
  assert set(config.model) == {'name', *models.arguments(config.model.name)}


def test_another_name_alone_is_refused():
  config = nfnet_imagenet.get_config('F1')
  config.model.name = 'nfnet_f3'
  with pytest.raises(ValueError, match='called nfnet_f3, but .* of nfnet_f1'):
    train.create_net(config, num_classes=10)
  config.model.drop_rate = 0.1  # a net of one's own may have any name
  train.create_net(config, num_classes=10)


@pytest.mark.slow
def test_bench_compares_the_same_computation():
  results = []
  for released in (False, True):
    step, _ = gradient_step.gradient_step(released, 'nfnet_tiny', 2, 16)
    results.append(step())
  (loss, grads), (expected_loss, expected_grads) = results
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  for ours, released in zip(
    jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True
  ):
    np.testing.assert_allclose(ours, released, atol=1e-5)


def test_every_field_off_is_none_and_can_be_switched():
  config = base.get_config()
  config.lock()
  config.update({'augment': {'mixup_alpha': None, 'rand_augment': '2x5'}})
  config.update({'augment': {'mixup_alpha': 0.3, 'rand_augment': None}})
  config.optimizer.clip = None
  with pytest.raises(AttributeError):
    config.optimizer.clipp = 'agc'
  with pytest.raises(TypeError):
    config.augment.mixup_alpha = 'often'
  assert isinstance(config, config_dict.ConfigDict)


@pytest.mark.slow
def test_full_size_f0_takes_two_steps_on_made_up_images(tmp_path):
  subprocess.run(
    [
      sys.executable,
      '-m',
      'nfnets_jax.main',
      '--config=experiments/nfnet_imagenet.py:F0',
      f'--workdir={tmp_path}',
      '--config.data.name=fake',
      '--config.data.train_split=train[:16]',
      '--config.data.test_split=validation[:8]',
      '--config.batch_size=8',
      '--config.eval_batch_size=8',
      '--config.epochs=1.0',
      '--config.optimizer.warmup_epochs=0.0',
    ],
    check=True,
    env={'PATH': '', 'JAX_PLATFORMS': 'cpu'},
  )
  report = json.loads((tmp_path / 'report.json').read_text())
  assert report['steps'] == 2
  assert report['num_params'] == 71_489_284
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  losses = [json.loads(line).get('loss') for line in lines]
  assert any(loss is not None and 0 < loss < 20 for loss in losses)
