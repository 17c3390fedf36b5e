"""A small NFNet on handwritten digits, as a quick test of the installation.

Source: scikit-learn's 1,797 images of 8×8 pixels; every fifth is for testing.
Command: make train
Expected: above 98 % top-1 in about two minutes on two cores; see
docs/results/cifar10.md.
"""

from ml_collections import config_dict

from nfnets_jax.training import config as defaults


def get_config() -> config_dict.ConfigDict:
  config = defaults.get_config()
  config.epochs = 40.0
  config.batch_size = 64
  config.eval_batch_size = 128
  config.model = defaults.model('nfnet_tiny')

  config.data.name = 'digits'
  config.data.prepare = True
  config.data.test_split = 'test'
  config.data.image_size = 16
  config.data.eval_image_size = 16
  config.data.crop = 'pad_2'
  config.data.eval_crop = 'resize'
  config.data.flip = False  # a mirrored 2 is not a digit
  config.data.in_memory = True

  # Nine hundred steps are few, so a high learning rate, and λ and ε with which
  # biases and SkipInit gains, which start at zero, can grow in time.
  config.optimizer.learning_rate_per_256 = 1.0
  config.optimizer.clipping = 0.1
  config.optimizer.clip_eps = 0.1
  config.optimizer.weight_decay = 5e-4
  config.compute_dtype = 'float32'

  config.log_every_steps = 20
  config.eval_every_epochs = 5.0
  config.checkpoint_every_epochs = 5.0
  return config
