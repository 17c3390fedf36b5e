"""Nets without batch normalization train at a batch of 4.

Source: Brock, De and Smith 2021, https://arxiv.org/abs/2101.08692; its numbers
  are taken from a secondary source.
Varied: the net (NF without AGC, or BN) and the batch size, with a learning rate
  linear in it. A batch of 4 needs a single device.
Scales:
  gpu    20 layers, 15 epochs
  paper  ResNet-50 on ImageNet, both nets with stochastic depth 0.1
  Two seeds.
Command: make reproduce-microbatch SCALE=small
At small: see ../small_scale.py and its rule, ../preregistered.
"""

from experiments.reproduce import claim, scales
from experiments.reproduce.results import Results

_BATCHES = (4, 16, 64, 256)
_PUBLISHED = {'BN': 55.7, 'NF': 69.9}


def _runs(scale: str, results: Results) -> list[claim.Run]:
  del results
  runs = []
  for batch in _BATCHES:
    for net in ('NF', 'BN'):
      for seed in scales.SEEDS[scale][:2]:
        config = scales.resnet(net, scale, batch, seed)
        labels = {'net': net, 'batch': batch, 'seed': seed}
        name = claim.run_name(scale, 'microbatch', labels)
        runs.append(claim.Run(name, labels, config))
  return runs


def _statements(measured: claim.Measured) -> list[claim.Statement]:
  def at(net: str, batch: int) -> claim.Point:
    return measured.at(net=net, batch=batch)

  return [
    claim.Statement(
      'NF beats BN at a batch of 4.', {4: at('NF', 4).beats(at('BN', 4))}
    ),
    claim.Statement(
      'NF is as accurate at 4 as at 16.', {4: at('NF', 4).matches(at('NF', 16))}
    ),
    claim.Statement(
      'BN is less accurate at 4 than at 16.',
      {4: at('BN', 16).beats(at('BN', 4))},
    ),
  ]


def _paper(scale: str) -> claim.Curve:
  del scale
  top_1 = {(4, net): value for net, value in _PUBLISHED.items()}
  return claim.Curve(top_1, 'ResNet-50')


CLAIM = claim.Claim(
  name='microbatch',
  text='At a batch of 4 nets without normalization keep their accuracy and '
  'batch normalization loses its own.',
  source='Brock, De and Smith 2021',
  runs=_runs,
  statements=_statements,
  axes=('batch', 'net'),
  paper=_paper,
  table=[
    ('top-1, %', 'batch of 4'),
    *((f'{net}-ResNet-50', str(x)) for net, x in _PUBLISHED.items()),
  ],
)
