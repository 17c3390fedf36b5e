"""Dropout, stochastic depth and SAM, for nets of different size.

Source: Brock et al. 2021, section 5.1 and appendix A, table 3.
Varied: the kind of regularization and the net. At `paper` one kind at a time is
  removed from the recipe, or SAM added; elsewhere one is added to none.
Scales:
  gpu    the F0 of ablation.py (`wide`) and half of it (`narrow`), without
         augmentation, two seeds
  paper  F0, F1, F5 and F6 on ImageNet, two seeds
Command: make reproduce-regularisation SCALE=small
At small: see ../small_scale.py and its rule, ../preregistered.
"""

from typing import Any

from experiments import nfnet_imagenet
from experiments.reproduce import claim, paper, scales
from experiments.reproduce.results import Results
from nfnets_jax.models import variants

_NONE = {'model.drop_rate': 0.0, 'model.stochdepth_rate': 0.0}
_KINDS: dict[str, dict[str, Any]] = {
  'none': _NONE,
  'dropout 0.25': {**_NONE, 'model.drop_rate': 0.25},
  'dropout 0.5': {**_NONE, 'model.drop_rate': 0.5},
  'stochastic depth 0.25': {**_NONE, 'model.stochdepth_rate': 0.25},
  'SAM 0.05': {**_NONE, 'optimizer.sam_rho': 0.05},
}
_NO_SAM = {'optimizer.sam_rho': None}  # F5 and F6 have it by default
_PAPER_KINDS: dict[str, dict[str, Any]] = {
  'recipe': _NO_SAM,
  'without dropout': {**_NO_SAM, 'model.drop_rate': 0.0},
  'without stochastic depth': {**_NO_SAM, 'model.stochdepth_rate': 0.0},
  'with SAM': {'optimizer.sam_rho': 0.05},
}
_PAPER_NETS = ('F0', 'F1', 'F5', 'F6')
# Table 3, with sharpness-aware minimization.
_SAM = {
  net: paper.WITH_SAM[f'nfnet_{net.lower()}'].top_1 for net in ('F5', 'F6')
}


def _runs(scale: str, results: Results) -> list[claim.Run]:
  del results
  at_paper = scale == 'paper'
  runs = []
  for net in _PAPER_NETS if at_paper else ('narrow', 'wide'):
    for kind, changes in (_PAPER_KINDS if at_paper else _KINDS).items():
      for seed in scales.SEEDS[scale][:2]:
        config = nfnet_imagenet.get_config(net if at_paper else 'F0')
        if not at_paper:
          config.augment.mixup_alpha = None
          config.augment.cutmix = False
          config.augment.rand_augment = None
        scales.adapt_nfnet(config, scale, seed)
        if net == 'narrow':
          scales.halve_width(config)
        config.update_from_flattened_dict(changes)
        labels = {'net': net, 'kind': kind, 'seed': seed}
        name = claim.run_name(scale, 'regularisation', labels)
        runs.append(claim.Run(name, labels, config))
  return runs


def _statements(measured: claim.Measured) -> list[claim.Statement]:
  def at(net: str, kind: str) -> claim.Point:
    return measured.at(net=net, kind=kind)

  if measured.scale == 'paper':
    without = ('without dropout', 'without stochastic depth')
    return [
      *(
        claim.Statement(
          f'The recipe beats that {kind}.',
          {x: at(x, 'recipe').beats(at(x, kind)) for x in _PAPER_NETS},
        )
        for kind in without
      ),
      claim.Statement(
        'SAM helps the largest nets.',
        {x: at(x, 'with SAM').beats(at(x, 'recipe')) for x in _SAM},
      ),
    ]
  kinds = [kind for kind in _KINDS if kind != 'none']

  def gain(net: str, kind: str) -> float | None:
    on, off = at(net, kind).mean, at(net, 'none').mean
    return None if on is None or off is None else on - off

  gains: dict[str, bool | None] = {}
  for kind in kinds:
    wide, narrow = gain('wide', kind), gain('narrow', kind)
    if wide is None or narrow is None:
      gains[kind] = None
    else:
      gains[kind] = wide > narrow
  return [
    claim.Statement(
      'Regularization helps the wide net.',
      {x: at('wide', x).beats(at('wide', 'none')) for x in kinds},
    ),
    claim.Statement('The wide net gains more than the narrow one.', gains),
  ]


def _paper(scale: str) -> claim.Curve:
  top_1: dict[tuple[Any, ...], float | None] = {}
  if scale == 'paper':
    for net in ('F0', 'F1', 'F5'):
      top_1['recipe', net] = paper.RESULTS[f'nfnet_{net.lower()}'].top_1
    for net, value in _SAM.items():
      top_1['with SAM', net] = value
  return claim.Curve(top_1, 'table 3')


def _table() -> claim.Table:
  table = [('net', 'dropout', 'top-1, %', 'with SAM')]
  for net in (f'F{n}' for n in range(7)):
    model = f'nfnet_{net.lower()}'
    drop_rate = variants.get(model).settings.drop_rate
    top_1 = paper.LATENCY[model].top_1 if model in paper.LATENCY else ''
    table.append((net, str(drop_rate), str(top_1), str(_SAM.get(net, ''))))
  return table


CLAIM = claim.Claim(
  name='regularisation',
  text='Larger nets need more regularization: dropout grows with the model, '
  'with stochastic depth, and SAM for the largest.',
  source='section 5.1 and appendix A',
  runs=_runs,
  statements=_statements,
  axes=('kind', 'net'),
  paper=_paper,
  words='Dropout grows with the net; stochastic depth is 0.25 for all. '
  'There are no results without them.',
  table=_table(),
)
