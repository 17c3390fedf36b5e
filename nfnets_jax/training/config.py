"""The fields of a run, with the paper's values for ImageNet.

The fields are independent: step counts, the peak learning rate etc. are derived
from them. None means off, and for the fields of `DERIVED` that they follow from
the number of training images. An experiment file sets only what differs.

Source: Brock et al. 2021, appendix A.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from nfnets_jax.models import variants

# Fields that may be None until the number of training images is known.
DERIVED = (
  'batch_size',
  'epochs',
  'optimizer.learning_rate_per_256',
  'optimizer.warmup_epochs',
)
# Of the paper's fine-tuning, reached with 300,000 images.
_STEPS, _BATCH_SIZE, _LEARNING_RATE = 15_000, 2048, 0.1
_WARMUP_STEPS = 5_000  # likewise of its pre-training
_MAX_EPOCHS = 100.0


def model(name: str) -> config_dict.ConfigDict:
  """Returns a variant's name and all arguments of its network."""
  # Not `models.arguments`, which imports Haiku: --help and mistakes are fast.
  settings = dataclasses.asdict(variants.get(name).settings)
  arguments = {
    # An option that is None takes a string.
    key: config_dict.placeholder(str) if value is None else value
    for key, value in settings.items()
  }
  return config_dict.ConfigDict({'name': name, **arguments})


def get_config() -> config_dict.ConfigDict:
  """Returns the paper's recipe for ImageNet, with NFNet-F0 as the network.

  Image sizes and RandAugment depend on the variant:
  `experiments/nfnet_imagenet.py` sets them.
  """
  config = config_dict.ConfigDict()

  # Length and size. An epoch is one output image per training example.
  config.epochs = config_dict.placeholder(float)
  config.epochs = 360.0
  config.batch_size = config_dict.placeholder(int)
  config.batch_size = 4096  # over all devices and hosts
  # Does not affect results; the per-device batch must fit in memory.
  config.eval_batch_size = 1024
  # Micro-batches per device, computed sequentially. Their mean gradient is that
  # of the whole batch, except with batch normalisation. None is the fewest that
  # fit in device memory.
  config.micro_batches = config_dict.placeholder(int)
  # Rematerialisation: None stores all activations, 'block' the input of each
  # residual block, 'stage' the input of each stage.
  config.remat = config_dict.placeholder(str)
  config.seed = 0
  # Initial weights, or those to evaluate without training: a file, a run folder
  # or 'released'.
  config.init_from = config_dict.placeholder(str)
  # Whether to reinitialise the classifier: None does unless its class names are
  # those of the data.
  config.init_new_head = config_dict.placeholder(bool)

  config.model = model('nfnet_f0')

  config.data = config_dict.ConfigDict()
  config.data.name = 'imagenet2012'  # a TFDS name, 'folder' or 'fake'
  # None is $TFDS_DATA_DIR or ~/tensorflow_datasets.
  config.data.data_dir = config_dict.placeholder(str)
  config.data.prepare = False  # build the data set if missing
  config.data.train_split = 'train'
  # None, for a folder: its validation or test split; without one, some images
  # are held out, and weights without a run are evaluated on all.
  config.data.test_split = config_dict.placeholder(str)
  config.data.test_split = 'validation'
  # 'FIRST-LAST', counted from 0, or 'present', those with images; None is all.
  config.data.classes = config_dict.placeholder(str)
  config.data.image_size = 224  # pixels
  config.data.eval_image_size = 224
  config.data.crop = 'random_resized'
  config.data.eval_crop = 'resize_crop_32'
  config.data.flip = True
  # Decoding workers: None is one per core; 'threads' or 'processes', None
  # chooses by their number.
  config.data.num_workers = config_dict.placeholder(int)
  config.data.worker_type = config_dict.placeholder(str)
  # Cache decoded images and prepare whole chunks; for few, small images.
  config.data.in_memory = False
  # Corrupt images: stop at the first, or skip, count and list them.
  config.data.skip_corrupt = False

  config.augment = config_dict.ConfigDict()
  # With both, each is applied to half of a batch.
  config.augment.mixup_alpha = config_dict.placeholder(float)
  config.augment.mixup_alpha = 0.2
  config.augment.cutmix = True
  # Such as '4x10' or '4x10@224', with pixel magnitudes for 224-pixel images.
  config.augment.rand_augment = config_dict.placeholder(str)

  config.optimizer = config_dict.ConfigDict()
  config.optimizer.name = 'sgd'  # or 'rmsprop', 'lars', 'adam', 'adamw'
  # Scaled by batch_size / 256.
  config.optimizer.learning_rate_per_256 = config_dict.placeholder(float)
  config.optimizer.learning_rate_per_256 = 0.1
  config.optimizer.warmup_epochs = config_dict.placeholder(float)
  config.optimizer.warmup_epochs = 5.0
  config.optimizer.schedule = 'cosine'  # or 'exponential'
  config.optimizer.end_learning_rate = 0.0  # of 'cosine'; unscaled
  # For 'exponential': multiply by decay_rate every decay_epochs.
  config.optimizer.decay_rate = 0.97
  config.optimizer.decay_epochs = 2.4
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay = 2e-5
  # Regular expression searched in 'module/parameter' for what decays.
  config.optimizer.decayed = '/w$'
  config.optimizer.clip = config_dict.placeholder(str)
  config.optimizer.clip = 'agc'  # or 'global_norm', or None
  config.optimizer.clipping = 0.01  # λ of AGC
  config.optimizer.clip_eps = 1e-3  # ε of AGC
  # Regular expression searched in 'module/parameter' for what AGC excludes,
  # here the classifier's weights. None clips everything.
  config.optimizer.unclipped = config_dict.placeholder(str)
  config.optimizer.unclipped = r'^[^/]+/~/linear/w$'
  config.optimizer.max_norm = 1.0  # of 'global_norm'
  # Maximum consecutive non-finite gradients to skip; 0 stops at the first.
  config.optimizer.skip_nonfinite = 0
  # Learning rate factors: 'PATTERN=FACTOR,...'. The first regular expression
  # found in 'module/parameter' applies; 0 freezes, the default is 1.
  config.optimizer.learning_rate_groups = config_dict.placeholder(str)
  # ρ of sharpness-aware minimisation (None is off), and the fraction of the
  # batch used for the ascent step.
  config.optimizer.sam_rho = config_dict.placeholder(float)
  config.optimizer.sam_fraction = 0.2
  # Each device ascends alone, as in the paper: saves an all-reduce, but the
  # result depends on the number of devices.
  config.optimizer.sam_per_device = False

  config.label_smoothing = 0.1
  # A larger loss counts as divergence and stops the run.
  config.max_loss = config_dict.placeholder(float)
  config.ema_decay = 0.99999  # 0 disables averaging
  config.compute_dtype = 'bfloat16'  # for training
  # For evaluation, as released; 'bfloat16' is faster, but creates ties.
  config.eval_dtype = 'float32'
  # Cache of compiled programs, relative to the run folder; None disables it.
  # Runs that share it share programs across learning rates, clipping thresholds
  # and seeds.
  config.compilation_cache = config_dict.placeholder(str)
  config.compilation_cache = 'compilation_cache'

  config.log_every_steps = 100
  config.eval_every_epochs = 5.0  # more than `epochs`: at the end only
  config.checkpoint_every_epochs = 1.0
  config.keep_checkpoints = 3
  return config


def derive(
  config: config_dict.ConfigDict, num_images: int, devices: int
) -> config_dict.ConfigDict:
  """Returns a copy whose `DERIVED` fields that are None follow from the data.

  They are those of the paper's fine-tuning where there are enough images, from
  some 300,000 on. For fewer they are ours:
    * `batch_size`: 2048, but at most an eighth of the images, rounded down to a
      power of two and then up to a multiple of `devices`.
    * `epochs`: 15,000 steps, but at most 100 epochs.
    * `warmup_epochs`: 5,000 steps, but at most a third of the epochs.
    * `learning_rate_per_256`: a peak of 0.1, but at most 0.1 per 256 images.

  Example:
    >>> config = get_config()
    >>> for field in DERIVED:
    ...   config.update_from_flattened_dict({field: None})
    >>> config = derive(config, num_images=48, devices=1)
    >>> config.batch_size, config.epochs, config.optimizer.warmup_epochs
    (4, 100.0, 33.333333333333336)
    >>> config.optimizer.learning_rate_per_256
    0.1
  """
  config = config.copy_and_resolve_references()
  if config.batch_size is None:
    largest = max(1, min(_BATCH_SIZE, num_images // 8))
    power = 2 ** (largest.bit_length() - 1)
    config.batch_size = -(-power // devices) * devices
  if config.epochs is None:
    config.epochs = min(_MAX_EPOCHS, _STEPS * config.batch_size / num_images)
  if config.optimizer.warmup_epochs is None:
    longest = _WARMUP_STEPS * config.batch_size / num_images
    config.optimizer.warmup_epochs = min(config.epochs / 3, longest)
  if config.optimizer.learning_rate_per_256 is None:
    rate = _LEARNING_RATE * min(1.0, 256 / config.batch_size)
    config.optimizer.learning_rate_per_256 = rate
  return config


def keep_derived(
  config: config_dict.ConfigDict, stored: Mapping[str, Any] | None
) -> config_dict.ConfigDict:
  """Returns a copy with the `DERIVED` fields of a run's `stored` config.

  Only fields that are None change. A run so resumes with other images or
  devices as it began.
  """
  config = config.copy_and_resolve_references()
  if stored is not None:
    for field in DERIVED:
      part, _, name = field.rpartition('.')
      old = stored.get(part, {}) if part else stored
      new = config[part] if part else config
      if new[name] is None:
        new[name] = old.get(name)
  return config
