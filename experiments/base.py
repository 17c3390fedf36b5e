"""The fields of a run and the paper's values for ImageNet.

The fields are independent facts: counts of steps, the peak learning rate and
the like follow from them in the loop. None means off. An experiment file
changes what differs and nothing else.

Source: Brock et al. 2021, appendix A.
"""

from ml_collections import config_dict

from nfnets_jax import models


def model(name: str) -> config_dict.ConfigDict:
  """Expands a variant: its name, and every argument of its network."""
  return config_dict.ConfigDict({'name': name, **models.arguments(name)})


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()

  # Length and size. An epoch is one output image per training example.
  config.epochs = 360.0
  config.batch_size = 4096  # over all devices and hosts
  config.eval_batch_size = 4096
  config.seed = 0

  config.model = model('nfnet_f0')

  config.data = config_dict.ConfigDict()
  config.data.name = 'imagenet2012'  # a TFDS data set, or 'fake'
  # None is TFDS's own default, ~/tensorflow_datasets.
  config.data.data_dir = config_dict.placeholder(str)
  config.data.prepare = False  # build the data set if it is not there
  config.data.train_split = 'train'
  config.data.test_split = 'validation'
  config.data.image_size = 224  # pixels
  config.data.eval_image_size = 224
  config.data.crop = 'random_resized'
  config.data.eval_crop = 'resize_crop_32'
  config.data.flip = True
  # Decoding threads; None takes a number that suits the machine.
  config.data.num_threads = config_dict.placeholder(int)

  config.augment = config_dict.ConfigDict()
  # With both, each makes half of a batch.
  config.augment.mixup_alpha = config_dict.placeholder(float)
  config.augment.mixup_alpha = 0.2
  config.augment.cutmix = True
  # Images read for each one made: 2 mixes two fresh ones, 1 mixes within the
  # batch and reads half as much.
  config.augment.raw_per_image = 2
  config.augment.rand_augment = config_dict.placeholder(str)  # such as '4x10'

  config.optimizer = config_dict.ConfigDict()
  config.optimizer.name = 'sgd'  # or 'lars', 'adam', 'adamw'
  config.optimizer.learning_rate_per_256 = 0.1  # scaled by batch_size / 256
  config.optimizer.warmup_epochs = 5.0
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay = 2e-5
  config.optimizer.clip = config_dict.placeholder(str)
  config.optimizer.clip = 'agc'  # or 'global_norm', or None
  config.optimizer.clipping = 0.01  # λ of AGC
  config.optimizer.clip_eps = 1e-3  # ε of AGC
  config.optimizer.max_norm = 1.0  # of 'global_norm'

  config.label_smoothing = 0.1
  config.ema_decay = 0.99999
  config.compute_dtype = 'bfloat16'

  config.log_every_steps = 100
  config.eval_every_epochs = 5.0
  config.checkpoint_every_epochs = 1.0
  config.keep_checkpoints = 3
  return config
