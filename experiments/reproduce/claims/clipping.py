"""The larger the batch, the smaller the λ of AGC that trains.

Source: Brock et al. 2021, section 4.1 and figure 2b.
Varied: λ (0.01 to 0.16) and the batch size.
Scales: those of batch_size.py, with which it shares runs, `gpu` with one seed;
  `paper` includes the ResNet-200 (figure 7).
Command: make reproduce-clipping SCALE=small
At small: see ../small_scale.py and its rule, ../preregistered.
"""

import itertools
from typing import Any

from experiments.reproduce import claim, scales
from experiments.reproduce.results import Results


def _runs(scale: str, results: Results) -> list[claim.Run]:
  del results
  seeds = scales.SEEDS[scale][: None if scale == 'paper' else 1]
  return [
    scales.resnet_run(
      'NF + AGC',
      scale,
      batch,
      seed,
      {'optimizer.clipping': clipping},
      layers=depth,
    )
    for depth in scales.depths(scale)
    for batch in scales.batches(scale)
    for clipping in scales.CLIPPINGS
    for seed in seeds
  ]


def _statements(measured: claim.Measured) -> list[claim.Statement]:
  scale = measured.scale
  depths, batches = scales.depths(scale), scales.batches(scale)
  largest: dict[Any, float | None] = {}  # that trains
  best: dict[Any, float | None] = {}
  for depth, batch in itertools.product(depths, batches):
    points = [
      measured.at(depth=depth, batch=batch, clipping=x)
      for x in scales.CLIPPINGS
    ]
    known = all(point.trains is not None for point in points)
    trains = [x.labels['clipping'] for x in points if x.trains]
    key = depth, batch
    largest[key] = max(trains, default=0.0) if known else None
    best[key] = measured.best(depth=depth, batch=batch).labels.get('clipping')

  def falls(values: dict[Any, float | None]) -> dict[Any, bool | None]:
    holds: dict[Any, bool | None] = {}
    for depth in depths:
      for small, large in itertools.pairwise(batches):
        before, after = values[depth, small], values[depth, large]
        name = f'{scales.at_depth(scale, depth, small)} to {large}'
        if before is None or after is None or largest[depth, large] is None:
          holds[name] = None
        else:
          holds[name] = after <= before
    return holds

  failed = {
    scales.at_depth(scale, x, batches[-1]): measured.at(
      depth=x, batch=batches[-1], clipping=scales.CLIPPINGS[-1]
    ).fails
    for x in depths
  }
  return [
    claim.Statement('The largest λ diverges at the largest batch.', failed),
    claim.Statement(
      'The largest λ that trains does not grow with the batch.', falls(largest)
    ),
    claim.Statement(
      'The most accurate λ does not grow with the batch.', falls(best)
    ),
  ]


CLAIM = claim.Claim(
  name='clipping',
  text='The larger the batch, the smaller the λ that trains: too large a one '
  'diverges.',
  source='figure 2b',
  runs=_runs,
  statements=_statements,
  axes=('clipping', 'batch'),
  panels='depth',
  counted=scales.COUNTED,
  words='A smaller λ is needed for stability as the batch grows, and 0.01 is '
  'used at 4096. The numbers of figure 2b could not be read off.',
)
