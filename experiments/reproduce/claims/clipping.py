"""The larger the batch, the smaller the λ of AGC that trains.

Source: Brock et al. 2021, section 4.1 and figure 2b.
Varied: λ (0.01 to 0.16) and the batch size, with one seed.
Scales: those of batch_size.py, with which it shares runs.
Command: make reproduce-clipping SCALE=small
At small: see ../small_scale.py and its rule, ../preregistered.
"""

import itertools

from experiments.reproduce import claim, scales
from experiments.reproduce.results import Results


def _runs(scale: str, results: Results) -> list[claim.Run]:
  del results
  seed = scales.SEEDS[scale][0]
  return [
    scales.resnet_run(
      'NF + AGC', scale, batch, seed, {'optimizer.clipping': clipping}
    )
    for batch in scales.batches(scale)
    for clipping in scales.CLIPPINGS
  ]


def _statements(measured: claim.Measured) -> list[claim.Statement]:
  batches = scales.batches(measured.scale)
  largest: dict[int, float | None] = {}  # that trains
  best: dict[int, float | None] = {}
  for batch in batches:
    points = [measured.at(batch=batch, clipping=x) for x in scales.CLIPPINGS]
    known = all(point.trains is not None for point in points)
    trains = [x.labels['clipping'] for x in points if x.trains]
    largest[batch] = max(trains, default=0.0) if known else None
    best[batch] = measured.best(batch=batch).labels.get('clipping')
  steps = list(itertools.pairwise(batches))

  def falls(values: dict[int, float | None]) -> dict[str, bool | None]:
    holds: dict[str, bool | None] = {}
    for small, large in steps:
      before, after = values[small], values[large]
      if before is None or after is None or largest[large] is None:
        holds[f'{small} to {large}'] = None
      else:
        holds[f'{small} to {large}'] = after <= before
    return holds

  failed = measured.at(batch=batches[-1], clipping=scales.CLIPPINGS[-1]).fails
  return [
    claim.Statement(
      'The largest λ diverges at the largest batch.', {batches[-1]: failed}
    ),
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
  words='A smaller λ is needed for stability as the batch grows, and 0.01 is '
  'used at 4096. The numbers of figure 2b could not be read off.',
)
