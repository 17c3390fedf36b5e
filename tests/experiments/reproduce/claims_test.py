"""The claims of the paper: runs, fingerprints, verdicts, and the report."""

import functools
import json
import pathlib

import numpy as np
import pytest

from experiments.reproduce import (
  claim,
  figures,
  paper,
  protocol,
  report,
  results,
  scales,
  small_clipping,
)
from experiments.reproduce.claims import CLAIMS, latency
from nfnets_jax.training import build, check

STORED = pathlib.Path(__file__).parents[3] / 'experiments/reproduce/small'


@functools.cache
def _runs(scale, name):
  """The runs that are known without results; not to be changed."""
  return CLAIMS[name].runs(scale, {})


ALL = [(scale, name) for scale in scales.SCALES for name in CLAIMS]


@pytest.mark.parametrize(('scale', 'name'), ALL)
def test_runs_have_unique_names_and_valid_configs(scale, name):
  runs = _runs(scale, name)
  assert runs
  assert len({run.name for run in runs}) == len(runs)
  built = set()
  for run in runs:
    json.dumps(run.labels)
    assert run.name.startswith(f'{scale}/')
    assert run.after is None or run.after in {x.name for x in runs}
    # The report draws these.
    if 'part' not in run.labels:
      axes = CLAIMS[name].axes
      assert {*axes, CLAIMS[name].panels or axes[0]} <= {*run.labels}
    config = run.config.to_dict()
    del config['seed']
    if (key := json.dumps(config)) not in built:
      built.add(key)
      check.check_config(run.config, 1)
      build.create_net(run.config, 10)
      build.create_optimizer(run.config, lambda step: 0.0)


def test_different_runs_have_different_names():
  fingerprints: dict[str, str] = {}
  for name in CLAIMS:
    for run in _runs('small', name):
      if run.after is None:
        found = claim.fingerprint(run, {})
        assert fingerprints.setdefault(run.name, found) == found


def _result(run, top_1=0.5, held_out=None, others=None):
  finished = top_1 is not None
  return {
    'name': run.name,
    'labels': dict(run.labels),
    'fingerprint': claim.fingerprint(run, others or {}),
    'workdir': f'runs/{run.name}',
    'status': 'finished' if finished else 'diverged',
    'message': 'loss is nan at step 3',
    'top_1': top_1,
    'held_out_top_1': held_out,
    'seconds': 1.0,
    **results.machine(),
  }


def test_the_clipping_is_chosen_by_held_out_accuracy():
  first = _runs('small', 'batch-size')
  assert {run.config.seed for run in first if 'part' in run.labels} == {0}
  found = {
    # Test accuracy prefers another λ and must not count.
    run.name: _result(
      run,
      top_1=run.config.optimizer.clipping,
      held_out=1 - abs(run.config.optimizer.clipping - 0.04),
    )
    for run in first
  }
  runs = CLAIMS['batch-size'].runs('small', found)
  assert {run.name for run in first} < {run.name for run in runs}
  drawn = [
    x for x in runs if 'AGC' in x.labels['net'] and 'part' not in x.labels
  ]
  assert {run.config.optimizer.clipping for run in drawn} == {0.04}
  seeds = {b: [] for b in small_clipping.BATCHES}
  for run in drawn:
    seeds[run.labels['batch']].append(run.config.seed)
  assert seeds == {32: [0, 1, 2], 128: [0, 1, 2], 512: [0, 1, 2, 3, 4]}


def test_lars_with_agc_takes_the_best_of_each():
  row = CLAIMS['clip-methods']
  first = _runs('gpu', 'clip-methods')
  assert 'LARS + AGC' not in {run.labels['method'] for run in first}
  best = {1024: 0.16, 4096: 0.04}
  rates = {1024: (3.0, 30.0), 4096: (10.0, 1.0)}
  found = {}
  for run in first:
    batch, threshold = run.labels['batch'], run.labels['threshold']
    held_out = 0.5 if threshold == best[batch] else 0.4
    if run.labels['method'] == 'LARS' and threshold in rates[batch]:
      held_out = 0.6 - 0.1 * rates[batch].index(threshold)
    found[run.name] = _result(run, held_out=held_out)
  both = [
    run
    for run in row.runs('gpu', found)
    if run.labels['method'] == 'LARS + AGC'
  ]
  assert {run.labels['batch'] for run in both} == {*best}
  for run in both:
    assert run.config.optimizer.clipping == best[run.labels['batch']]
    assert run.labels['threshold'] in rates[run.labels['batch']]
  assert len(both) == 4


def test_the_result_of_another_config_does_not_count():
  row = CLAIMS['batch-size']
  first = _runs('small', 'batch-size')
  found = {x.name: _result(x, held_out=0.5) for x in first}
  assert len(row.runs('small', found)) == len(found) + 8
  outdated = next(
    x for x in first if x.labels['net'] == 'NF + AGC' and x.config.seed == 0
  )
  assert outdated.labels['batch'] == 32
  found[outdated.name]['fingerprint'] = '00000000'
  # λ for batch 32 is unknown again, and with it the runs of the other seeds.
  assert len(row.runs('small', found)) == len(found) + 6
  measured = claim.Measured(row, 'small', found)
  assert measured.missing == 1 + 6
  assert outdated.name not in {x['name'] for x in measured.results}


def test_held_out_images_are_in_no_other_split():
  def interval(split):
    name, _, rest = split.partition('[')
    first, _, last = rest.rstrip(']').partition(':')
    return name, int(first or 0), int(last or 10**9)

  for scale, row in ALL:
    for run in _runs(scale, row):
      if run.held_out is not None:
        name, first, last = interval(run.held_out)
        for split in (run.config.data.train_split, run.config.data.test_split):
          other, start, end = interval(split)
          assert other != name or end <= first or last <= start, run.name


def test_a_fingerprint_ignores_where_a_run_is_made():
  run = CLAIMS['microbatch'].runs('small', {})[0]
  before = claim.fingerprint(run, {})
  run.config.data.data_dir = '/elsewhere'
  run.config.data.num_workers = 3
  assert claim.fingerprint(run, {}) == before
  run.config.optimizer.weight_decay = 0.5
  assert claim.fingerprint(run, {}) != before


def test_points_are_compared_between_seeds():
  def point(*top_1, diverged=0):
    return claim.Point(top_1=list(top_1), diverged=[7] * diverged)

  low, high, between = point(50.0, 51.0), point(52.0, 53.0), point(50.5, 52.5)
  assert high.beats(low)
  assert not low.matches(high)
  assert between.matches(high)
  assert not between.beats(low)
  failed = point(60.0, diverged=1)
  assert low.beats(failed)
  assert not failed.matches(low)
  assert failed.fails
  assert failed.mean == 60.0  # of the seeds that finished
  missing = claim.Point()
  assert missing.beats(low) is low.matches(missing) is missing.fails is None


@pytest.mark.parametrize(
  ('holds', 'verdict'),
  [
    ([True, True], 'reproduced'),
    ([True, False], 'partly reproduced'),
    ([False], 'not reproduced'),
    ([True, None], 'incomplete'),
    ([], 'incomplete'),
  ],
)
def test_verdicts(holds, verdict):
  statement = claim.Statement('', dict(enumerate(holds)))
  assert statement.verdict == verdict


@pytest.mark.parametrize('name', CLAIMS)
def test_stored_results_are_complete(name):
  """Else a config has changed: restore it, or run the claim again."""
  measured = claim.Measured(CLAIMS[name], 'small', results.read(STORED))
  assert measured.points
  assert measured.missing == 0
  digests = {x['preregistered'][name] for x in measured.results}
  assert digests == {protocol.read(name).digest}


@pytest.mark.parametrize('name', CLAIMS)
def test_the_statements_can_be_decided_at_the_papers_scale(name):
  found: dict = {}
  before = -1
  while len(found) > before:  # as runs depend on results
    before = len(found)
    for run in (
      CLAIMS[name].runs('paper', found) if found else _runs('paper', name)
    ):
      if run.config.seed == 0 and run.name not in found:
        found[run.name] = _result(run, 0.4, held_out=0.4, others=found)
  measured = claim.Measured(CLAIMS[name], 'paper', found)
  statements = CLAIMS[name].statements(measured)
  assert claim.verdict(statements) != 'incomplete'
  # Without results nothing is decided.
  measured.points = []
  statements = CLAIMS[name].statements(measured)
  assert {x for each in statements for x in each.holds.values()} <= {None}


@pytest.mark.parametrize(
  ('scale', 'name'),
  [('small', name) for name in CLAIMS]
  + [('paper', 'ablation'), ('paper', 'regularisation')],
)
def test_every_claim_is_drawn(scale, name):
  each = CLAIMS[name]
  found: dict = {}
  for i, run in enumerate(_runs(scale, name)):
    top_1 = 0.4 if i % 3 else None
    found[run.name] = _result(run, top_1, held_out=0.4, others=found)
  measured = claim.Measured(each, scale, found)
  figure = figures.draw(each, measured)
  (legend,) = figure.legends
  labels = [text.get_text() for text in legend.texts]
  for point in measured.points:
    assert str(point.labels[each.axes[1]]) in labels
  crosses = [
    (axis, x)
    for axis in figure.axes
    for x in axis.lines
    if x.get_marker() == 'x'
  ]
  diverged = sum(len(x.diverged) for x in measured.points)
  assert len(crosses) == diverged > 0
  for axis, cross in crosses:  # at the step, not at an accuracy
    assert 'step' in axis.get_ylabel() or axis.get_ylim()[1] < 10
    assert cross.get_ydata()[0] in (0, 3)
  # The paper's curve has the differences of the paper's numbers.
  curve = each.paper(scale).top_1 if each.paper else {}
  dashed = [
    x for axis in figure.axes for x in axis.lines if x.get_linestyle() == '--'
  ]
  drawn = {figures._key(each, x) for x in measured.points}
  theirs = sorted(curve[x] for x in drawn & curve.keys() if curve[x])
  ours = sorted(y for line in dashed for y in line.get_ydata())
  assert len(ours) == len(theirs)
  shifts = np.subtract(theirs, ours)
  assert np.allclose(shifts, np.round(shifts[:1]) if scale == 'small' else 0)


def test_seeds_that_did_not_diverge_are_drawn():
  each = CLAIMS['microbatch']
  found = {
    run.name: _result(run, None if run.config.seed else 0.45)
    for run in _runs('small', 'microbatch')
  }
  axis, below = figures.draw(each, claim.Measured(each, 'small', found)).axes[
    :2
  ]
  hollow = [
    x.get_ydata()[0]
    for x in axis.lines
    if x.get_marker() == 'o' and x.get_mfc() == axis.get_facecolor()
  ]
  assert hollow == [45.0] * 6
  assert [x.get_ydata()[0] for x in below.lines] == [3] * 12


def test_labels_of_latencies_do_not_overlap():
  stored = results.read(STORED)
  measured = {
    model: float(np.median(stored[latency.name_of('small', model)]['ratios']))
    for model in latency.MODELS
  }
  # Also nets that are almost equally fast.
  close = {x: 1 + i / 100 for i, x in enumerate(latency.MODELS)}
  for ratios in (measured, close):
    figure = figures.draw_latency(ratios, 'small')
    figure.draw_without_rendering()
    boxes = [x.get_window_extent() for x in figure.axes[0].texts]
    assert len(boxes) == len(ratios.keys() & paper.LATENCY)
    for i, box in enumerate(boxes):
      assert not any(box.overlaps(x) for x in boxes[:i])


def test_the_report_says_what_was_measured_and_what_is_missing(tmp_path):
  with pytest.raises(FileNotFoundError, match='no results in'):
    report.write(tmp_path)
  path = tmp_path / 'results.jsonl'
  for i, run in enumerate(_runs('small', 'microbatch')[:-2]):
    results.append(path, _result(run, top_1=None if i == 1 else 0.5 + i / 100))
  results.append(
    path,
    {
      'name': latency.name_of('small', 'nfnet_f0'),
      'labels': {'model': 'nfnet_f0', 'batch': 2},
      'params': 71_489_284,
      'gmacs_test': 12.38,
      'size': 192,
      'status': 'finished',
      'step_seconds': [1.0, 1.1],
      'ratios': [0.4, 0.5],
      'seconds': 9.0,
    },
  )
  text = report.write(tmp_path).read_text()
  assert '51.0 (50.0 to 52.0, 2 seeds); 1 diverged' in text
  assert '2 runs are missing' in text
  assert '69.9' in text  # the paper's
  assert '0.45 (0.40 to 0.50)' in text
  # The table at the top has a row for each claim.
  overview, _, sections = text.partition('id="microbatch-small"')
  assert overview.count('<a href="#') == len(CLAIMS) + 1
  assert sections.count('<h2 id=') == 1  # latency
  assert 'href="#microbatch-small"' in overview
  assert '−2.0 at 1024' in overview  # on one GPU
  # Paired by seed, and chance for the seed that diverged: −3, −44 and −3.
  effect = '<td>−16.7 (−75.5 to +42.1)</td>'
  assert f'<b class="undecided">◌ undecided</b></td>{effect}' in overview
  assert f'{effect}<td>3</td><td><b class="undecided">' in sections
  assert protocol.read('microbatch').digest in sections
  # Each figure for a light and a dark page.
  assert text.count('data:image/png;base64,') == 2 * 2
  assert text.count('media="(prefers-color-scheme: dark)"') == 2
  assert (tmp_path / 'microbatch-small.png').read_bytes()[:4] == b'\x89PNG'
  text = (tmp_path / 'report.md').read_text()
  assert '| −16.7 (−75.5 to +42.1) | 3 | **◌ undecided** |' in text
  assert '](microbatch-small.png)' in text


def test_the_report_says_that_a_text_has_changed(tmp_path):
  found = {}
  for run in _runs('small', 'microbatch'):
    found[run.name] = {**_result(run), 'preregistered': {'microbatch': 'x'}}
  section = report.claim_section(CLAIMS['microbatch'], 'small', found, tmp_path)
  assert '18 of 18 results were made when its digest was x.' in str(section)


def test_the_report_shows_whether_the_baseline_overfits(tmp_path):
  found: dict = {}
  curve = [
    {'step': 1, 'train_top_1': 0.5, 'top_1': 0.4, 'loss': 1.5},
    {'step': 2, 'train_top_1': 0.98, 'top_1': 0.4, 'loss': 2.0},
  ]
  for _ in range(2):  # first λ is chosen
    for run in CLAIMS['regularisation'].runs('small', found):
      digests = {'preregistered': results.digests()}
      found[run.name] = {**_result(run), **digests, 'curve': curve}
  section = report.claim_section(
    CLAIMS['regularisation'], 'small', found, tmp_path
  )
  assert (
    'wide, none should overfit: final training accuracies 98.0, 98.0, '
    in str(section)
  )
  assert 'test loss 1.50 at its least and 2.00 at the end' in str(section)
