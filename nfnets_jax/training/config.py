"""The fields of a run and the paper's values for ImageNet.

The fields are independent facts: counts of steps, the peak learning rate and
the like follow from them in the loop. None means off. An experiment file
changes what differs and nothing else.

Source: Brock et al. 2021, appendix A.
"""

from ml_collections import config_dict

from nfnets_jax import models, paths
from nfnets_jax.data import loader as loaders
from nfnets_jax.data import transforms
from nfnets_jax.runtime import parallel
from nfnets_jax.training import build, fit, sam, train_step


def model(name: str) -> config_dict.ConfigDict:
  """Returns the name of a variant and every argument of its network."""
  arguments = {
    # All that a net can be told and is off is called by a name.
    key: config_dict.placeholder(str) if value is None else value
    for key, value in models.arguments(name).items()
  }
  return config_dict.ConfigDict({'name': name, **arguments})


def get_config() -> config_dict.ConfigDict:
  """Returns the paper's config for NFNet-F0 on ImageNet."""
  config = config_dict.ConfigDict()

  # Length and size. An epoch is one output image per training example.
  config.epochs = 360.0
  config.batch_size = 4096  # over all devices and hosts
  # The result does not depend on it; one device must hold its share.
  config.eval_batch_size = 1024
  # Parts that each device's share of a batch is computed in, one after the
  # other; their mean gradient is the whole batch's, but for a net with batch
  # normalisation. None takes the fewest that fit into the device's memory.
  config.micro_batches = config_dict.placeholder(int)
  # What the forward pass keeps for the backward pass: None keeps all, 'block'
  # the input of each residual block, 'stage' the input of each stage; the rest
  # is computed again.
  config.remat = config_dict.placeholder(str)
  config.seed = 0
  # Where the weights are at the start, or in an evaluation without training: a
  # file, the folder of a run, or 'released'. The classifier is new if there is
  # another number of classes, or if it is to be; else it is kept.
  config.init_from = config_dict.placeholder(str)
  config.init_new_head = False

  config.model = model('nfnet_f0')

  config.data = config_dict.ConfigDict()
  config.data.name = 'imagenet2012'  # of TFDS, 'folder' or 'fake'
  # None is $TFDS_DATA_DIR, or ~/tensorflow_datasets.
  config.data.data_dir = config_dict.placeholder(str)
  config.data.prepare = False  # build the data set if it is not there
  config.data.train_split = 'train'
  config.data.test_split = 'validation'
  # Which classes: 'FIRST-LAST', counted from 0; None is all.
  config.data.classes = config_dict.placeholder(str)
  config.data.image_size = 224  # pixels
  config.data.eval_image_size = 224
  config.data.crop = 'random_resized'
  config.data.eval_crop = 'resize_crop_32'
  config.data.flip = True
  # What decodes: as many workers as there are cores, if None; 'threads' or
  # 'processes', if None by their number.
  config.data.num_workers = config_dict.placeholder(int)
  config.data.worker_type = config_dict.placeholder(str)
  # Whether images stay in memory once they were decoded, and are prepared in
  # whole chunks: for many epochs of few and small ones.
  config.data.in_memory = False
  # Damaged images: stop and name the first, or leave out, count and name all.
  config.data.skip_corrupt = False

  config.augment = config_dict.ConfigDict()
  # With both, each makes half of a batch.
  config.augment.mixup_alpha = config_dict.placeholder(float)
  config.augment.mixup_alpha = 0.2
  config.augment.cutmix = True
  # Such as '4x10', or '4x10@224', where what is in pixels is for images of 224.
  config.augment.rand_augment = config_dict.placeholder(str)

  config.optimizer = config_dict.ConfigDict()
  config.optimizer.name = 'sgd'  # or 'rmsprop', 'lars', 'adam', 'adamw'
  config.optimizer.learning_rate_per_256 = 0.1  # scaled by batch_size / 256
  config.optimizer.warmup_epochs = 5.0
  config.optimizer.schedule = 'cosine'  # or 'exponential'
  config.optimizer.end_learning_rate = 0.0  # of 'cosine'; not scaled
  # Of 'exponential': times decay_rate every decay_epochs.
  config.optimizer.decay_rate = 0.97
  config.optimizer.decay_epochs = 2.4
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay = 2e-5
  config.optimizer.clip = config_dict.placeholder(str)
  config.optimizer.clip = 'agc'  # or 'global_norm', or None
  config.optimizer.clipping = 0.01  # λ of AGC
  config.optimizer.clip_eps = 1e-3  # ε of AGC
  # What AGC leaves alone: a regular expression that is searched for in
  # 'module/parameter'; here the classifier's weights. None clips everything.
  config.optimizer.unclipped = config_dict.placeholder(str)
  config.optimizer.unclipped = r'^[^/]+/~/linear/w$'
  config.optimizer.max_norm = 1.0  # of 'global_norm'
  # Steps in a row whose gradient may be infinite or no number: they are left
  # out and counted. 0 stops at the first.
  config.optimizer.skip_nonfinite = 0
  # Factors of the learning rate of some parameters: 'PATTERN=FACTOR,...'. The
  # first regular expression that is found in 'module/parameter' counts; 0
  # freezes, and what none is found in has 1.
  config.optimizer.learning_rate_groups = config_dict.placeholder(str)
  # ρ of sharpness-aware minimisation, and the part of each device's images that
  # the step up is taken with; None is off.
  config.optimizer.sam_rho = config_dict.placeholder(float)
  config.optimizer.sam_fraction = 0.2

  config.label_smoothing = 0.1
  # The loss of a step above which a run has diverged and is stopped.
  config.max_loss = config_dict.placeholder(float)
  config.ema_decay = 0.99999  # 0 is no average
  config.compute_dtype = 'bfloat16'  # of the training
  # Of the evaluation, as released; 'bfloat16' is faster, but makes many logits
  # equal.
  config.eval_dtype = 'float32'
  # Where compiled programs are kept, in the run's folder or elsewhere; None
  # compiles anew each time. Runs that share a folder share programs, whatever
  # their learning rate, thresholds of clipping and seed.
  config.compilation_cache = config_dict.placeholder(str)
  config.compilation_cache = 'compilation_cache'

  config.log_every_steps = 100
  config.eval_every_epochs = 5.0
  config.checkpoint_every_epochs = 1.0
  config.keep_checkpoints = 3
  return config


def check(config: config_dict.ConfigDict, devices: int) -> None:
  """Checks what can be checked before data are read and weights are drawn.

  Args:
    config: of the run.
    devices: of all processes.

  Raises:
    ValueError: for a name that is not known, or if the batches cannot be split
      so.
  """
  build.create_optimizer(config, lambda step: 0.0)
  data = config.data
  if not 0 <= config.seed < 2**32:
    raise ValueError(f'seed {config.seed} is not in [0, 2^32)')
  for name in ('image_size', 'eval_image_size'):
    if data[name] < 1:
      raise ValueError(f'data.{name} must be at least 1, got {data[name]}')
  loaders.check_workers(data.num_workers, data.worker_type)
  if config.optimizer.sam_rho is not None:
    sam.check_fraction(config.optimizer.sam_fraction)
  build.create_transform(config)
  transforms.eval_transform(data.eval_image_size, data.eval_crop)
  if config.compilation_cache:
    paths.expand_literal(config.compilation_cache, 'config.compilation_cache')
  for name in ('compute_dtype', 'eval_dtype'):
    if config[name] not in train_step.DTYPES:
      raise ValueError(
        f'{name} is {config[name]!r}; choose one of '
        + ', '.join(train_step.DTYPES)
      )
  for name in ('batch_size', 'eval_batch_size'):
    if config[name] < 1 or config[name] % devices:
      raise ValueError(
        f'{name} {config[name]} is not divisible by {devices} devices; use a '
        f'positive multiple of {devices}'
      )
  if config.keep_checkpoints < 1:
    raise ValueError(
      f'keep_checkpoints must be at least 1, got {config.keep_checkpoints}'
    )
  axis = config.model.get('cross_replica_axis')
  if axis not in (None, parallel.AXIS):
    raise ValueError(
      f'model.cross_replica_axis is {axis!r}; the devices are {parallel.AXIS!r}'
    )
  share = config.batch_size // devices
  count = config.micro_batches
  valid = fit.valid_micro_batches(share)
  if count is not None and count not in valid:
    below = [x for x in valid if x < count][-1:]
    nearest = below + [x for x in valid if x > count][:1]
    raise ValueError(
      f'micro_batches {count} does not split the {share} images of each of '
      f'{devices} devices into equal parts; use '
      f'{" or ".join(map(str, nearest))}'
    )
