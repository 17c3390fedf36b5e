"""AGC trains a ResNet without normalization at batch 4096.

Source: Brock et al. 2021, section 4.1 and figure 2a.
Varied: the net (BN, NF, NF + AGC) and the batch size. AGC takes the λ of 0.01,
  0.04 and 0.16 that does best on held-out images with the first seed.
Scales:
  small  20 layers, 61 thousand parameters, batches 32 to 512, two seeds
  gpu    20 layers, 3.5 million parameters, batches 256 to 4096, two seeds
  paper  ResNet-50 on ImageNet, batches 256 to 4096, five seeds
Command: make reproduce-batch-size SCALE=small
At small: see ../small_scale.py and its rule, ../preregistered.
"""

import dataclasses
from collections.abc import Mapping

from experiments.reproduce import claim, scales
from experiments.reproduce.results import Results

# Figure 2a at batches 256 to 4096, digitized to 0.05 points; None is below the
# figure's 70 %.
_PUBLISHED: Mapping[str, tuple[float | None, ...]] = {
  'BN-ResNet-50': (76.9, 76.8, 76.4, 76.8, 76.8),
  'NF-ResNet-50': (76.6, 76.7, 76.9, 76.9, None),
  'NF-ResNet-50 + AGC': (76.79, 76.94, 76.95, 76.93, 76.72),
  'BN-ResNet-200': (78.70, 78.99, 78.89, 79.0, 78.88),
  'NF-ResNet-200': (79.3, 79.5, 79.5, 79.6, None),
  'NF-ResNet-200 + AGC': (79.19, 79.43, 79.59, 79.46, 79.16),
}


def _runs(scale: str, results: Results) -> list[claim.Run]:
  first, *others = scales.SEEDS[scale]
  runs = []
  for batch in scales.batches(scale):
    for net in ('NF', 'BN'):
      runs += [
        scales.resnet_run(net, scale, batch, seed)
        for seed in scales.SEEDS[scale]
      ]
    sweep = [_agc(scale, batch, first, x) for x in scales.CLIPPINGS[::2]]
    ranked = claim.rank(sweep, results)
    if not ranked:
      runs += sweep
      continue
    best = ranked[0]
    runs += [
      run
      if run is best
      else dataclasses.replace(run, labels={**run.labels, 'part': 0})
      for run in sweep
    ]
    clipping = best.config.optimizer.clipping
    runs += [_agc(scale, batch, seed, clipping) for seed in others]
  return runs


def _agc(scale: str, batch: int, seed: int, clipping: float) -> claim.Run:
  changes = {'optimizer.clipping': clipping}
  return scales.resnet_run('NF + AGC', scale, batch, seed, changes)


def _statements(measured: claim.Measured) -> list[claim.Statement]:
  batches = scales.batches(measured.scale)
  agc = {x: measured.at(net='NF + AGC', batch=x) for x in batches}
  return [
    claim.Statement(
      'Without normalization and AGC, training diverges at the largest batch.',
      {batches[-1]: measured.at(net='NF', batch=batches[-1]).fails},
    ),
    claim.Statement(
      'With AGC, it converges at every batch.',
      {x: agc[x].trains for x in batches},
    ),
    claim.Statement(
      'With AGC, it matches or beats batch normalization.',
      {x: agc[x].matches(measured.at(net='BN', batch=x)) for x in batches},
    ),
  ]


def _paper(scale: str) -> claim.Curve:
  top_1 = {
    (batch, net.replace('-ResNet-50', '')): value
    for net, values in _PUBLISHED.items()
    if 'ResNet-50' in net
    for batch, value in zip(scales.batches(scale), values, strict=True)
  }
  return claim.Curve(top_1, 'ResNet-50 at batches 256 to 4096')


CLAIM = claim.Claim(
  name='batch-size',
  text='Without normalization and clipping a ResNet fails at batch 4096; with '
  'AGC it matches or beats batch normalization from 256 to 4096.',
  source='figure 2a',
  runs=_runs,
  statements=_statements,
  axes=('batch', 'net'),
  paper=_paper,
  table=[
    ('top-1, %', *map(str, scales.batches('paper'))),
    *(
      (net, *('fails' if x is None else f'{x}' for x in values))
      for net, values in _PUBLISHED.items()
    ),
  ],
)
