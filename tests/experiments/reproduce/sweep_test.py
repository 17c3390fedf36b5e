"""The sweep over the runs of a claim, its results, and the latencies."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import psutil
import pytest

from experiments import digits
from experiments.benchmarks import speed
from experiments.reproduce import claim, results, runner, sweep
from experiments.reproduce.claims import CLAIMS, latency
from nfnets_jax.data import prepare
from nfnets_jax.training import fit, train


def test_half_a_line_is_not_a_result(tmp_path):
  path = tmp_path / 'results.jsonl'
  results.append(path, {'name': 'a', 'top_1': 0.5})
  with path.open('a') as file:
    file.write('{"name": "b", "top')
  assert [*results.read(tmp_path)] == ['a']
  results.append(path, {'name': 'b', 'top_1': 0.25})
  results.append(tmp_path / 'results-2-of-2.jsonl', {'name': 'c'})
  assert {*results.read(tmp_path)} == {'a', 'b', 'c'}
  path.write_text('{"name": "b", "top\n{"name": "c"}\n')
  with pytest.raises(ValueError, match='results.jsonl:1 is not JSON'):
    results.read(tmp_path)


def test_slices_share_all_runs_and_keep_what_belongs_together(tmp_path):
  runs = CLAIMS['transfer'].runs('small', {})
  parts = [runner.Runner(tmp_path, {}, (i, 3)) for i in (1, 2, 3)]
  owners = {
    run.name: [i for i, part in enumerate(parts) if part.owns(run)]
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
      held_out = {'first': 'train[400:500]', 'then': 'test'}.get(name)
      made.append(claim.Run(name, labels, config, after, held_out))
    return made

  return claim.Claim(
    'microbatch', 'claim', 'source', runs, lambda _: [], ('batch', 'net')
  )


_WORKER = """
import os, pathlib, time
from experiments.reproduce import runner
jobs = len(os.sched_getaffinity(0)) + 1
with runner.Runner(pathlib.Path(), {}, jobs=jobs)._workers() as workers:
  print(workers.submit(os.getpid).result(), flush=True)
  time.sleep(600)
"""


@pytest.mark.slow
def test_workers_end_with_a_killed_sweep():
  """Also where there are more of them than cores."""
  root = pathlib.Path(__file__).parents[3]
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
  made = runner.Runner(tmp_path, {})
  if message is None:
    with pytest.raises(type(error), match='a bug'):
      made.make(run)
    return
  result = made.make(run)
  assert result['status'] == 'refused'
  assert result['message'].startswith(message)
  assert str(error) in (tmp_path / 'log.txt').read_text()


def test_a_sweep_ends_with_what_it_could_not_make(tmp_path, monkeypatch):
  def runs(scale, found):
    return [
      x for x in _digits_row(tmp_path).runs(scale, found) if 'odd' in x.name
    ]

  row = dataclasses.replace(_digits_row(tmp_path), runs=runs)
  monkeypatch.setattr(sweep, 'CLAIMS', {'microbatch': row})
  prepare.prepare('digits', tmp_path)
  args = ['--row=microbatch', '--data_name=digits', '--jobs=1']
  places = [f'--data_dir={tmp_path}', f'--output={tmp_path / "out"}']
  with pytest.raises(SystemExit, match=r'(?s)made here:.*odd: .*60 is not div'):
    sweep.main([*args, *places])


def test_a_claim_without_time_left_starts_no_run(tmp_path, capsys):
  made = runner.Runner(tmp_path, {}, minutes=0.0)
  assert made.execute(_digits_row(tmp_path), 'small') == 5
  assert (
    'microbatch: 5 runs are left after 0 minutes' in capsys.readouterr().out
  )
  assert not results.read(tmp_path)


def test_a_rehearsal_and_results_have_folders_of_their_own(tmp_path):
  results.append(tmp_path / 'results.jsonl', {'name': 'a'})
  with pytest.raises(ValueError, match='has real results; use another'):
    runner.Runner(tmp_path, {}, rehearse=True)
  (tmp_path / 'b').mkdir()
  line = {'name': 'a', 'rehearsal': True}
  results.append(tmp_path / 'b' / 'results.jsonl', line)
  with pytest.raises(ValueError, match='has results of a rehearsal'):
    runner.Runner(tmp_path / 'b', {})


@pytest.mark.slow
def test_a_sweep_makes_what_is_missing_and_no_more(tmp_path, capsys):
  prepare.prepare('digits', tmp_path / 'data')
  row = _digits_row(tmp_path / 'data')
  output = tmp_path / 'out'
  output.mkdir()
  made = runner.Runner(output, {})
  assert made.execute(row, 'small') == 0
  found = results.read(output)
  assert [found[x]['status'] for x in ('first', 'then', 'bad')] == [
    'finished',
    'finished',
    'diverged',
  ]
  assert 0 <= found['first']['held_out_top_1'] <= 1
  assert found['first']['top_1'] == found['first']['report']['ema_eval_top_1']
  last = found['first']['curve'][-1]['top_1']  # rounded
  assert last == pytest.approx(found['first']['top_1'], abs=1e-4)
  # By its own weights, not those that it began with.
  then = found['then']
  assert then['held_out_top_1'] == pytest.approx(then['top_1'])
  assert then['held_out_top_1'] != found['first']['top_1']
  assert 'step' in found['bad']['message']
  assert made.refused.keys() == {'odd'}
  assert '60 is not divisible by 8' in made.refused['odd']
  written = (output / 'results.jsonl').read_text()
  assert made.execute(row, 'small') == 0
  assert (output / 'results.jsonl').read_text() == written
  # Another config of the same name is made again.
  again = row.runs('small', {})[0]
  again.config.optimizer.weight_decay = 0.1
  assert [run.name for run in made.missing([again], found)] == ['first']
  # The second began with the weights of the first.
  config = json.loads(
    (output / found['then']['workdir'] / 'config.json').read_text()
  )
  assert config['init_from'].endswith(found['first']['workdir'])
  measured = claim.Measured(row, 'small', found)
  points = measured.points
  assert (len(points), len(measured.results), measured.missing) == (3, 3, 2)
  assert str(points[2]) == '1 diverged'


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
    'resnet50', program('resnet50'), program(latency.REFERENCE), None
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
  assert "'5/4' is not a slice" in capsys.readouterr().err
  with pytest.raises(SystemExit, match=r'error: .*prepare'):
    sweep.main(['--row=clipping', f'--data_dir={tmp_path}'])
