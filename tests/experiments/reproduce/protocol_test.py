"""What was written down before claims were run, and the verdicts by it."""

import math
import random

import pytest
from scipy import stats

from experiments.reproduce import claim, protocol, results, small_clipping
from experiments.reproduce.claims import CLAIMS, latency

NAMES = [*CLAIMS, 'latency']


@pytest.mark.parametrize('count', [2, 3, 5, 30])
def test_the_interval_is_scipys(count):
  draw = random.Random(count)
  a, b = ([draw.gauss(60, 2) for _ in range(count)] for _ in range(2))
  found = protocol.interval([x - y for x, y in zip(a, b, strict=True)])
  low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
  assert found[1:] == pytest.approx((low, high))
  assert found.mean == pytest.approx((low + high) / 2)


def test_the_interval_of_few_or_equal_values():
  assert protocol.interval([1.0]) == (1.0, -math.inf, math.inf)
  assert protocol.interval([2.0, 2.0]) == (2.0, 2.0, 2.0)
  with pytest.raises(ValueError, match='at least one'):
    protocol.interval([])


def _points(missing=0, **by_name):
  points = []
  for name, values in by_name.items():
    by_seed = values if isinstance(values, dict) else dict(enumerate(values))
    points.append(claim.Point({'name': name}, by_seed=by_seed))
  return claim.Points(points, missing)


A, B, C, D = ({'name': name} for name in 'abcd')


@pytest.mark.parametrize(
  ('a', 'b', 'expected'),
  [
    ([61, 62, 63], [59, 60, 61], 'seen'),
    ([61, 62, 63], [59, 61.9, 61.8], 'undecided'),
    ([60.1, 61.1, 62.1], [60, 61, 62.1], 'not seen'),  # below a point
    ([59, 60, 61], [61, 62, 63], 'not seen'),
    ([61, 62], [59, 60], 'incomplete'),
    ([61, 62, 63], {0: 59, 1: 60, 7: 61}, 'incomplete'),  # unpaired
    ([61, 62, 63], [None, None, None], 'seen'),
    ([61, 62, 63], [None, 60, 61], 'undecided'),
    ([61, 62, 63], [], 'incomplete'),
  ],
)
def test_a_difference_is_judged_by_its_interval(a, b, expected):
  hypothesis = protocol.Hypothesis('', a=A, b=B, not_seen_below=1.0)
  found = hypothesis.judge(_points(a=a, b=b), seeds=3, chance=10.0)
  assert found.verdict == expected


def test_effects_are_shown_with_their_interval():
  hypothesis = protocol.Hypothesis('', a=A, b=B)
  found = hypothesis.judge(_points(a=[1, 2, 3], b=[2, 4, 6]), 3, 10.0)
  # Differences of −1, −2 and −3; t is 4.303.
  assert found == ('undecided', '−2.0 (−4.5 to +0.5)', 3)
  single = hypothesis.judge(_points(a=[3], b=[1]), 1, 10.0)
  assert single == ('undecided', '+2.0', 1)
  alone = protocol.Hypothesis('', a=A, seen_above=8.7)
  assert alone.judge(_points(a=[9, 9, 9]), 3, 0.0).effect.startswith('9.00')


def test_an_interaction_is_a_difference_of_differences():
  hypothesis = protocol.Hypothesis('', a=A, b=B, c=C, d=D)
  points = _points(a=[5, 6, 7], b=[1, 2, 3], c=[4, 4, 4], d=[3, 3, 3])
  found = hypothesis.judge(points, 3, 10.0)
  assert found == ('seen', '+3.0 (+3.0 to +3.0)', 3)


@pytest.mark.parametrize(
  ('values', 'missing', 'fails', 'trains'),
  [
    ([None, 12.0, None], 0, 'seen', 'not seen'),
    ([None, 60.0, None], 0, 'undecided', 'undecided'),
    ([60.0, 61.0, 62.0], 0, 'not seen', 'seen'),
    ([60.0, 61.0, 62.0], 1, 'incomplete', 'incomplete'),
    ([60.0, 61.0], 0, 'incomplete', 'incomplete'),
    ([], 0, 'incomplete', 'incomplete'),
  ],
)
def test_failures_are_counted(values, missing, fails, trains):
  points = _points(missing, a=values) if values else claim.Points([])
  for field, expected in (('fails', fails), ('trains', trains)):
    hypothesis = protocol.Hypothesis('', failed_below=30.0, **{field: A})
    assert hypothesis.judge(points, 3, 10.0).verdict == expected


def test_a_hypothesis_has_one_rule():
  for fields in ({}, {'a': A, 'fails': B}, {'a': A, 'b': B, 'c': C}):
    with pytest.raises(ValueError, match=r"'x' needs a"):
      protocol.Hypothesis('x', **fields)


def test_a_text_without_a_rule_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(results, 'PREREGISTERED', tmp_path)
  (tmp_path / 'x.md').write_text('# Only words')
  with pytest.raises(ValueError, match=r'x.md has 0 blocks of TOML'):
    protocol.read('x')
  (tmp_path / 'y.md').write_text('```toml\nseeds = 3\n```\n')
  with pytest.raises(ValueError, match=r'y.md: .*hypothesis'):
    protocol.read('y')


def test_the_rows_fit_into_three_hours():
  minutes = {name: protocol.read(name).minutes for name in NAMES}
  assert sum(minutes.values()) <= 180
  assert minutes.pop('batch-size') <= 60
  assert max(minutes.values()) <= 25
  assert sorted(results.digests()) == sorted(NAMES)


def _complete(name):
  """The results of a claim at `small`, as they come, and its runs."""
  found = {}
  before = -1
  while len(found) > before:
    before = len(found)
    runs = CLAIMS[name].runs('small', found)
    for run in runs:
      found.setdefault(
        run.name,
        {
          'fingerprint': claim.fingerprint(run, found),
          'status': 'finished',
          'top_1': 0.6 + 0.001 * run.config.seed,
          'held_out_top_1': 0.6,
        },
      )
  return found, runs


@pytest.mark.parametrize('name', CLAIMS)
def test_the_runs_are_those_that_were_written_down(name):
  text = protocol.read(name)
  assert text.seeds >= 3
  found, runs = _complete(name)
  measured = claim.Measured(CLAIMS[name], 'small', found)
  assert measured.missing == 0
  judged = text.judge(measured)
  assert {x.verdict for x in judged} <= {'seen', 'not seen', 'undecided'}
  if name == 'batch-size':
    assert judged[0].seeds == len(small_clipping.MANY_SEEDS) == 5
  for run in runs:
    fields = run.config.to_dict()
    flat = {
      f'{part}.{key}': value
      for part, values in fields.items()
      if isinstance(values, dict)
      for key, value in values.items()
    }
    for field, value in text.config.items():
      if run.after is None or field != 'epochs':
        assert {**fields, **flat}[field] == value, (run.name, field)
    # The method is the paper's.
    if run.config.model.name.startswith('nf_resnet'):
      assert run.config.model.skipinit
    if run.config.optimizer.clip == 'agc':
      assert run.config.optimizer.clip_eps == 1e-3
      assert run.config.optimizer.clipping in (0.01, 0.02, 0.04, 0.08, 0.16)


def test_nf_and_bn_differ_in_normalization_alone():
  for name in ('batch-size', 'transfer', 'microbatch'):
    _, runs = _complete(name)
    nets = {'NF': {}, 'BN': {}}
    for run in runs:
      labels = dict(run.labels)
      net = labels.pop('net')
      # The rate of fine-tuning is chosen for each.
      if net in nets and 'rate' not in labels:
        nets[net][tuple(labels.items())] = run.config
    assert nets['NF'].keys() == nets['BN'].keys() != set()
    for key, nf in nets['NF'].items():
      nf, bn = nf.to_dict(), nets['BN'][key].to_dict()
      ours, theirs = nf.pop('model'), bn.pop('model')
      assert nf == bn
      # SkipInit takes the place of normalization's scale.
      shared = ours.keys() & theirs.keys() - {'name', 'skipinit'}
      assert {k: ours[k] for k in shared} == {k: theirs[k] for k in shared}
      assert ours.get('stochdepth_rate') == 0.0 == theirs['stochdepth_rate']


def test_latency_is_judged_by_rounds():
  text = protocol.read('latency')
  points = claim.Points(
    claim.Point({'model': model}, by_seed={0: 4.0, 1: 4.1, 2: 4.2})
    for model in latency.MODELS
  )
  judged = text.judge(points)
  assert [x.verdict for x in judged] == ['not seen', 'seen', 'undecided']
