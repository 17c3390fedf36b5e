"""Fine-tuning after pre-training at scale, with and without normalization.

Source: Brock et al. 2021, section 6.2 and table 4.
Varied: the net (BN or NF), its depth, and at `paper` the size of the images, at
  `gpu` where it starts from: weights that were pre-trained on one half of the
  classes, or none, for the other half.
Scales:
  gpu    50 and 101 layers; 43,000 images of classes 0-4, then 5,000 of 5-9;
         two seeds; weight decay is 1e-5 and then 0, and fine-tuning has a tenth
         of the learning rate
  paper  50 to 200 layers, one seed; experiments/pretrain.py, then
         experiments/finetune.py on ImageNet at 224, 320 and 384 pixels. In
         place of JFT-300M, which is not public, Places365, or as DATA_NAME any
         TFDS data set or folder of photographs. Stochastic depth is 0.1 in
         pre-training for both nets, as the paper does not give it
Command: make reproduce-transfer SCALE=small
At small: see ../small_scale.py and its rule, ../preregistered.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import config_dict

from experiments import finetune, pretrain
from experiments.reproduce import claim, scales
from experiments.reproduce.results import Results

_DEPTHS: Mapping[str, tuple[int, ...]] = {
  'small': (11, 20),
  'gpu': (50, 101),
  'paper': (50, 101, 152, 200),
}
_PIXELS = (224, 320, 384)  # at `paper`
# Classes and images of the pre-training at `gpu`, and of what follows.
_BEFORE = ('0-4', 'train[:43000]')
_AFTER = ('5-9', 'train[43000:48000]')
_PUBLISHED = {
  'BN-ResNet-50': (78.1, 79.6, 79.9),
  'NF-ResNet-50': (79.5, 80.9, 81.1),
  'BN-ResNet-101': (80.8, 82.2, 82.5),
  'NF-ResNet-101': (81.4, 82.7, 83.2),
  'BN-ResNet-152': (81.8, 83.1, 83.4),
  'NF-ResNet-152': (82.7, 83.6, 84.0),
  'BN-ResNet-200': (81.8, 83.1, 83.5),
  'NF-ResNet-200': (82.9, 84.1, 84.3),
}


def _runs(scale: str, results: Results) -> list[claim.Run]:
  del results
  if scale == 'paper':
    return list(_paper_runs())
  batch = scales.batches(scale)[2]
  runs: list[claim.Run] = []
  for depth in _DEPTHS[scale]:
    for net in ('NF', 'BN'):
      for seed in scales.SEEDS[scale]:
        config = scales.resnet(net, scale, batch, seed, depth)
        labels = {'depth': depth, 'net': net, 'seed': seed}
        runs += _three(scale, config, labels)
  return runs


def _paper_runs() -> Iterator[claim.Run]:
  """Yields the pre-trainings and fine-tunings of table 4."""
  for layers in _DEPTHS['paper']:
    for net, model in (('NF', f'nf_resnet{layers}'), ('BN', f'resnet{layers}')):
      labels = {'depth': layers, 'net': net, 'seed': 0}
      folder = claim.run_name('paper', 'transfer', labels)
      config = pretrain.get_config(f'{model},{scales.STAND_IN}')
      config.model.stochdepth_rate = scales.STOCHDEPTH_RATE
      # Whatever other splits the data set has.
      config.data.train_split = 'train[10000:]'
      config.data.test_split = 'train[:10000]'
      config.max_loss = scales.MAX_LOSS
      first = claim.Run(f'{folder}/pre-training', {**labels, 'part': 0}, config)
      yield first
      for pixels in _PIXELS:
        tuned = finetune.get_config(f'{model},imagenet2012')
        tuned.data.image_size = tuned.data.eval_image_size = pixels
        tuned.max_loss = scales.MAX_LOSS
        start = {'start': _start(pixels)}
        yield claim.Run(
          f'{folder}/{pixels}', {**labels, **start}, tuned, first.name
        )


def _start(pixels: int) -> str:
  return f'pre-trained, {pixels} px'


def _three(
  scale: str, config: config_dict.ConfigDict, labels: dict[str, Any]
) -> Iterator[claim.Run]:
  """Yields a pre-training, a fine-tuning, and a training from scratch."""
  folder = claim.run_name(scale, 'transfer', labels)
  config.data.classes, config.data.train_split = _BEFORE
  config.optimizer.weight_decay = 1e-5
  first = claim.Run(f'{folder}/pre-training', {**labels, 'part': 0}, config)
  yield first
  for start, name, after in (
    ('pre-trained', 'from-it', first.name),
    ('from scratch', 'from-scratch', None),
  ):
    tuned = config.copy_and_resolve_references()
    tuned.data.classes, tuned.data.train_split = _AFTER
    tuned.optimizer.weight_decay = 0.0
    if after is not None:
      tuned.init_new_head = True
      tuned.optimizer.learning_rate_per_256 /= 10
    yield claim.Run(
      f'{folder}/{name}', {**labels, 'start': start}, tuned, after
    )


def _statements(measured: claim.Measured) -> list[claim.Statement]:
  holds: dict[Any, bool | None] = {}
  at_paper = measured.scale == 'paper'
  starts = map(_start, _PIXELS) if at_paper else ['pre-trained']
  for start, layers in itertools.product(starts, _DEPTHS[measured.scale]):
    nf, bn = (
      measured.at(depth=layers, net=net, start=start) for net in ('NF', 'BN')
    )
    holds[f'{layers}, {start}' if at_paper else layers] = nf.beats(bn)
  return [claim.Statement('Fine-tuned, NF beats BN at every depth.', holds)]


def _paper(scale: str) -> claim.Curve:
  depths = _DEPTHS['paper'][: len(_DEPTHS[scale])]
  if scale == 'paper':
    top_1 = {
      (depth, net, _start(pixels)): value
      for depth in depths
      for net in ('NF', 'BN')
      for pixels, value in zip(
        _PIXELS, _PUBLISHED[f'{net}-ResNet-{depth}'], strict=True
      )
    }
    return claim.Curve(top_1, 'from JFT-300M')
  top_1 = {
    (ours, net, 'pre-trained'): _PUBLISHED[f'{net}-ResNet-{theirs}'][0]
    for ours, theirs in zip(_DEPTHS[scale], depths, strict=True)
    for net in ('NF', 'BN')
  }
  names = ', '.join(map(str, depths))
  return claim.Curve(top_1, f'{names} layers at 224 pixels, from JFT-300M')


CLAIM = claim.Claim(
  name='transfer',
  text='Pre-trained at scale and fine-tuned, nets without normalization beat '
  'those with it at every depth.',
  source='table 4',
  runs=_runs,
  statements=_statements,
  axes=('depth', 'net'),
  panels='start',
  paper=_paper,
  table=[
    ('top-1, %', '224 px', '320 px', '384 px'),
    *((net, *map(str, values)) for net, values in _PUBLISHED.items()),
  ],
)
