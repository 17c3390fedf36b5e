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
from nfnets_jax.training import config as defaults

_PAPER = 'the classifier (paper)'
_STEM = 'and the first convolution'


def _excluded(scale: str, batch: int) -> dict[str, str | None]:
  """Returns regular expressions of what is excluded, by label."""
  classifier = defaults.get_config().optimizer.unclipped
  depth = scales.resnet('NF', scale, batch).model.depth
  excluded = {
    _PAPER: classifier,
    'nothing': None,
    _STEM: f'{classifier}|/initial_conv/',
  }
  for stage in range(len(depth)):
    indices = range(sum(depth[:stage]), sum(depth[: stage + 1]))
    suffixes = '|'.join('' if i == 0 else f'_{i}' for i in indices)
    excluded[f'and stage {stage + 1}'] = (
      f'{classifier}|/nf_res_block({suffixes})(/|$)'
    )
  excluded[f'all {len(depth)} stages'] = f'{classifier}|/nf_res_block'
  return excluded


def _runs(scale: str, results: Results) -> list[claim.Run]:
  del results
  batch = scales.batches(scale)[4]
  excluded = _excluded(scale, batch)
  runs = []
  for name, pattern in excluded.items():
    for seed in (0, 1, 2):  # the differences are small
      labels = {'unclipped': name, 'batch': batch, 'seed': seed}
      changes = {'optimizer.clipping': 0.01}
      run = scales.resnet_run('NF + AGC', scale, batch, seed, changes, labels)
      if name != _PAPER:
        run.config.optimizer.unclipped = pattern
        named = {'unclipped': name, 'seed': seed}
        folder = claim.run_name(scale, 'clip-layers', named)
        run = dataclasses.replace(run, name=folder, held_out=None)
      runs.append(run)
  return runs


def _statements(measured: claim.Measured) -> list[claim.Statement]:
  paper = measured.at(unclipped=_PAPER)
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
