"""Fine-tuning after pre-training at scale, with and without normalization.

Source: Brock et al. 2021, section 6.2 and table 4.
Varied: the net (BN or NF), its depth, and where it starts from: weights that
  were pre-trained on one half of the classes, or none, for the other half. The
  paper pre-trains on JFT-300M, which is not public.
Scales:
  small  11, 20 and 38 layers; 20,480 images of classes 0-4, then 2,048 of 5-9
  gpu    50 and 101 layers; 43,000 images, then 5,000
  paper  50 to 200 layers; the two halves of ImageNet
  Two seeds. Weight decay is 1e-5 and then 0; fine-tuning has a tenth of the
  learning rate.
Command: make reproduce-transfer SCALE=small
At small: see ../small_scale.py and its rule, ../preregistered.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import config_dict

from experiments.reproduce import claim, scales
from experiments.reproduce.results import Results

# Blocks of each stage at `small`, else layers.
_SIZES: dict[str, Sequence[Any]] = {
  'small': ((1, 1, 1), (2, 2, 2), (4, 4, 4)),
  'gpu': (50, 101),
  'paper': (50, 101, 152, 200),
}
# Classes and images of the pre-training, and of what follows.
_PARTS = {
  'small': (('0-4', 'train[:20480]'), ('5-9', 'train[40000:42048]')),
  'gpu': (('0-4', 'train[:43000]'), ('5-9', 'train[43000:48000]')),
  'paper': (('0-499', 'train'), ('500-999', 'train')),
}
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


def _layers(scale: str, size: Any) -> int:
  return 2 + 3 * sum(size) if scale == 'small' else size


def _runs(scale: str, results: Results) -> list[claim.Run]:
  del results
  batch = scales.batches(scale)[2]
  runs: list[claim.Run] = []
  for size in _SIZES[scale]:
    for net in ('NF', 'BN'):
      for seed in scales.SEEDS[scale][:2]:
        if scale == 'small':
          changes = {'model.depth': size}
          config = scales.resnet(net, scale, batch, seed, changes=changes)
        else:
          config = scales.resnet(net, scale, batch, seed, size)
        if scale != 'paper':
          config.data.test_split = 'test'
        labels = {'depth': _layers(scale, size), 'net': net, 'seed': seed}
        runs += _three(scale, config, labels)
  return runs


def _three(
  scale: str, config: config_dict.ConfigDict, labels: dict[str, Any]
) -> Iterator[claim.Run]:
  """Yields a pre-training, a fine-tuning, and a training from scratch."""
  folder = claim.run_name(scale, 'transfer', labels)
  (config.data.classes, config.data.train_split), then = _PARTS[scale]
  config.optimizer.weight_decay = 1e-5
  first = claim.Run(f'{folder}/pre-training', {**labels, 'part': 0}, config)
  yield first
  for start, name, after in (
    ('pre-trained', 'from-it', first.name),
    ('from scratch', 'from-scratch', None),
  ):
    tuned = config.copy_and_resolve_references()
    tuned.data.classes, tuned.data.train_split = then
    tuned.optimizer.weight_decay = 0.0
    if after is not None:
      tuned.init_new_head = True
      tuned.optimizer.learning_rate_per_256 /= 10
    yield claim.Run(
      f'{folder}/{name}', {**labels, 'start': start}, tuned, after
    )


def _statements(measured: claim.Measured) -> list[claim.Statement]:
  holds = {}
  for layers in (_layers(measured.scale, x) for x in _SIZES[measured.scale]):
    nf, bn = (
      measured.at(depth=layers, net=net, start='pre-trained')
      for net in ('NF', 'BN')
    )
    holds[layers] = nf.beats(bn)
  return [claim.Statement('Fine-tuned, NF beats BN at every depth.', holds)]


def _paper(scale: str) -> claim.Curve:
  depths = _SIZES['paper'][: len(_SIZES[scale])]
  top_1 = {
    (_layers(scale, size), net, 'pre-trained'): (
      _PUBLISHED[f'{net}-ResNet-{depth}'][0]
    )
    for size, depth in zip(_SIZES[scale], depths, strict=True)
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
