"""A small NFNet overfits 256 photographs, as a test of pipeline and training.

Each photograph is of a different class of ImageNet. Augmentation and
regularisation are off, so a net that does not fit them all has a bug, such as
mismatched labels or missing gradients.

Command: make imagenet IMAGENET_DIR=DIR with the tars of a sample, then
  python -m nfnets_jax.main --config=experiments/overfit.py --workdir=DIR
Expected: training accuracy above 90 % in about two minutes on two cores; see
docs/results/rehearsals.md.
"""

from ml_collections import config_dict

from nfnets_jax.training import config as defaults


def get_config() -> config_dict.ConfigDict:
  config = defaults.get_config()
  config.epochs = 60.0
  config.batch_size = 32
  config.eval_batch_size = 64

  config.model = defaults.model('nfnet_tiny')
  config.model.stem_width = (16, 32)
  config.model.stem_strides = (2, 2)
  config.model.strides = (2, 2, 2)
  config.model.depth = (1, 1, 1)
  config.model.drop_rate = 0.0
  config.model.stochdepth_rate = 0.0

  config.data.train_split = 'train[:256]'
  config.data.test_split = 'train[:256]'  # the same images
  config.data.image_size = 128
  config.data.eval_image_size = 128
  config.data.crop = 'none'
  config.data.eval_crop = 'resize'
  config.data.flip = False

  config.augment.mixup_alpha = None
  config.augment.cutmix = False
  config.augment.rand_augment = None

  config.optimizer.learning_rate_per_256 = 2.0
  # As in digits.py, for few steps.
  config.optimizer.clipping = 0.1
  config.optimizer.clip_eps = 0.1
  config.optimizer.weight_decay = 0.0
  config.label_smoothing = 0.0
  config.compute_dtype = 'float32'

  config.log_every_steps = 8
  config.eval_every_epochs = 10.0
  config.checkpoint_every_epochs = 20.0
  return config
