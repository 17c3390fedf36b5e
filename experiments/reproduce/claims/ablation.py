"""What makes an NFNet of an NF-SE-ResNeXt-D, row by row.

Source: Brock et al. 2021, table 2, with the last two rows of its appendix.
Varied: the rows of experiments/ablation_imagenet.py, each on top of the one
  before; the last two change the full recipe of `cutmix`. The paper does
  not say how many images MixUp mixes in `mixup` and `rand_augment`: here all.
  At `paper` also an NF-ResNet-50 with RandAugment, without AGC and with it, at
  its batch of 1024 and with F1's policy, which the paper does not give.
Scales:
  gpu    half of F0's width without dropout and stochastic depth, 15 epochs of
         CIFAR-10 at batch 256, two seeds
  paper  F0 to F3 on ImageNet, three seeds
Command: make reproduce-ablation SCALE=small
At small: see ../small_scale.py and its rule, ../preregistered.
"""

import itertools

from experiments import ablation_imagenet, nf_resnet_imagenet
from experiments.reproduce import claim, scales
from experiments.reproduce.results import Results

_NETS = ('F0', 'F1', 'F2', 'F3')
_PREDECESSORS = {'RandAugment': None, 'RandAugment, AGC': 'agc'}
_PUBLISHED = {
  'baseline': (80.4, 81.7, 82.0, 82.3),
  'modified_width': (80.9, 81.8, 82.0, 82.3),
  'second_conv': (81.3, 82.2, 82.4, 82.7),
  'mixup': (82.2, 82.9, 83.1, 83.5),
  'rand_augment': (83.2, 84.6, 84.8, 85.0),
  'cutmix': (83.6, 84.7, 85.1, 85.7),
  'default_width': (83.1, 84.5, 85.0, 85.5),
  'batch_norm': (83.4, 84.4, 85.1, 85.5),
}


def _nets(scale: str) -> tuple[str, ...]:
  return _NETS if scale == 'paper' else _NETS[:1]


def _runs(scale: str, results: Results) -> list[claim.Run]:
  del results
  runs = []
  for net in _nets(scale):
    for row in ablation_imagenet.ROWS:
      for seed in scales.SEEDS[scale][:3]:
        config = ablation_imagenet.get_config(f'{net},{row}')
        scales.adapt_nfnet(config, scale, seed)
        if scale != 'paper':
          config.model.drop_rate = config.model.stochdepth_rate = 0.0
        labels = {'row': row, 'net': net, 'seed': seed}
        name = claim.run_name(scale, 'ablation', labels)
        runs.append(claim.Run(name, labels, config))
  return runs + (_predecessors() if scale == 'paper' else [])


def _predecessors() -> list[claim.Run]:
  """Returns NF-ResNets with RandAugment, the failure that AGC mends."""
  runs = []
  for row, clip in _PREDECESSORS.items():
    for seed in scales.SEEDS['paper'][:3]:
      config = nf_resnet_imagenet.get_config('50')
      config.seed = seed
      config.augment.rand_augment = '4x10'
      config.optimizer.clip = clip
      config.max_loss = scales.MAX_LOSS
      labels = {'row': row, 'net': 'NF-ResNet-50', 'seed': seed}
      name = claim.run_name('paper', 'ablation', labels)
      runs.append(claim.Run(name, labels, config))
  return runs


def _statements(measured: claim.Measured) -> list[claim.Statement]:
  nets = _nets(measured.scale)

  def at(row: str, net: str) -> claim.Point:
    return measured.at(row=row, net=net)

  rows = ablation_imagenet.ROWS[: ablation_imagenet.ROWS.index('cutmix') + 1]
  added = [
    claim.Statement(
      f'{after} beats {before}.',
      {net: at(after, net).beats(at(before, net)) for net in nets},
    )
    for before, after in itertools.pairwise(rows)
  ]
  changed = [
    claim.Statement(
      f'The full recipe {verb} {row}.',
      {net: compare(at('cutmix', net), at(row, net)) for net in nets},
    )
    for verb, row, compare in (
      ('beats', 'default_width', claim.Point.beats),
      ('matches or beats', 'batch_norm', claim.Point.matches),
    )
  ]
  if measured.scale != 'paper':
    return added + changed
  without, clipped = (at(row, 'NF-ResNet-50') for row in _PREDECESSORS)
  return [
    *added,
    *changed,
    claim.Statement(
      'With RandAugment, an NF-ResNet fails without AGC and trains with it.',
      {'without': without.fails, 'with': clipped.trains},
    ),
  ]


def _paper(scale: str) -> claim.Curve:
  nets = _nets(scale)
  top_1 = {
    (row, net): value
    for row, values in _PUBLISHED.items()
    for net, value in zip(nets, values, strict=False)
  }
  return claim.Curve(top_1, ', '.join(nets))


CLAIM = claim.Claim(
  name='ablation',
  text='Widths, a second 3×3 convolution, MixUp, RandAugment and CutMix each '
  'add to the accuracy; batch normalization instead does not.',
  source='table 2',
  runs=_runs,
  statements=_statements,
  axes=('row', 'net'),
  paper=_paper,
  words='NF-ResNets did not train with RandAugment, and do with AGC.',
  table=[
    ('top-1, %', *_NETS),
    *((row, *map(str, values)) for row, values in _PUBLISHED.items()),
  ],
)
