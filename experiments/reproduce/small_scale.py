"""The runs of the claims on two CPU cores, in two hours.

The settings and their reasons are in `preregistered/NAME.md`, with the rules by
which the claims are judged; the nets are in small_nets.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import config_dict

from experiments import ablation_imagenet
from experiments.reproduce import claim, scales, small_clipping, small_nets
from experiments.reproduce.results import Results
from experiments.reproduce.small_nets import CLIPPINGS, HELD_OUT, SEEDS

_DEPTHS: Mapping[int, tuple[int, ...]] = {11: (1, 1, 1), 20: (2, 2, 2)}
# At batch 256, by factors of about three around a tenth of that of
# pre-training, 0.8.
_TUNED_RATES = (0.024, 0.08, 0.24, 0.8)
# The row of the ablation without augmentation, also that of `regularisation`.
_BASELINE = 'second_conv'


def _transfer(results: Results) -> list[claim.Run]:
  runs: list[claim.Run] = []
  for layers, depth in _DEPTHS.items():
    for net in ('NF', 'BN'):
      config = small_nets.resnet(net, 128, 0, 6.0, {'model.depth': depth})
      config.optimizer.weight_decay = 1e-5
      config.data.classes, config.data.train_split = '0-4', 'train[:30000]'
      labels = {'depth': layers, 'net': net}
      pair = functools.partial(_fine_tuned, config, labels)
      sweep = [pair(rate, SEEDS[0])[1] for rate in _TUNED_RATES]
      runs.append(pair(_TUNED_RATES[0], SEEDS[0])[0])
      ranked = claim.rank(sweep, results)
      if not ranked:
        runs += sweep
        continue
      rate = ranked[0].labels['rate']
      runs += [
        dataclasses.replace(x, labels={**x.labels, 'part': 0})
        for x in sweep
        if x is not ranked[0]
      ]
      runs.append(ranked[0])
      for seed in SEEDS[1:]:
        runs += pair(rate, seed)
  return runs


def _fine_tuned(
  config: config_dict.ConfigDict,
  labels: Mapping[str, Any],
  rate: float,
  seed: int,
) -> list[claim.Run]:
  """Returns a pre-training of a seed and a fine-tuning after it."""
  first = config.copy_and_resolve_references()
  first.seed = seed
  labels = {**labels, 'seed': seed}
  folder = claim.run_name('small', 'transfer', labels)
  before = claim.Run(f'{folder}/pre-training', {**labels, 'part': 0}, first)
  tuned = first.copy_and_resolve_references()
  tuned.init_new_head = True
  tuned.data.classes = '5-9'
  tuned.data.train_split = 'train[40000:42048]'
  tuned.optimizer.weight_decay = 0.0
  tuned.optimizer.learning_rate_per_256 = rate
  small_nets.set_length(tuned, 30.0)
  return [
    before,
    claim.Run(
      f'{folder}/rate={rate:g}',
      {**labels, 'rate': rate, 'start': 'pre-trained'},
      tuned,
      before.name,
      HELD_OUT,
    ),
  ]


def _row(row: str, seed: int, clipping: float) -> claim.Run:
  """Returns a run of `ablation`, evaluated on held-out images."""
  config = ablation_imagenet.get_config(f'F0,{row}')
  labels = {'row': row, 'net': 'F0'}
  named = {**labels, 'clipping': clipping, 'seed': seed}
  return claim.Run(
    claim.run_name('small', 'ablation', named),
    {**labels, 'seed': seed},
    small_nets.nfnet(config, seed, clipping),
    held_out=HELD_OUT,
  )


def _sweep(results: Results) -> tuple[list[claim.Run], float | None]:
  """Returns runs of the baseline with each λ, and the best λ if known."""
  sweep = [_row(_BASELINE, SEEDS[0], x) for x in CLIPPINGS]
  ranked = claim.rank(sweep, results)
  if not ranked:
    return sweep, None
  others = [
    dataclasses.replace(x, labels={**x.labels, 'part': 0}) for x in ranked[1:]
  ]
  return others, ranked[0].config.optimizer.clipping


def _ablation(results: Results) -> list[claim.Run]:
  runs, clipping = _sweep(results)
  if clipping is not None:
    for row in ablation_imagenet.ROWS:
      runs += [_row(row, seed, clipping) for seed in SEEDS]
  return runs


_KINDS: Mapping[str, Mapping[str, Any]] = {
  'none': {},
  'dropout 0.25': {'model.drop_rate': 0.25},
  'stochastic depth 0.25': {'model.stochdepth_rate': 0.25},
  'SAM 0.05': {'optimizer.sam_rho': 0.05},
}


def _regularisation(results: Results) -> list[claim.Run]:
  runs, clipping = _sweep(results)
  baseline = {'net': 'wide', 'kind': 'none'}
  runs = [dataclasses.replace(x, labels={**x.labels, **baseline}) for x in runs]
  if clipping is None:
    return runs
  for net in ('narrow', 'wide'):
    for kind, changes in _KINDS.items():
      for seed in SEEDS:
        run = _row(_BASELINE, seed, clipping)
        labels = {'net': net, 'kind': kind, 'seed': seed}
        if labels.items() >= baseline.items():
          runs.append(dataclasses.replace(run, labels=labels))
          continue
        if net == 'narrow':
          scales.halve_width(run.config)
        run.config.update_from_flattened_dict(dict(changes))
        name = claim.run_name('small', 'regularisation', labels)
        runs.append(claim.Run(name, labels, run.config))
  return runs


def _microbatch(results: Results) -> list[claim.Run]:
  del results
  changes = {
    'data.test_split': 'test',
    'optimizer.warmup_epochs': 1.0,
    'optimizer.learning_rate_per_256': 0.4,
  }
  runs = []
  for batch in (4, 16, 64):
    for net in ('NF', 'BN'):
      for seed in SEEDS:
        labels = {'net': net, 'batch': batch, 'seed': seed}
        name = claim.run_name('small', 'microbatch', labels)
        config = small_nets.resnet(net, batch, seed, 4.0, changes)
        runs.append(claim.Run(name, labels, config))
  return runs


_RUNS: Mapping[str, Callable[[Results], list[claim.Run]]] = {
  'batch-size': small_clipping.batch_size,
  'clipping': small_clipping.clipping,
  'clip-methods': small_clipping.clip_methods,
  'clip-layers': small_clipping.clip_layers,
  'ablation': _ablation,
  'transfer': _transfer,
  'regularisation': _regularisation,
  'microbatch': _microbatch,
}


def at_small(made: claim.Claim) -> claim.Claim:
  """Returns a claim with the runs of this file at `small`."""

  def runs(scale: str, results: Results) -> list[claim.Run]:
    if scale == 'small':
      return _RUNS[made.name](results)
    return made.runs(scale, results)

  return dataclasses.replace(made, runs=runs)
