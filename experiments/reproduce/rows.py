"""What is run for each claim of the paper, at each scale.

A row is a claim; a run is one training of it, a name and a config. The scales:

* `small`: CPU, small nets on a part of CIFAR-10;
* `gpu`: one accelerator, CIFAR-10;
* `paper`: the paper's nets, data and batches, for those who have a pod.

Source: Brock et al. 2021, https://arxiv.org/abs/2102.06171; for `microbatch`
Brock, De and Smith 2021, https://arxiv.org/abs/2101.08692.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from experiments import (
  ablation_imagenet,
  nf_resnet_imagenet,
  nfnet_imagenet,
  resnet_imagenet,
)
from experiments.reproduce import paper
from experiments.reproduce.results import Results
from nfnets_jax.runtime import workdir as workdirs
from nfnets_jax.training import config as defaults

SCALES = ('small', 'gpu', 'paper')


@dataclasses.dataclass(frozen=True)
class Run:
  """One training.

  Attributes:
    name: of its folder; two rows that ask for the same run share it.
    labels: what a report groups by, such as `net`, `batch` and `seed`.
    config: of the training.
    after: name of the run whose weights it begins with, or None.
    held_out: a split to evaluate too, to choose by; None is none.
  """

  name: str
  labels: Mapping[str, Any]
  config: config_dict.ConfigDict
  after: str | None = None
  held_out: str | None = None


def fingerprint(run: Run, results: Results) -> str:
  """Returns what tells two runs of one name apart, such as another config.

  Args:
    run: of a row.
    results: in which that of the run it begins with is looked up.

  Returns:
    Eight hexadecimal digits. Where the data and the workers are does not count,
    nor do the defaults of `training/config.py`: a new option that is off makes
    no run anew.
  """
  name = run.config.model.name
  usual = defaults.get_config()
  usual.model = defaults.model(name)
  difference = workdirs.changes(usual.to_dict(), run.config.to_dict())
  fields = {key: new for key, (_, new) in difference.items()}
  before = results.get(run.after) if run.after else None
  text = json.dumps(
    [name, fields, run.held_out, before and before['fingerprint']]
  )
  return f'{zlib.crc32(text.encode()):08x}'


def find(run: Run, results: Results) -> Mapping[str, Any] | None:
  """Returns a run's result, or None where it is missing or another config's."""
  result = results.get(run.name)
  if result is None or result['fingerprint'] != fingerprint(run, results):
    return None
  return result


@dataclasses.dataclass(frozen=True)
class Row:
  """One claim.

  Attributes:
    name: of the row.
    claim: what the paper says.
    source: where.
    runs: scale and the results so far → the runs that can be told by now; what
      is chosen by results comes when they are there.
    axes: labels that the report draws: the one along x, and the one by colour.
    panels: the label that it has a panel for each value of, or None.
  """

  name: str
  claim: str
  source: str
  runs: Callable[[str, Results], list[Run]]
  axes: tuple[str, str]
  panels: str | None = None


# What a batch size of the paper is at each scale: an eighth of it at `small`,
# with the learning rate of the whole, so that the same rates meet.
_SHRINK = {'small': 8, 'gpu': 1, 'paper': 1}
_EPOCHS = {'small': 8.0, 'gpu': 15.0}
_SEEDS = {'small': (0, 1), 'gpu': (0, 1), 'paper': (0, 1, 2, 3, 4)}
_CLIPPINGS = (0.01, 0.02, 0.04, 0.08, 0.16)
# Images to train on and, of the same split, to choose by.
_SPLITS = {
  'small': ('train[:10240]', 'train[48000:]'),
  'gpu': ('train[:48000]', 'train[48000:]'),
  'paper': ('train[10000:]', 'train[:10000]'),
}
# A step whose loss is above it has diverged: that of chance is 2.3 or 6.9.
_MAX_LOSS = 20.0


def resnet(
  net: str,
  scale: str,
  batch: int,
  seed: int = 0,
  layers: int | None = None,
  **changes: Any,
) -> config_dict.ConfigDict:
  """Returns the config of a ResNet, or of a small net of its form.

  Args:
    net: 'NF', 'NF + AGC' or 'BN'.
    scale: one of `SCALES`.
    batch: size of the batch.
    seed: of parameters, batches and augmentation.
    layers: of the ResNet; by default 50 at 'paper', and 20 elsewhere or what
      `changes` say.
    **changes: fields, with '__' for the dot.

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
  config.max_loss = _MAX_LOSS
  if scale != 'paper':
    _on_cifar10(config, scale)
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
    # In so few steps what starts at zero hardly moves under the paper's ε.
    config.model.skipinit = False
  config.update_from_flattened_dict(
    {field.replace('__', '.'): value for field, value in changes.items()}
  )
  return config


def _on_cifar10(config: config_dict.ConfigDict, scale: str) -> None:
  """Turns an ImageNet config into one for CIFAR-10."""
  small = scale == 'small'
  _train_for(config, _EPOCHS[scale])
  config.max_loss = _MAX_LOSS
  config.eval_batch_size = 500
  config.data.name = 'cifar10'
  config.data.train_split, _ = _SPLITS[scale]
  config.data.test_split = 'test'
  # At half the resolution four times as many images can be afforded.
  config.data.image_size = config.data.eval_image_size = 16 if small else 32
  config.data.crop = 'pad_2' if small else 'pad_4'
  config.data.eval_crop = 'resize'
  config.data.in_memory = True
  config.optimizer.learning_rate_per_256 = 0.1 * _SHRINK[scale]
  config.optimizer.warmup_epochs = 2.0 if small else 5.0
  config.ema_decay = 0.0
  config.compute_dtype = 'float32' if small else 'bfloat16'
  # Statistics of batch normalisation are those of the batch, on any device.
  config.micro_batches = 1
  config.log_every_steps = 20
  config.keep_checkpoints = 1


def _train_for(config: config_dict.ConfigDict, epochs: float) -> None:
  """Sets the length, at whose end the run is saved and evaluated."""
  config.epochs = epochs
  config.eval_every_epochs = config.checkpoint_every_epochs = epochs


def batches(scale: str) -> tuple[int, ...]:
  """Returns the five batch sizes of figure 2 at a scale."""
  return tuple(size // _SHRINK[scale] for size in paper.BATCH_SIZES)


def _run(scale: str, net: str, batch: int, seed: int, **changes: Any) -> Run:
  """A training of `resnet`, to be chosen by what is held out."""
  told = {field.rpartition('__')[2]: x for field, x in changes.items()}
  labels = {'net': net, 'batch': batch, **told, 'seed': seed}
  config = resnet(net, scale, batch, seed, **changes)
  config.data.train_split, held_out = _SPLITS[scale]
  name = '/'.join([scale, 'resnet', _folder(labels)])
  return Run(name, labels, config, held_out=held_out)


def _folder(labels: Mapping[str, Any]) -> str:
  def written(value: Any) -> str:
    text = f'{value:g}' if isinstance(value, float) else str(value)
    kept = [c if c.isalnum() or c in '.-' else '_' for c in text]
    return ''.join(kept)

  return ','.join(f'{k}={written(v)}' for k, v in labels.items())


def _ranked(runs: Sequence[Run], results: Results) -> list[Run]:
  """Returns them from the best by what is held out to the worst.

  None at all as long as one of them is not there.
  """
  scores = {}
  for run in runs:
    result = find(run, results)
    if result is None:
      return []
    scores[run.name] = result.get('held_out_top_1') or 0.0
  return sorted(runs, key=lambda run: -scores[run.name])


def _batch_size(scale: str, results: Results) -> list[Run]:
  """AGC at the λ that does best on held-out images with the first seed.

  Every other λ of `clipping`, for the time that all would take.
  """
  first, *others = _SEEDS[scale]
  runs = []
  for batch in batches(scale):
    for net in ('NF', 'BN'):
      runs += [_run(scale, net, batch, seed) for seed in _SEEDS[scale]]
    sweep = [
      _run(scale, 'NF + AGC', batch, first, optimizer__clipping=clipping)
      for clipping in _CLIPPINGS[::2]
    ]
    best = next(iter(_ranked(sweep, results)), None)
    # The others serve to choose: only the chosen one is drawn.
    runs += [
      run
      if best is None or run is best
      else dataclasses.replace(run, labels={**run.labels, 'part': 0})
      for run in sweep
    ]
    if best is not None:
      clipping = best.config.optimizer.clipping
      runs += [
        _run(scale, 'NF + AGC', batch, seed, optimizer__clipping=clipping)
        for seed in others
      ]
  return runs


def _clipping(scale: str, results: Results) -> list[Run]:
  del results
  return [
    _run(scale, 'NF + AGC', batch, seed, optimizer__clipping=clipping)
    for batch in batches(scale)
    for clipping in _CLIPPINGS
    for seed in _SEEDS[scale][:1]
  ]


_METHODS: Mapping[str, tuple[float, ...]] = {
  'none': (0.0,),
  'AGC': _CLIPPINGS[::2],
  'global norm': (0.1, 0.3, 1.0, 3.0, 10.0),
  'LARS': (1.0, 3.0, 10.0, 30.0),
}


def _clip_methods(scale: str, results: Results) -> list[Run]:
  """Thresholds of each method at a middling and the largest batch.

  One seed for all, the others for what does best on held-out images. What is
  called a threshold is, of LARS, its learning rate at the peak. LARS with AGC
  comes last, with AGC's best λ, at the two rates at which LARS alone does best.
  """
  first, *others = _SEEDS[scale]
  runs = []
  for batch in (batches(scale)[2], batches(scale)[4]):
    best: dict[str, list[float]] = {}  # thresholds, from the best on
    clipping = None
    for method in (*_METHODS, 'LARS + AGC'):
      if method in _METHODS:
        thresholds = _METHODS[method]
      elif best['LARS'] and best['AGC']:
        thresholds, clipping = tuple(best['LARS'][:2]), best['AGC'][0]
      else:
        continue
      sweep = [
        _method(scale, method, x, batch, first, clipping) for x in thresholds
      ]
      runs += sweep
      best[method] = [x.labels['threshold'] for x in _ranked(sweep, results)]
      runs += [
        _method(scale, method, x, batch, seed, clipping)
        for x in best[method][:1]
        for seed in others
      ]
  return runs


def _method(
  scale: str,
  method: str,
  threshold: float,
  batch: int,
  seed: int,
  clipping: float | None,
) -> Run:
  """A run of `_clip_methods`; `clipping` is AGC's λ beside LARS."""
  net = 'NF + AGC' if 'AGC' in method else 'NF'
  sgd = resnet(net, scale, batch).optimizer.learning_rate_per_256
  changes: dict[str, Any] = {}
  if method == 'AGC':
    changes = {'optimizer__clipping': threshold}
  elif method == 'global norm':
    changes = {
      'optimizer__clip': 'global_norm',
      'optimizer__max_norm': threshold,
    }
  elif 'LARS' in method:
    rate = threshold * 256 / batch
    changes = {
      'optimizer__name': 'lars',
      'optimizer__learning_rate_per_256': rate,
      # Gains and biases, which have no trust ratio, keep the rate of SGD.
      'optimizer__learning_rate_groups': f'/w$=1,.={sgd / rate:g}',
    }
    if method == 'LARS + AGC':
      changes['optimizer__clipping'] = clipping
  run = _run(scale, net, batch, seed, **changes)
  labels = {'method': method, 'threshold': threshold, 'batch': batch}
  return dataclasses.replace(run, labels={**labels, 'seed': seed})


def _clip_layers(scale: str, results: Results) -> list[Run]:
  """At the largest batch: what is left out of AGC."""
  del results
  batch, classifier = (
    batches(scale)[4],
    defaults.get_config().optimizer.unclipped,
  )
  depth = resnet('NF', scale, batch).model.depth
  left_out: dict[str, str | None] = {
    'the classifier (paper)': classifier,
    'nothing': None,
    'and the first convolution': f'{classifier}|/initial_conv/',
  }
  for stage in range(len(depth)):
    numbers = range(sum(depth[:stage]), sum(depth[: stage + 1]))
    ends = '|'.join('' if i == 0 else f'_{i}' for i in numbers)
    left_out[f'and stage {stage + 1}'] = (
      f'{classifier}|/nf_res_block({ends})(/|$)'
    )
  left_out[f'all {len(depth)} stages'] = f'{classifier}|/nf_res_block'
  runs = []
  for what, unclipped in left_out.items():
    # The differences are small: one seed more, where there are two.
    for seed in (0, 1, 2):
      run = _run(scale, 'NF + AGC', batch, seed, optimizer__clipping=0.01)
      if unclipped != classifier:
        run.config.optimizer.unclipped = unclipped
        name = '/'.join([scale, 'clip-layers', _folder({'unclipped': what})])
        run = dataclasses.replace(
          run, name=f'{name},seed={seed}', held_out=None
        )
      labels = {'unclipped': what, 'batch': batch, 'seed': seed}
      runs.append(dataclasses.replace(run, labels=labels))
  return runs


def _ablation(scale: str, results: Results) -> list[Run]:
  """Each row adds to the one before; MixUp alone makes the whole batch."""
  del results
  variants = ('F0', 'F1', 'F2', 'F3') if scale == 'paper' else ('F0',)
  seeds = (0, 1, 2) if scale == 'paper' else _SEEDS[scale]
  runs = []
  for variant in variants:
    for row in ablation_imagenet.ROWS:
      for seed in seeds:
        config = ablation_imagenet.get_config(f'{variant},{row}')
        config.seed = seed
        config.max_loss = _MAX_LOSS
        if scale != 'paper':
          _shrink_nfnet(config, scale)
          config.model.drop_rate = config.model.stochdepth_rate = 0.0
        if scale == 'small':
          _on_few_images(config)
        labels = {'row': row, 'net': variant, 'seed': seed}
        name = '/'.join([scale, 'ablation', _folder(labels)])
        runs.append(Run(name, labels, config))
  return runs


def _shrink_nfnet(config: config_dict.ConfigDict, scale: str) -> None:
  """Makes a narrow and shallow NFNet for CIFAR-10."""
  small = scale == 'small'
  _on_cifar10(config, scale)
  if config.augment.rand_augment is not None:
    # F0's own magnitude, with its pixels shrunk as the image is; half the
    # layers, for a net that learns far less.
    config.augment.rand_augment = '2x5@224'
  config.batch_size = 64 if small else 256
  shrink = 8 if small else 2
  config.model.width = tuple(x // shrink for x in config.model.width)
  config.model.depth = (1, 1, 2, 1) if small else (1, 2, 6, 3)
  if small:  # of 8 × 8 pixels after the stem the last stage has 2 × 2
    config.model.strides = (1, 2, 2, 1)
  config.model.group_width = (16 if small else 64,) * 4
  config.model.stem_width = (16, 32) if small else (32, 64)
  config.model.stem_strides = (1, 2)
  config.optimizer.learning_rate_per_256 = 0.4 if small else 0.1
  config.optimizer.clip_eps = 0.1 if small else 1e-3
  config.optimizer.clipping = 0.1 if small else 0.01


def _on_few_images(config: config_dict.ConfigDict) -> None:
  """So few, seen so often, that what holds against overfitting may show."""
  config.data.train_split = 'train[:2560]'
  _train_for(config, 20.0)


def _transfer(scale: str, results: Results) -> list[Run]:
  """Pre-trained on half of the classes, fine-tuned on the others.

  The paper's data for pre-training, JFT-300M, are not to be had.
  """
  del results
  # Blocks of each stage at `small`, and layers.
  sizes: dict[str, Sequence[Any]] = {
    'small': ((1, 1, 1), (2, 2, 2), (4, 4, 4)),
    'gpu': (50, 101),
    'paper': (50, 101, 152, 200),
  }
  # Classes and images of the pre-training, and of what follows: at `paper` all
  # there are, elsewhere few, some tenth, as fine-tuning has.
  parts = {
    'small': (('0-4', 'train[:20480]'), ('5-9', 'train[40000:42048]')),
    'gpu': (('0-4', 'train[:43000]'), ('5-9', 'train[43000:48000]')),
    'paper': (('0-499', 'train'), ('500-999', 'train')),
  }[scale]
  runs = []
  for size in sizes[scale]:
    for net in ('NF', 'BN'):
      for seed in _SEEDS[scale][:2]:
        batch = batches(scale)[2]
        if scale == 'small':
          config = resnet(net, scale, batch, seed, model__depth=size)
          layers = 2 + 3 * sum(size)
        else:
          config = resnet(net, scale, batch, seed, size)
          layers = size
        if scale != 'paper':
          config.data.test_split = 'test'
        (config.data.classes, config.data.train_split), then = parts
        config.optimizer.weight_decay = 1e-5
        labels = {'depth': layers, 'net': net, 'seed': seed}
        folder = '/'.join([scale, 'transfer', _folder(labels)])
        before = Run(f'{folder}/pre-training', {**labels, 'part': 0}, config)
        runs.append(before)
        for told, name, after in (
          ('pre-trained', 'from-it', before.name),
          ('from scratch', 'from-scratch', None),
        ):
          tuned = config.copy_and_resolve_references()
          tuned.data.classes, tuned.data.train_split = then
          tuned.optimizer.weight_decay = 0.0
          tuned.init_new_head = after is not None
          if after is not None:  # what was learnt bears smaller steps alone
            tuned.optimizer.learning_rate_per_256 /= 10
          labels_then = {**labels, 'start': told}
          runs.append(Run(f'{folder}/{name}', labels_then, tuned, after))
  return runs


def _regularisation(scale: str, results: Results) -> list[Run]:
  """Dropout, stochastic depth and SAM: each alone, or each left out.

  At `paper` of the whole recipe of each net, elsewhere of a narrow and a wide
  net on few images without any augmentation.
  """
  del results
  if scale == 'paper':
    nets: tuple[str, ...] = ('F0', 'F1', 'F5', 'F6')
    kinds: dict[str, dict[str, Any]] = {
      'recipe': {},
      'without dropout': {'model.drop_rate': 0.0},
      'without stochastic depth': {'model.stochdepth_rate': 0.0},
      'with SAM': {'optimizer.sam_rho': 0.05},
    }
  else:
    nets = ('narrow', 'wide')
    none = {'model.drop_rate': 0.0, 'model.stochdepth_rate': 0.0}
    kinds = {
      'none': none,
      'dropout 0.25': {**none, 'model.drop_rate': 0.25},
      'dropout 0.5': {**none, 'model.drop_rate': 0.5},
      'stochastic depth 0.25': {**none, 'model.stochdepth_rate': 0.25},
      'SAM 0.05': {**none, 'optimizer.sam_rho': 0.05},
    }
  runs = []
  for net in nets:
    for kind, changes in kinds.items():
      for seed in _SEEDS[scale][:2]:
        config = nfnet_imagenet.get_config(net if scale == 'paper' else 'F0')
        config.seed = seed
        config.max_loss = _MAX_LOSS
        if scale != 'paper':
          config.augment.mixup_alpha = None
          config.augment.cutmix = False
          config.augment.rand_augment = None
          _shrink_nfnet(config, scale)
          if net == 'narrow':
            config.model.width = tuple(x // 2 for x in config.model.width)
            # The first stage's bottleneck has no more channels than half of it.
            first, *others = config.model.group_width
            config.model.group_width = (first // 2, *others)
        if scale == 'small':
          _on_few_images(config)
        config.update_from_flattened_dict(changes)
        labels = {'net': net, 'kind': kind, 'seed': seed}
        name = '/'.join([scale, 'regularisation', _folder(labels)])
        runs.append(Run(name, labels, config))
  return runs


def _microbatch(scale: str, results: Results) -> list[Run]:
  """Small batches, without AGC; the learning rate stays linear in the batch.

  A batch of 4 wants a single device.
  """
  del results
  sizes = (4, 16, 64, 256)
  runs = []
  for batch in sizes:
    for net in ('NF', 'BN'):
      for seed in _SEEDS[scale][:2]:
        config = resnet(net, scale, batch, seed)
        if scale == 'small':
          _train_for(config, 4.0)
          config.data.test_split = 'test'
          config.optimizer.warmup_epochs = 1.0
          # At the largest batch the rate at which NF was seen to be sound.
          config.optimizer.learning_rate_per_256 = 0.4
        labels = {'net': net, 'batch': batch, 'seed': seed}
        name = '/'.join([scale, 'microbatch', _folder(labels)])
        runs.append(Run(name, labels, config))
  return runs


ROWS: Mapping[str, Row] = {
  row.name: row
  for row in (
    Row(
      'batch-size',
      'Without normalisation and clipping a ResNet fails at batch 4096; with '
      'AGC it matches or beats batch normalisation from 256 to 4096.',
      'figure 2a',
      _batch_size,
      ('batch', 'net'),
    ),
    Row(
      'clipping',
      'The larger the batch, the smaller the λ that trains: too large a one '
      'diverges.',
      'figure 2b',
      _clipping,
      ('clipping', 'batch'),
    ),
    Row(
      'clip-methods',
      'The threshold of clipping by the global norm is sensitive; LARS is '
      'stable, but less accurate than AGC.',
      'section 4',
      _clip_methods,
      ('threshold', 'method'),
      'batch',
    ),
    Row(
      'clip-layers',
      'It is better not to clip the classifier; all stages must be clipped, '
      'the first convolution need not.',
      'section 4.1',
      _clip_layers,
      ('unclipped', 'batch'),
    ),
    Row(
      'ablation',
      'Widths, a second 3×3 convolution, MixUp, RandAugment and CutMix each '
      'add to the accuracy; batch normalisation instead does not.',
      'table 2',
      _ablation,
      ('row', 'net'),
    ),
    Row(
      'transfer',
      'Pre-trained at scale and fine-tuned, nets without normalisation beat '
      'those with it at every depth.',
      'table 4',
      _transfer,
      ('depth', 'net'),
      'start',
    ),
    Row(
      'regularisation',
      'Larger nets need more of it: dropout grows with the model, with '
      'stochastic depth, and SAM for the largest.',
      'section 5.1 and appendix A',
      _regularisation,
      ('kind', 'net'),
    ),
    Row(
      'microbatch',
      'At a batch of 4 normaliser-free nets hold and batch normalisation '
      'falls.',
      'Brock, De and Smith 2021',
      _microbatch,
      ('batch', 'net'),
    ),
  )
}
