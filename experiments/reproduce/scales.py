"""The three scales at which a claim is run, with nets and recipes for each.

* `small`: CPU. CIFAR-10 at 16 × 16 pixels, 10,240 training images (640 for
  NFNets), nets of 0.04 to 0.5 million parameters. Batch sizes are an eighth of
  the paper's, with the paper's learning rates. The runs are in small_scale.py.
* `gpu`: one accelerator. CIFAR-10 at 32 × 32 pixels, 15 epochs, the paper's
  batch sizes.
* `paper`: ImageNet with the paper's nets, recipes and batch sizes; needs a pod.

A run diverges when its loss exceeds 20 or is not finite, and ends there.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from experiments import nf_resnet_imagenet, resnet_imagenet
from experiments.reproduce import claim
from nfnets_jax.data import imagenet
from nfnets_jax.training import config as defaults

SCALES = ('small', 'gpu', 'paper')
SEEDS = {'gpu': (0, 1), 'paper': (0, 1, 2, 3, 4)}
# λ of AGC, as in figure 2b.
CLIPPINGS = (0.01, 0.02, 0.04, 0.08, 0.16)
# What the paper excludes from AGC; see `unclipped`.
EXCLUDED = 'the classifier (paper)'

_BATCH_SIZES = (256, 512, 1024, 2048, 4096)
_SHRINK = {'small': 8, 'gpu': 1, 'paper': 1}
# Training images, and held-out images for choosing a λ or a threshold.
SPLITS = {
  'small': ('train[:10240]', 'train[48000:]'),
  'gpu': ('train[:48000]', 'train[48000:]'),
  'paper': ('train[10000:]', 'train[:10000]'),
}
# The loss of chance is 2.3 for CIFAR-10 and 6.9 for ImageNet.
MAX_LOSS = 20.0
# Layers of the ResNets, and the seeds of a point that count: at `paper` the
# best four of five, as there.
_DEPTHS = {'small': (20,), 'gpu': (20,), 'paper': (50, 200)}
COUNTED = 4
# Of stochastic depth, for all ResNets at `paper`, with and without batch
# normalization. The paper does not give it; 0.1 is the default of the released
# NF-ResNet, and the released ResNet has none.
STOCHDEPTH_RATE = 0.1
# Pre-training at `paper`, in place of JFT-300M: 1.8 million photographs of 365
# scenes. The sweep's --data_name replaces it.
STAND_IN = 'places365_small'
# Training images, of which splits are taken.
IMAGES = {'imagenet2012': imagenet.SPLITS['train'], STAND_IN: 1_803_460}


def batches(scale: str) -> tuple[int, ...]:
  """Returns the five batch sizes of figure 2 at a scale."""
  return tuple(size // _SHRINK[scale] for size in _BATCH_SIZES)


def depths(scale: str) -> tuple[int, ...]:
  """Returns the layers of the ResNets of figure 2 at a scale."""
  return _DEPTHS[scale]


def at_depth(scale: str, depth: int, batch: int) -> Any:
  """Returns the batch, preceded by the depth where there are several."""
  return batch if len(_DEPTHS[scale]) == 1 else f'{depth} layers, {batch}'


def resnet(
  net: str,
  scale: str,
  batch: int,
  seed: int = 0,
  layers: int | None = None,
  changes: Mapping[str, Any] | None = None,
) -> config_dict.ConfigDict:
  """Returns the config of a ResNet, or of a small net of its form.

  Args:
    net: 'NF', 'NF + AGC' or 'BN'.
    scale: one of `SCALES`.
    batch: batch size.
    seed: of parameters, batches and augmentation.
    layers: of the ResNet; None is 50 at 'paper' and 20 elsewhere.
    changes: values of other fields, by dotted name.

  Returns:
    The config.

  Example:
    >>> resnet('BN', 'paper', 256).model.name
    'resnet50'
  """
  family = resnet_imagenet if net == 'BN' else nf_resnet_imagenet
  config = family.get_config(str(layers or 50))
  config.seed = seed
  config.batch_size = batch
  config.optimizer.clip = 'agc' if 'AGC' in net else None
  config.max_loss = MAX_LOSS
  if scale == 'paper':
    config.model.stochdepth_rate = STOCHDEPTH_RATE
  else:
    _use_cifar10(config, scale)
    config.model.stem_pool = False
  if scale == 'small':
    config.model.depth = (2, 2, 2)
    config.model.width = (32, 64, 128)
    config.model.strides = (1, 2, 2)
    config.model.stem_width = 32
    config.data.test_split = 'test[:4000]'
  elif scale == 'gpu' and layers is None:  # nine runs in four minutes
    config.model.depth = (2, 2, 2)
    config.model.width = (256, 512, 1024)
    config.model.strides = (1, 2, 2)
  if scale != 'paper' and net != 'BN':
    config.model.stochdepth_rate = 0.0
  if scale == 'gpu' and net != 'BN':
    # AGC with the paper's ε hardly moves a zero-initialized gain in so few
    # steps.
    config.model.skipinit = False
  config.update_from_flattened_dict(dict(changes or {}))
  return config


def resnet_run(
  net: str,
  scale: str,
  batch: int,
  seed: int,
  changes: Mapping[str, Any] | None = None,
  labels: Mapping[str, Any] | None = None,
  layers: int | None = None,
) -> claim.Run:
  """Returns a run of `resnet` that is also evaluated on held-out images.

  Claims that ask for the same net and changes share the run, whatever their
  `labels`; None are the layers, the net, the batch, the changes and the seed.
  The layers are those of `depths`, None the first.
  """
  changes = changes or {}
  values = {name.rpartition('.')[2]: x for name, x in changes.items()}
  named = {'net': net, 'batch': batch, **values, 'seed': seed}
  first, *_ = depths(scale)
  if layers in (None, first):
    config = resnet(net, scale, batch, seed, changes=changes)
    labels = labels or {'depth': first, **named}
  else:
    config = resnet(net, scale, batch, seed, layers, changes)
    named = {'depth': layers, **named}
  config.data.train_split, held_out = SPLITS[scale]
  run = claim.Run(claim.run_name(scale, 'resnet', named), named, config)
  return dataclasses.replace(run, held_out=held_out, labels=labels or named)


def clip_changes(
  method: str, threshold: float, scale: str, batch: int
) -> dict[str, Any]:
  """Returns the fields of a way to clip, by dotted name.

  Args:
    method: 'none', 'AGC', 'global norm' or 'LARS'.
    threshold: λ, the largest norm, or the peak learning rate of LARS.
    scale: one of `SCALES`.
    batch: batch size.
  """
  if method == 'AGC':
    return {'optimizer.clipping': threshold}
  if method == 'global norm':
    return {'optimizer.clip': 'global_norm', 'optimizer.max_norm': threshold}
  if method == 'none':
    return {}
  sgd = resnet('NF', scale, batch).optimizer.learning_rate_per_256
  rate = threshold * 256 / batch
  return {
    'optimizer.name': 'lars',
    'optimizer.learning_rate_per_256': rate,
    # Gains and biases have no trust ratio: they keep the rate of SGD.
    'optimizer.learning_rate_groups': f'/w$=1,.={sgd / rate:g}',
  }


def unclipped(scale: str) -> dict[str, str | None]:
  """Returns regular expressions of what AGC may exclude, by label."""
  classifier = defaults.get_config().optimizer.unclipped
  depth = resnet('NF', scale, 1).model.depth
  excluded = {
    EXCLUDED: classifier,
    'nothing': None,
    'and the first convolution': f'{classifier}|/initial_conv/',
  }
  for stage in range(len(depth)):
    indices = range(sum(depth[:stage]), sum(depth[: stage + 1]))
    suffixes = '|'.join('' if i == 0 else f'_{i}' for i in indices)
    excluded[f'and stage {stage + 1}'] = (
      f'{classifier}|/nf_res_block({suffixes})(/|$)'
    )
  excluded[f'all {len(depth)} stages'] = f'{classifier}|/nf_res_block'
  return excluded


def adapt_nfnet(
  config: config_dict.ConfigDict, scale: str, seed: int
) -> config_dict.ConfigDict:
  """Sets the seed of an NFNet for ImageNet and shrinks it to a scale.

  Elsewhere than at 'paper' it becomes a narrow and shallow NFNet for CIFAR-10.
  """
  config.seed = seed
  config.max_loss = MAX_LOSS
  if scale == 'paper':
    return config
  small = scale == 'small'
  _use_cifar10(config, scale)
  if config.augment.rand_augment is not None:
    # F0's magnitude, in pixels of the smaller image; half the layers, for a net
    # that learns far less.
    config.augment.rand_augment = '2x5@224'
  config.batch_size = 64 if small else 256
  shrink = 8 if small else 2
  config.model.width = tuple(x // shrink for x in config.model.width)
  config.model.depth = (1, 1, 2, 1) if small else (1, 2, 6, 3)
  if small:  # 8 × 8 pixels after the stem become 2 × 2
    config.model.strides = (1, 2, 2, 1)
  config.model.group_width = (16 if small else 64,) * 4
  config.model.stem_width = (16, 32) if small else (32, 64)
  config.model.stem_strides = (1, 2)
  config.optimizer.learning_rate_per_256 = 0.4 if small else 0.1
  return config


def halve_width(config: config_dict.ConfigDict) -> None:
  """Halves the width of an NFNet and its first stage's groups."""
  config.model.width = tuple(x // 2 for x in config.model.width)
  # A group is at most as wide as the first stage's bottleneck.
  first, *others = config.model.group_width
  config.model.group_width = (first // 2, *others)


def _use_cifar10(config: config_dict.ConfigDict, scale: str) -> None:
  """Changes an ImageNet config into one for CIFAR-10."""
  small = scale == 'small'
  if not small:  # whose claims set their own
    config.epochs = 15.0
    config.eval_every_epochs = config.checkpoint_every_epochs = config.epochs
  config.eval_batch_size = 500
  config.data.name = 'cifar10'
  config.data.train_split, _ = SPLITS[scale]
  config.data.test_split = 'test'
  config.data.image_size = config.data.eval_image_size = 16 if small else 32
  config.data.crop = 'pad_2' if small else 'pad_4'
  config.data.eval_crop = 'resize'
  config.data.in_memory = True
  config.optimizer.learning_rate_per_256 = 0.1 * _SHRINK[scale]
  config.optimizer.warmup_epochs = 2.0 if small else 5.0
  config.ema_decay = 0.0
  config.compute_dtype = 'float32' if small else 'bfloat16'
  # Batch normalization normalizes over the device's whole batch.
  config.micro_batches = 1
  config.log_every_steps = 20
  config.keep_checkpoints = 1
