"""The claims of the paper: their runs, their results and the report."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import psutil
import pytest

from experiments import digits
from experiments.benchmarks import speed
from experiments.reproduce import latency, paper, report, results, rows, sweep
from nfnets_jax.data import prepare
from nfnets_jax.models import variants
from nfnets_jax.training import build, check, fit, train, train_step
from nfnets_jax.training import config as defaults
from tests import steps

ALL = [(scale, row) for scale in rows.SCALES for row in rows.ROWS.values()]
IDS = [f'{row.name}-{scale}' for scale, row in ALL]


@pytest.mark.parametrize(('scale', 'row'), ALL, ids=IDS)
def test_runs_have_names_of_their_own_and_sound_configs(scale, row):
  runs = row.runs(scale, {})
  assert runs
  assert len({run.name for run in runs}) == len(runs)
  for run in runs:
    check.check_config(run.config, 1)
    build.create_net(run.config, 10)  # called by its own name
    build.create_optimizer(run.config, lambda step: 0.0)
    json.dumps(run.labels)
    assert run.name.startswith(f'{scale}/')
    assert run.after is None or run.after in {x.name for x in runs}
    # The report draws these; what prepares another run is not drawn.
    if 'part' not in run.labels:
      assert {*row.axes, row.panels or row.axes[0]} <= {*run.labels}


def test_runs_that_differ_are_never_called_the_same():
  for scale in rows.SCALES:
    marks: dict[str, str] = {}
    for row in rows.ROWS.values():
      for run in row.runs(scale, {}):
        mark = rows.fingerprint(run, {})
        assert marks.setdefault(run.name, mark) == mark


def _shrunk(config):
  """The same net and recipe, with a block a stage, few channels and pixels."""
  config = config.copy_and_resolve_references()
  model = config.model
  stages = len(model.depth)
  # What is left out of AGC is told by the numbers of the blocks.
  if config.optimizer.unclipped == defaults.get_config().optimizer.unclipped:
    model.depth = (1,) * stages
  model.width = (32,) * stages
  if 'group_width' in model:
    model.group_width = (16,) * stages
    model.stem_width = (8,) * len(model.stem_width)
  else:
    model.stem_width = 8
  config.batch_size = 8
  config.data.image_size = config.data.eval_image_size = 32
  return config


def _paper_configs():
  """A config for each way of training at the paper's scale."""
  found = {}
  for row in rows.ROWS.values():
    for run in row.runs('paper', {}):
      config = _shrunk(run.config)
      config.seed = 0
      # λ and the rate change nothing in what has to build.
      config.optimizer.clipping = 0.01
      config.optimizer.learning_rate_per_256 = 0.1
      config.optimizer.max_norm = 1.0
      config.data.classes = None
      config.data.train_split = 'train'
      config.init_new_head = False
      config.optimizer.weight_decay = 1e-4
      if config.optimizer.learning_rate_groups is not None:
        config.optimizer.learning_rate_groups = '/w$=1,.=0.1'
      # Nor do depth, now that it is 1, and the strength of what is on.
      family = variants.get(config.model.name).family
      config.model.name = {
        'nf_resnet': 'nf_resnet50',
        'resnet': 'resnet50',
        'nfnet': 'nfnet_f0',
      }[family]
      if config.model.get('drop_rate'):
        config.model.drop_rate = 0.2
      if config.augment.rand_augment is not None:
        config.augment.rand_augment = '2x5'
      found.setdefault(config.to_json(sort_keys=True), (run.name, config))
  return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize(
  'config', [pytest.param(c, id=name) for name, c in _paper_configs()]
)
def test_a_shrunk_step_of_the_paper(config):
  """A block a stage, few channels, pixels and images; one of equal ways."""
  net = build.create_net(config, 10)
  optimizer = build.create_optimizer(config, lambda step: 0.01)
  state = train_step.init_state(net, optimizer, 0, config.data.image_size)
  step = steps.constant_step(config, net, optimizer)
  count = config.batch_size
  rng = np.random.default_rng(0)
  shape = (1, count, config.data.image_size, config.data.image_size, 3)
  batch = {
    'image': rng.integers(256, size=shape, dtype=np.uint8),
    'label': np.arange(count, dtype=np.int32)[None] % 10,
    'mix_label': np.zeros((1, count), np.int32),
    'ratio': np.full((1, count), 0.7, np.float32),
  }
  mapped = jax.vmap(step, in_axes=(None, 0), out_axes=None, axis_name='devices')
  new, metrics = jax.jit(mapped)(state, batch)
  assert np.isfinite(metrics['loss'])
  moved = optax.tree.norm(optax.tree.sub(new.params, state.params))
  assert float(moved) > 0


def _result(run, top_1=0.5, held_out=None, others=None):
  finished = top_1 is not None
  return {
    'name': run.name,
    'labels': dict(run.labels),
    'fingerprint': rows.fingerprint(run, others or {}),
    'workdir': f'runs/{run.name}',
    'status': 'finished' if finished else 'diverged',
    'message': 'loss is nan at step 3',
    'top_1': top_1,
    'held_out_top_1': held_out,
    'seconds': 1.0,
    **results.machine(),
  }


def test_the_clipping_is_chosen_by_what_is_held_out():
  row = rows.ROWS['batch-size']
  first = row.runs('small', {})
  assert {run.config.seed for run in first if 'AGC' in run.labels['net']} == {0}
  found = {
    # The test accuracy says another λ, and counts for nothing.
    run.name: _result(
      run,
      top_1=run.config.optimizer.clipping,
      held_out=1 - abs(run.config.optimizer.clipping - 0.04),
    )
    for run in first
  }
  runs = row.runs('small', found)
  assert {run.name for run in first} < {run.name for run in runs}
  # Those that served to choose are kept and not drawn.
  then = [
    x for x in runs if 'AGC' in x.labels['net'] and 'part' not in x.labels
  ]
  assert {run.config.optimizer.clipping for run in then} == {0.04}
  assert {run.config.seed for run in then} == {0, 1}
  assert len(then) == 2 * len(paper.BATCH_SIZES)


def test_lars_with_agc_takes_what_each_does_best_with():
  row = rows.ROWS['clip-methods']
  first = row.runs('small', {})
  assert 'LARS + AGC' not in {run.labels['method'] for run in first}
  best = {128: 0.16, 512: 0.04}
  rates = {128: (3.0, 30.0), 512: (10.0, 1.0)}
  found = {}
  for run in first:
    batch, threshold = run.labels['batch'], run.labels['threshold']
    held_out = 0.5 if threshold == best[batch] else 0.4
    if run.labels['method'] == 'LARS' and threshold in rates[batch]:
      held_out = 0.6 - 0.1 * rates[batch].index(threshold)
    found[run.name] = _result(run, held_out=held_out)
  both = [
    run
    for run in row.runs('small', found)
    if run.labels['method'] == 'LARS + AGC'
  ]
  assert {run.labels['batch'] for run in both} == {*best}
  for run in both:
    assert run.config.optimizer.clipping == best[run.labels['batch']]
    assert run.labels['threshold'] in rates[run.labels['batch']]
  assert len(both) == 4


def test_what_another_config_gave_counts_for_nothing():
  row = rows.ROWS['batch-size']
  found = {x.name: _result(x, held_out=0.5) for x in row.runs('small', {})}
  sweep_of_32 = [
    x
    for x in row.runs('small', {})
    if x.labels['net'] == 'NF + AGC' and x.labels['batch'] == 32
  ]
  assert len(row.runs('small', found)) == len(found) + len(paper.BATCH_SIZES)
  found[sweep_of_32[0].name]['fingerprint'] = '00000000'
  # λ for that batch has to be chosen anew, and until then its runs are open.
  assert len(row.runs('small', found)) == len(found) + 4
  _, used, missing = report.points(row, 'small', found)
  assert missing == 1 + 4
  assert sweep_of_32[0].name not in {x['name'] for x in used}


def test_what_is_chosen_by_was_neither_trained_on_nor_tested():
  def places(split):
    name, _, rest = split.partition('[')
    first, _, last = rest.rstrip(']').partition(':')
    return name, int(first or 0), int(last or 10**9)

  for scale, row in ALL:
    for run in row.runs(scale, {}):
      if run.held_out is not None:
        name, first, last = places(run.held_out)
        for split in (run.config.data.train_split, run.config.data.test_split):
          other, begins, ends = places(split)
          assert other != name or ends <= first or last <= begins, run.name


def test_a_fingerprint_tells_what_and_not_where():
  (run, *_) = rows.ROWS['microbatch'].runs('small', {})
  mark = rows.fingerprint(run, {})
  run.config.data.data_dir = '/elsewhere'
  run.config.data.num_workers = 3
  assert rows.fingerprint(run, {}) == mark
  run.config.optimizer.weight_decay = 0.5
  assert rows.fingerprint(run, {}) != mark


def test_half_a_line_is_no_result(tmp_path):
  path = tmp_path / 'results.jsonl'
  results.append(path, {'name': 'a', 'top_1': 0.5})
  with path.open('a') as file:
    file.write('{"name": "b", "top')
  assert [*results.read(tmp_path)] == ['a']
  results.append(path, {'name': 'b', 'top_1': 0.25})
  results.append(tmp_path / 'results-2-of-2.jsonl', {'name': 'c'})
  assert {*results.read(tmp_path)} == {'a', 'b', 'c'}
  path.write_text('{"name": "b", "top\n{"name": "c"}\n')
  with pytest.raises(ValueError, match='results.jsonl:1 is no JSON'):
    results.read(tmp_path)


def test_slices_share_all_runs_and_keep_what_belongs_together(tmp_path):
  runs = rows.ROWS['transfer'].runs('small', {})
  parts = [sweep.Sweep(tmp_path, {}, (i, 3)) for i in (1, 2, 3)]
  owners = {
    run.name: [i for i, part in enumerate(parts) if part.mine(run)]
    for run in runs
  }
  assert all(len(x) == 1 for x in owners.values())
  assert len({x[0] for x in owners.values()}) == 3
  for run in runs:
    assert run.after is None or owners[run.after] == owners[run.name]


def _digits_row(data_dir):
  """Runs of a few steps: one that ends, one after it, one that fails, and one
  that cannot be made on eight devices, with one after it.
  """

  def runs(scale, found):
    del scale, found
    made = []
    for name, rate, after in (
      ('first', 0.1, None),
      ('then', 0.1, 'first'),
      ('bad', 1e12, None),
      ('odd', 0.1, None),
      ('after odd', 0.1, 'odd'),
    ):
      config = digits.get_config()
      config.model.depth = (1, 1, 1)
      config.epochs = config.eval_every_epochs = 0.5
      config.checkpoint_every_epochs = 0.5
      config.data.data_dir = str(data_dir)
      config.data.train_split = 'train[:400]'
      config.optimizer.warmup_epochs = 0.1
      config.optimizer.learning_rate_per_256 = rate
      config.optimizer.clip = None
      config.max_loss = 20.0
      if name == 'odd':
        config.batch_size = 60
      labels = {'batch': name, 'net': 'NF', 'seed': 0}
      config.ema_decay = 0.99999 if name == 'first' else 0.0
      held_out = 'train[400:500]' if name == 'first' else None
      made.append(rows.Run(name, labels, config, after, held_out))
    return made

  return rows.Row('microbatch', 'claim', 'source', runs, ('batch', 'net'))


_WORKER = """
import os, pathlib, time
from experiments.reproduce import sweep
jobs = len(os.sched_getaffinity(0)) + 1
with sweep.Sweep(pathlib.Path(), {}, jobs=jobs)._workers() as workers:
  print(workers.submit(os.getpid).result(), flush=True)
  time.sleep(600)
"""


@pytest.mark.slow
def test_workers_end_with_a_killed_sweep():
  """Also where there are more of them than cores."""
  root = pathlib.Path(__file__).parents[1]
  command = [sys.executable, '-c', _WORKER]
  with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) as parent:
    worker = psutil.Process(int(parent.stdout.readline()))
    assert worker.is_running()
    parent.kill()
    worker.wait(timeout=30)


@pytest.mark.parametrize(
  ('error', 'message'),
  [
    (fit.TooLargeError('a step needs 9 GiB'), 'a step needs 9 GiB'),
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 9\nof 8'), 'RESOURCE_'),
    (ValueError('a bug'), None),
    (jax.errors.JaxRuntimeError('INTERNAL: a bug'), None),
  ],
  ids=str,
)
def test_only_what_a_machine_is_too_small_for_is_passed_over(
  error, message, tmp_path, monkeypatch
):
  def train_and_evaluate(config, folder):
    raise error

  monkeypatch.setattr(train, 'train_and_evaluate', train_and_evaluate)
  run = _digits_row(tmp_path).runs('small', {})[0]
  runner = sweep.Sweep(tmp_path, {})
  if message is None:
    with pytest.raises(type(error), match='a bug'):
      runner.make(run)
    return
  result = runner.make(run)
  assert result['status'] == 'refused'
  assert result['message'].startswith(message)
  assert str(error) in (tmp_path / 'log.txt').read_text()


def test_a_sweep_ends_with_what_it_could_not_make(tmp_path, monkeypatch):
  def runs(scale, found):
    return [
      x for x in _digits_row(tmp_path).runs(scale, found) if 'odd' in x.name
    ]

  row = dataclasses.replace(_digits_row(tmp_path), runs=runs)
  monkeypatch.setattr(rows, 'ROWS', {'microbatch': row})
  prepare.prepare('digits', tmp_path)
  args = ['--row=microbatch', '--data_name=digits', '--jobs=1']
  places = [f'--data_dir={tmp_path}', f'--output={tmp_path / "out"}']
  with pytest.raises(SystemExit, match=r'(?s)made here:.*odd: .*60 is not div'):
    sweep.main([*args, *places])


@pytest.mark.slow
def test_a_sweep_makes_what_is_missing_and_no_more(tmp_path, capsys):
  prepare.prepare('digits', tmp_path / 'data')
  row = _digits_row(tmp_path / 'data')
  output = tmp_path / 'out'
  output.mkdir()
  runner = sweep.Sweep(output, {})
  assert runner.execute(row, 'small') == 0
  found = results.read(output)
  assert [found[x]['status'] for x in ('first', 'then', 'bad')] == [
    'finished',
    'finished',
    'diverged',
  ]
  assert 0 <= found['first']['held_out_top_1'] <= 1
  assert found['first']['top_1'] == found['first']['report']['ema_eval_top_1']
  assert 'step' in found['bad']['message']
  assert runner.refused.keys() == {'odd'}
  assert '60 is not divisible by 8' in runner.refused['odd']
  written = (output / 'results.jsonl').read_text()
  assert runner.execute(row, 'small') == 0
  assert (output / 'results.jsonl').read_text() == written
  # Another config of the same name is made again.
  again = row.runs('small', {})[0]
  again.config.optimizer.weight_decay = 0.1
  assert [run.name for run in runner.missing([again], found)] == ['first']
  # The second began with the weights of the first.
  config = json.loads(
    (output / found['then']['workdir'] / 'config.json').read_text()
  )
  assert config['init_from'].endswith(found['first']['workdir'])
  grouped, used, missing = report.points(row, 'small', found)
  assert (len(grouped), len(used), missing) == (3, 3, 2)
  assert str(grouped[2]) == '1 diverged'


def test_the_report_says_what_was_seen_and_what_is_missing(tmp_path):
  with pytest.raises(FileNotFoundError, match='no results in'):
    report.write(tmp_path)
  path = tmp_path / 'results.jsonl'
  row = rows.ROWS['microbatch']
  runs = row.runs('small', {})
  for i, run in enumerate(runs[:-2]):
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
  assert '50.0; 1 diverged' in text
  assert '2 runs are not made yet' in text
  assert '69.9' in text  # the paper's
  assert '0.45 (0.40 to 0.50)' in text
  assert text.count('data:image/png;base64,') == 2
  assert (tmp_path / 'microbatch-small.png').read_bytes()[:4] == b'\x89PNG'


@pytest.mark.parametrize('scale', rows.SCALES)
@pytest.mark.parametrize('name', [*rows.ROWS])
def test_every_row_is_drawn(name, scale, tmp_path):
  row = rows.ROWS[name]
  found = {}
  for i, run in enumerate(row.runs(scale, {})):
    top_1 = 0.4 if i % 5 else None
    found[run.name] = _result(run, top_1, held_out=0.4, others=found)
  grouped, _, _ = report.points(row, scale, found)
  figure = report.draw(row, grouped, name)
  labels = {text.get_text() for text in figure.axes[-1].get_legend().texts}
  assert labels == {str(point.labels[row.axes[1]]) for point in grouped}


@pytest.mark.slow
def test_latency_is_counted_timed_and_not_repeated(tmp_path, capsys):
  small = ('resnet50', latency.REFERENCE, 'efficientnet_b0')
  latency.execute(tmp_path, 'small', small, image_size=32)
  found = results.read(tmp_path)
  assert {*found} == {latency.name_of('small', model) for model in small}
  b0 = found['small/latency/efficientnet_b0']
  assert b0['params'] == 5_288_548
  assert len(b0['ratios']) == len(b0['step_seconds']) > 0
  capsys.readouterr()
  latency.execute(tmp_path, 'small', small, image_size=32)
  assert capsys.readouterr().out == ''


@pytest.mark.parametrize('large', ['resnet50', latency.REFERENCE])
def test_what_does_not_fit_is_counted_but_not_run(large):
  def program(model):
    needed = 10**15 if model == large else 1
    return speed.Program(
      run=pytest.fail,
      compile_seconds=1.0,
      temporaries=0,
      memory=needed,
    )

  result = latency._measured(
    'resnet50', program('resnet50'), program(latency.REFERENCE), 'small', None
  )
  assert result['status'] == 'too large'
  assert result['message'].startswith(f'{large} needs 1000000 GB of ')
  assert round(result['params'] / 1e6, 2) == 25.55
  assert 'ratios' not in result
  assert not latency._is_missing(result)
  result['too_large_for'] -= 1
  assert latency._is_missing(result)


def test_what_has_run_for_long_has_two_rounds(monkeypatch):
  def rounds():
    times = latency._time_both(lambda: None, lambda: None, 5)
    return {len(x) for x in times.values()}

  assert rounds() == {5}
  monkeypatch.setattr(latency, '_ENOUGH_SECONDS', 0.0)
  assert rounds() == {2}


def test_what_cannot_be_is_refused(tmp_path, capsys):
  with pytest.raises(SystemExit):
    sweep.main(['--slice=5/4'])
  assert "'5/4' is no part" in capsys.readouterr().err
  with pytest.raises(SystemExit, match=r'error: .*prepare'):
    sweep.main(['--row=clipping', f'--data_dir={tmp_path}'])
