import json

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import digits, nfnet_imagenet
from nfnets_jax import models, weights
from nfnets_jax.runtime import workdir
from nfnets_jax.training import recorded


@pytest.mark.parametrize(
  'config', [digits.get_config(), nfnet_imagenet.get_config('F0')]
)
def test_config_of_a_run(config, tmp_path):
  config.init_from = 'F0_haiku.npz'  # the start, not what is evaluated
  config.augment.mixup_alpha = None
  workdir.record(tmp_path, config)
  stored = recorded.config_of_run(tmp_path)
  assert stored.init_from is None
  config.init_from = None
  assert stored.to_dict() == config.to_dict()
  stored.data.data_dir = 'elsewhere'  # fields that are None keep their type
  with pytest.raises(TypeError):
    stored.data.data_dir = 3
  with pytest.raises(AttributeError):
    stored.size = 3


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'colour': 3}, 'config.json is corrupt, or of another .*colour'),
    ({'epochs': 'many'}, 'config.json is corrupt, or of another .*epochs'),
    ({'model': {'name': 'nfnet_f9'}}, "unknown model 'nfnet_f9'"),
    ({'model': 3}, 'config.json is corrupt'),
    (None, 'config.json is corrupt'),
  ],
)
def test_config_that_cannot_be_read(tmp_path, change, message):
  workdir.record(tmp_path, digits.get_config())
  file = tmp_path / 'config.json'
  stored = json.loads(file.read_text())
  file.write_text('{' if change is None else json.dumps({**stored, **change}))
  with pytest.raises(ValueError, match=message):
    recorded.config_of_run(tmp_path)


def test_no_run(tmp_path):
  with pytest.raises(FileNotFoundError, match='no run to evaluate .*; train'):
    recorded.config_of_run(tmp_path)
  assert not any(tmp_path.iterdir())


def _write_weights(path, **facts):
  overrides = {'width': (64,), 'depth': (1,), 'strides': (1,)}
  overrides |= {'group_width': (16,), 'stem_width': (32,), 'stem_strides': (2,)}

  def forward(images):
    net = models.create('nfnet_tiny', 3, **overrides)
    return net(images, is_training=False)

  net = hk.transform_with_state(forward)
  shapes, _ = jax.eval_shape(
    net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))
  )
  params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
  loaded = weights.Weights('nfnet_tiny', params, {}, overrides, **facts)
  weights.write(path, loaded)
  return overrides


def test_config_of_weights(tmp_path):
  path = tmp_path / 'tiny.safetensors'
  facts = {'image_size': 24, 'crop': 'resize', 'class_names': ('a', 'b', 'c')}
  overrides = _write_weights(path, **facts)
  config = recorded.config_of_weights(str(path))
  assert config.init_from == str(path)
  assert (config.data.eval_image_size, config.data.eval_crop) == (24, 'resize')
  model = config.model.to_dict()
  assert model == {**models.arguments('nfnet_tiny'), **overrides} | {
    'name': 'nfnet_tiny'
  }


def test_config_of_weights_that_record_nothing(tmp_path):
  path = tmp_path / 'tiny.npz'
  _write_weights(path)
  config = recorded.config_of_weights(str(path))
  assert config.data.eval_image_size == 32
  assert config.data.eval_crop == 'resize_crop_32'
  assert config.data.test_split is None
  with pytest.raises(ValueError, match='released weights need the name'):
    recorded.config_of_weights('released')
