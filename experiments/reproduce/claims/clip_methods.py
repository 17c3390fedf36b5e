"""AGC beside clipping by the global norm and LARS.

Source: Brock et al. 2021, section 4.
Varied: the method and its threshold, at a medium and at the largest batch. One
  seed for all, the others for the threshold of each method that does best on
  held-out images. The threshold of LARS is its peak learning rate, with optax's
  trust coefficient of 0.001. LARS + AGC takes the best λ of AGC and the two
  best rates of LARS.
Scales: those of batch_size.py, with which it shares runs.
Command: make reproduce-clip-methods SCALE=small
At small: see ../small_scale.py and its rule, ../preregistered.
"""

from collections.abc import Mapping

from experiments.reproduce import claim, scales
from experiments.reproduce.results import Results

_THRESHOLDS: Mapping[str, tuple[float, ...]] = {
  'none': (0.0,),
  'AGC': scales.CLIPPINGS[::2],
  'global norm': (0.1, 0.3, 1.0, 3.0, 10.0),
  'LARS': (1.0, 3.0, 10.0, 30.0),
}


def _batches(scale: str) -> tuple[int, int]:
  _, _, medium, _, largest = scales.batches(scale)
  return medium, largest


def _runs(scale: str, results: Results) -> list[claim.Run]:
  first, *others = scales.SEEDS[scale]
  runs = []
  for batch in _batches(scale):
    best: dict[str, list[float]] = {}  # thresholds, best first
    clipping = None
    for method in (*_THRESHOLDS, 'LARS + AGC'):
      if method in _THRESHOLDS:
        thresholds = _THRESHOLDS[method]
      elif best['LARS'] and best['AGC']:
        thresholds, clipping = tuple(best['LARS'][:2]), best['AGC'][0]
      else:
        continue
      sweep = [
        _run(scale, method, x, batch, first, clipping) for x in thresholds
      ]
      ranked = claim.rank(sweep, results)
      best[method] = [x.labels['threshold'] for x in ranked]
      runs += sweep
      runs += [
        _run(scale, method, x, batch, seed, clipping)
        for x in best[method][:1]
        for seed in others
      ]
  return runs


def _run(
  scale: str,
  method: str,
  threshold: float,
  batch: int,
  seed: int,
  clipping: float | None,
) -> claim.Run:
  """Returns one run; `clipping` is λ of LARS + AGC."""
  net = 'NF + AGC' if 'AGC' in method else 'NF'
  both = method == 'LARS + AGC'
  changes = scales.clip_changes(
    'LARS' if both else method, threshold, scale, batch
  )
  if both:
    changes['optimizer.clipping'] = clipping
  labels = {'method': method, 'threshold': threshold, 'batch': batch}
  labels['seed'] = seed
  return scales.resnet_run(net, scale, batch, seed, changes, labels)


def _statements(measured: claim.Measured) -> list[claim.Statement]:
  medium, largest = _batches(measured.scale)
  norm = measured.best(method='global norm', batch=medium)
  kept = measured.at(
    method='global norm',
    batch=largest,
    threshold=norm.labels.get('threshold'),
  )
  lost = kept.fails
  if lost is False:
    best = measured.best(method='global norm', batch=largest)
    lost = (best.mean or 0.0) - (kept.mean or 0.0) > 5
  agc = {x: measured.best(method='AGC', batch=x) for x in (medium, largest)}
  lars = {x: measured.best(method='LARS', batch=x) for x in (medium, largest)}
  return [
    claim.Statement(
      'The best threshold of the global norm at the medium batch diverges at '
      'the largest, or is 5 points below the best there.',
      {largest: lost},
    ),
    claim.Statement(
      'LARS trains at the largest batch, at every rate.',
      {
        rate: measured.at(method='LARS', batch=largest, threshold=rate).trains
        for rate in _THRESHOLDS['LARS']
      },
    ),
    claim.Statement(
      'AGC beats LARS, each at its best.',
      {x: agc[x].beats(lars[x]) for x in agc},
    ),
  ]


CLAIM = claim.Claim(
  name='clip-methods',
  text='The threshold of clipping by the global norm is sensitive; LARS is '
  'stable, but less accurate than AGC.',
  source='section 4',
  runs=_runs,
  statements=_statements,
  axes=('threshold', 'method'),
  panels='batch',
  words='Clipping by the global norm allows larger batches than none, but its '
  'threshold is sensitive and has to be tuned for each depth, batch size and '
  'learning rate; LARS is stable at large batches and less accurate. There are '
  'no numbers.',
)
