"""Which layers AGC must clip.

Source: Brock et al. 2021, section 4.1.
Varied: what is excluded from AGC, at the largest batch, λ 0.01, three seeds.
Scales: those of batch_size.py, with which it shares runs.
Command: make reproduce-clip-layers SCALE=small
At small: see ../small_scale.py and its rule, ../preregistered.
"""

import dataclasses

from experiments.reproduce import claim, scales
from experiments.reproduce.results import Results

_STEM = 'and the first convolution'


def _runs(scale: str, results: Results) -> list[claim.Run]:
  del results
  batch = scales.batches(scale)[4]
  runs = []
  for name, pattern in scales.unclipped(scale).items():
    for seed in (0, 1, 2):  # the differences are small
      labels = {'unclipped': name, 'batch': batch, 'seed': seed}
      changes = {'optimizer.clipping': 0.01}
      run = scales.resnet_run('NF + AGC', scale, batch, seed, changes, labels)
      if name != scales.EXCLUDED:
        run.config.optimizer.unclipped = pattern
        named = {'unclipped': name, 'seed': seed}
        folder = claim.run_name(scale, 'clip-layers', named)
        run = dataclasses.replace(run, name=folder, held_out=None)
      runs.append(run)
  return runs


def _statements(measured: claim.Measured) -> list[claim.Statement]:
  paper = measured.at(unclipped=scales.EXCLUDED)
  names = [point.labels['unclipped'] for point in measured.points]
  stages = {x: measured.at(unclipped=x) for x in names if x.startswith('and s')}
  every = measured.at(unclipped=f'all {len(stages)} stages')
  return [
    claim.Statement(
      'Not clipping the classifier is better than clipping it.',
      {'': paper.beats(measured.at(unclipped='nothing'))},
    ),
    claim.Statement(
      'The first convolution need not be clipped.',
      {'': measured.at(unclipped=_STEM).matches(paper)},
    ),
    claim.Statement(
      'Each stage must be clipped.',
      {name.removeprefix('and '): paper.beats(x) for name, x in stages.items()},
    ),
    claim.Statement(
      'With no stage clipped, training fails.', {'': every.fails}
    ),
  ]


CLAIM = claim.Claim(
  name='clip-layers',
  text='It is better not to clip the classifier; all stages must be clipped, '
  'the first convolution need not.',
  source='section 4.1',
  runs=_runs,
  statements=_statements,
  axes=('unclipped', 'batch'),
  words='At batch 4096 and λ 0.01 not clipping the last linear layer is always '
  'better, the first convolution can often be left unclipped, and all four '
  'stages must be clipped. There are no numbers.',
)
