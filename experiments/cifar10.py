"""A small NFNet on CIFAR-10, in ten minutes on two cores, or in one hour.

Source: the paper's ImageNet recipe, shortened; it has no CIFAR-10.
Command:
  python -m nfnets_jax.main --config=experiments/cifar10.py --workdir=DIR
  python -m nfnets_jax.main --config=experiments/cifar10.py:1h --workdir=DIR
Expected: see docs/results/cifar10.md. 77.5 % in four epochs without
`in_memory`; the one-hour version has not been run.

The epochs are those of 358 images/s without `in_memory` (two idle cores,
2026-11-23), or about 400 with it: 5 · 50,000 / 400 s is 10.4 minutes, and 28
epochs 58. Give --config.epochs for a machine of another speed.
"""

from ml_collections import config_dict

from experiments import arguments
from nfnets_jax.training import config as defaults

_EPOCHS = {'10m': 5.0, '1h': 28.0}


def get_config(length: str = '10m') -> config_dict.ConfigDict:
  """Returns the config of a length, '10m' or '1h'."""
  arguments.check('length', length, _EPOCHS)
  config = defaults.get_config()
  config.epochs = _EPOCHS[length]
  config.batch_size = 64
  config.eval_batch_size = 400

  # Wide groups and few early pixels are fast on CPUs.
  config.model = defaults.model('nfnet_tiny')
  config.model.stem_width = (32,)
  config.model.stem_strides = (2,)
  config.model.width = (64, 128, 256)
  config.model.depth = (1, 1, 1)
  config.model.group_width = (32, 64, 128)
  config.model.drop_rate = 0.0
  config.model.stochdepth_rate = 0.0

  config.data.name = 'cifar10'
  config.data.test_split = 'test'
  config.data.image_size = 32
  config.data.eval_image_size = 32
  config.data.crop = 'pad_4'
  config.data.eval_crop = 'resize'
  config.data.in_memory = True

  # Such a net does not overfit in so few epochs; mixing would only slow it.
  config.augment.mixup_alpha = None
  config.augment.cutmix = False

  config.optimizer.learning_rate_per_256 = 1.0
  config.optimizer.warmup_epochs = config.epochs / 8
  # With the paper's ε = 0.001, SkipInit gains and biases, which start at zero,
  # hardly move in three thousand steps.
  config.optimizer.clipping = 0.1
  config.optimizer.clip_eps = 0.1
  config.optimizer.weight_decay = 5e-4
  config.compute_dtype = 'float32'

  config.log_every_steps = 100
  config.eval_every_epochs = 1.0
  config.checkpoint_every_epochs = 0.5
  return config
