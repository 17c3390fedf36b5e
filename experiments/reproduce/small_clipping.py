"""The runs at `small` of the claims about AGC: four files of `claims`.

A run is shared by all claims that ask for its net, batch, changes and length.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.reproduce import claim, scales, small_nets
from experiments.reproduce.results import Results
from experiments.reproduce.small_nets import CLIPPINGS, HELD_OUT, SEEDS

# Of `batch-size` at the largest batch.
MANY_SEEDS = (0, 1, 2, 3, 4)
BATCHES = (32, 128, 512)  # the paper's 256, 1024 and 4096, at its rates
_LARGEST = BATCHES[-1]


def _resnet_run(
  net: str,
  batch: int,
  seed: int,
  epochs: float,
  changes: Mapping[str, Any] | None = None,
  labels: Mapping[str, Any] | None = None,
) -> claim.Run:
  """Returns a run evaluated on held-out images, with a claim's `labels`."""
  changes = changes or {}
  values = {name.rpartition('.')[2]: x for name, x in changes.items()}
  named = {'net': net, 'batch': batch, 'epochs': epochs, **values, 'seed': seed}
  return claim.Run(
    claim.run_name('small', 'resnet', named),
    {**(labels or {'depth': 20, 'net': net, 'batch': batch}), 'seed': seed},
    small_nets.resnet(net, batch, seed, epochs, changes),
    held_out=HELD_OUT,
  )


# batch-size and clipping.

_LONG = 30.0  # epochs


def _agc(
  batch: int, seed: int, clipping: float, labels: Mapping[str, Any]
) -> claim.Run:
  return _resnet_run(
    'NF + AGC',
    batch,
    seed,
    _LONG,
    {'optimizer.clipping': clipping},
    {'depth': 20, 'batch': batch, 'clipping': clipping, **labels},
  )


def batch_size(results: Results) -> list[claim.Run]:
  """Returns the runs of `batch-size`; λ is chosen once the first are there."""
  runs = []
  for batch in BATCHES:
    seeds = MANY_SEEDS if batch == _LARGEST else SEEDS
    for net in ('NF', 'BN'):
      runs += [_resnet_run(net, batch, seed, _LONG) for seed in seeds]
    named = {'net': 'NF + AGC'}
    prepared = {**named, 'part': 0}
    sweep = [_agc(batch, seeds[0], x, prepared) for x in CLIPPINGS]
    ranked = claim.rank(sweep, results)
    if not ranked:
      runs += sweep
      continue
    clipping = ranked[0].config.optimizer.clipping
    runs += [run for run in sweep if run is not ranked[0]]
    runs += [_agc(batch, seed, clipping, named) for seed in seeds]
  return runs


def clipping(results: Results) -> list[claim.Run]:
  """Returns the runs of `clipping`, some of them those of `batch-size`."""
  del results
  return [
    _agc(batch, seed, clipping, {})
    for batch in (BATCHES[0], _LARGEST)
    for clipping in CLIPPINGS
    for seed in SEEDS
  ]


# clip-methods and clip-layers.

_SHORT = 16.0  # epochs
_NORMS = ((128, 1.0), (_LARGEST, 1.0), (_LARGEST, 0.1))
_LARS_RATES = (3.0, 10.0, 30.0)


def _method(
  method: str, threshold: float, seed: int, batch: int = _LARGEST
) -> claim.Run:
  """Returns a run; the threshold of LARS is its peak learning rate."""
  changes = scales.clip_changes(method, threshold, 'small', batch)
  labels = {'method': method, 'threshold': threshold, 'batch': batch}
  net = 'NF + AGC' if method == 'AGC' else 'NF'
  return _resnet_run(net, batch, seed, _SHORT, changes, labels)


def clip_methods(results: Results) -> list[claim.Run]:
  """Returns the runs of `clip-methods`; thresholds are chosen as λ is."""
  runs = [_method('none', 0.0, seed) for seed in SEEDS]
  for batch, norm in _NORMS:
    runs += [_method('global norm', norm, seed, batch) for seed in SEEDS]
  for method, thresholds in (('AGC', CLIPPINGS), ('LARS', _LARS_RATES)):
    sweep = [_method(method, x, SEEDS[0]) for x in thresholds]
    ranked = claim.rank(sweep, results)
    if not ranked:
      runs += sweep
      continue
    best = ranked[0].labels['threshold']
    runs += [run for run in sweep if run is not ranked[0]]
    chosen = [_method(method, best, seed) for seed in SEEDS]
    runs += [
      dataclasses.replace(x, labels={**x.labels, 'chosen': 'held-out'})
      for x in chosen
    ]
  return runs


def clip_layers(results: Results) -> list[claim.Run]:
  """Returns the runs of `clip-layers`."""
  del results
  runs = []
  for name, pattern in scales.unclipped('small').items():
    for seed in SEEDS:
      run = _method('AGC', CLIPPINGS[0], seed)
      labels = {'unclipped': name, 'batch': _LARGEST, 'seed': seed}
      if name != scales.EXCLUDED:
        run.config.optimizer.unclipped = pattern
        folder = claim.run_name('small', 'clip-layers', labels)
        run = dataclasses.replace(run, name=folder, held_out=None)
      runs.append(dataclasses.replace(run, labels=labels))
  return runs
