"""A small NFNet on CIFAR-10, in ten minutes on two cores, or in one hour.

Source: the paper's ImageNet recipe, shortened; it has no CIFAR-10.
Command:
  export XLA_FLAGS='--xla_force_host_platform_device_count=2
    --xla_cpu_multi_thread_eigen=false'
  python -m nfnets_jax.main --config=experiments/cifar10.py --workdir=DIR
  python -m nfnets_jax.main --config=experiments/cifar10.py:1h --workdir=DIR
Expected: 81.8 % (EMA 81.6 %), and in one hour 87.3 % (EMA 87.6 %); see
  docs/results/cifar10.md.

The flags make each core a device, which is faster than two threads on one
device. Give --config.epochs for a machine of another speed.
"""

from ml_collections import config_dict

from experiments import arguments
from nfnets_jax.training import config as defaults

# Epochs, and epochs between evaluations.
_LENGTHS = {'10m': (6.0, 1.5), '1h': (35.0, 5.0)}


def get_config(length: str = '10m') -> config_dict.ConfigDict:
  """Returns the config of a length, '10m' or '1h'."""
  arguments.check('length', length, _LENGTHS)
  config = defaults.get_config()
  config.epochs, config.eval_every_epochs = _LENGTHS[length]
  config.batch_size = 64
  config.eval_batch_size = 400

  # Wide groups and few early pixels are fast on CPUs. The first stage, rather
  # than the stem, halves the resolution: 2.2 points more after two epochs.
  config.model = defaults.model('nfnet_tiny')
  config.model.stem_width = (32,)
  config.model.stem_strides = (1,)
  config.model.strides = (2, 2, 2)
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

  config.optimizer.learning_rate_per_256 = 0.5
  config.optimizer.warmup_epochs = config.epochs / 8
  # With the paper's ε = 0.001, SkipInit gains and biases, which start at zero,
  # hardly move in a few thousand steps.
  config.optimizer.clipping = 0.1
  config.optimizer.clip_eps = 0.1
  config.optimizer.weight_decay = 5e-4
  config.compute_dtype = 'float32'

  config.log_every_steps = 100
  config.checkpoint_every_epochs = 1.0
  return config
