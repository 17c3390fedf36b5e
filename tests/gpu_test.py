"""What is made for an accelerator: limits, records, and a dry run of it all."""

import json
import math
import os
import pathlib
import subprocess
import sys
import time

import pytest

from experiments.gpu import (
  common,
  effect,
  pack,
  peer,
  record,
  report,
  run,
  runner,
)
from experiments.reproduce import claim, claims
from nfnets_jax.models import variants

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def output(tmp_path, monkeypatch):
  for name in ('GPU_DRY_RUN', 'GPU_PACK', 'GPU_DATA_DIR', 'GPU_DATA_NAME'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('GPU_OUTPUT', str(tmp_path / 'out'))
  monkeypatch.setenv('GPU_SCRATCH', str(tmp_path / 'scratch'))
  (tmp_path / 'out').mkdir()
  (tmp_path / 'scratch').mkdir()
  return tmp_path / 'out'


def test_results_survive_a_line_that_was_cut_off(output):
  common.add(1, 'first', value=1.0)
  common.check(1, 'small', 0.5, 1.0)
  common.check(1, 'not a number', math.nan, 1.0)
  with (output / 'results.jsonl').open('a') as file:
    file.write('{"part": 2, "wh')
  found = common.read(output)
  assert [x['what'] for x in found] == ['first', 'small', 'not a number']
  assert [x.get('ok') for x in found] == [None, True, False]


def _step(model, form, seconds, batch=32, largest=False, **values):
  return {
    'part': 2, 'what': 'step', 'model': model, 'form': form, 'batch': batch,
    'seconds': seconds, 'rounds': [seconds], 'memory': 2**30, 'tflops': 330.0,
    'images_per_second': batch / seconds, 'largest': largest, **values,
  }  # fmt: skip


def _timm(model, seconds, **values):
  return {
    **_step(model, 'ours', seconds), 'what': 'timm', 'status': 'measured',
    'mode': 'eager', 'layout': 'last', **values,
  }  # fmt: skip


def _run(net, batch, top_1, message=None):
  return {
    'part': 3, 'what': 'run', 'labels': {'net': net, 'batch': batch},
    'top_1': top_1, 'message': message, 'epochs': 15.0,
  }  # fmt: skip


RESULTS = [
  {'part': 2, 'what': 'peak', 'tflops': 800.0},
  _step('nfnet_f0', 'ours', 0.007),
  _step('nfnet_f0', 'released', 0.008),
  _timm('nfnet_f0', 0.020),
  _timm('nfnet_f0', 0.010, mode='compiled'),
  # More images a step, and faster by image; not what the ratio is of.
  _timm('nfnet_f0', 0.2, batch=1024, largest=True, images_per_second=5120),
  _step('nfnet_f1', 'ours', 0.010),
  _step('efficientnet_b7', 'ours', 0.086),
  _run('BN', 256, 0.91),
  _run('NF + AGC', 4096, 0.902),
  _run('NF', 4096, None, 'loss is nan at step 3'),
]


def test_goals_are_of_the_fastest_of_timm_at_the_same_batch():
  lines = report.goals(RESULTS)
  assert 'F0 step ÷ the fastest of timm, at most 0.8: 0.700: met.' in lines[0]
  assert 'F0, at least 40 % of the measured peak: 41.2%: met' in lines[1]
  assert 'timm, at most 0.8: not measured' in lines[2]
  assert 'as fast as EfficientNet-B7: 8.60: not met' in lines[4]
  assert 'within a point of BN at 256: 0.80 points below: met' in lines[5]
  assert lines[6] == '* 96 % on CIFAR-10: not measured.'


def test_a_report_of_what_there_is(output):
  report.write(output)
  assert 'not measured' in (output / 'report.md').read_text()
  for line in RESULTS:
    common.add(**line)
  common.add(4, 'failed', job='record', message='stopped after 9 s, its limit')
  report.write(output)
  page = (output / 'report.md').read_text()
  assert '| NF + AGC |  | 90.20% |' in page
  assert '| NF |  | loss is nan at step 3 |' in page
  assert 'part 4, record: stopped after 9 s, its limit' in page
  row = next(x for x in page.splitlines() if 'timm, eager' in x)
  assert '20.00 (20.00 to 20.00) | 1600 | 41.2% | 1.00 | 0.350 |' in row


def test_part_3_makes_runs_of_the_claim(output):
  known = {
    run.name: claim.fingerprint(run, {})
    for run in claims.CLAIMS['batch-size'].runs('gpu', {})
  }
  for number, (net, batch, _) in enumerate(effect.RUNS):
    run = effect.create_run(number)
    assert known[run.name] == claim.fingerprint(run, {})
    assert (run.labels['net'], run.config.batch_size) == (net, batch)
  assert len(set(effect.RUNS)) == 3 * 3


def test_every_job_is_one_that_its_module_knows(output):
  found = [job.words for part in run.LIMITS for job in run.jobs(part)]
  assert len(set(found)) == len(found)
  for module, *words in found:
    assert (ROOT / 'experiments' / 'gpu' / f'{module}.py').exists()
    if module == 'peer':
      assert words[0] in peer._SIZES
    if module == 'speed' and words != ['peak']:
      variants.get(words[0])
  numbers = [int(words[1]) for words in found if words[0] == 'effect']
  assert numbers == list(range(len(effect.RUNS)))


def test_the_length_of_part_4_follows_the_input_pipeline():
  assert record.choose_epochs(20_000, 75.0 + 100.0, 50_000) == 34
  # A faster pipeline than the device does not help, and no time is no time.
  assert record.choose_epochs(1e6, 175.0, 50_000) == 60
  assert record.choose_epochs(20_000, 10.0, 50_000) == 2


@pytest.mark.parametrize('parts', ['5', '1,x', ''])
def test_other_parts_are_refused(parts, capsys):
  with pytest.raises(SystemExit):
    run.parse([f'--parts={parts}'])
  assert 'give some of 1,2,3,4' in capsys.readouterr().err


def test_the_pack_has_a_tested_version_of_each_package():
  tested = pack.versions()
  assert {*pack._PACKAGES, *pack._SOURCES} <= tested.keys()
  # They differ between versions of Python, and the machine has its own.
  assert not {'jax', 'numpy', 'scipy'} & tested.keys()


def test_without_data_the_remedy_is_named(output, monkeypatch):
  from experiments.gpu import data

  monkeypatch.setenv('GPU_DATA_NAME', 'cifar10')
  with pytest.raises(FileNotFoundError, match='cifar10 in .*make gpu-pack'):
    data.fields()


def test_jobs_measure_in_turn_and_a_failure_stops_none(
  output, tmp_path, monkeypatch
):
  """Two that wait and one that fails, as scripts in place of our modules."""
  one = (
    'import sys, time\n'
    'print("ready", flush=True)\n'
    'sys.stdin.readline()\n'
    'with open(sys.argv[1], "a") as file:\n'
    '  file.write("begin ")\n'
    '  file.flush()\n'
    '  time.sleep(0.2)\n'
    '  file.write("end ")\n'
  )
  script = tmp_path / 'one.py'
  script.write_text(one)
  log = tmp_path / 'turns'
  names = {'a': [script, log], 'b': [script, log], 'c': [tmp_path / 'no.py']}
  jobs = [runner.Job((x,), waits=True) for x in names]
  made = runner.Runner(sys.executable, None, 4)
  monkeypatch.setattr(
    made,
    '_command',
    lambda job: [sys.executable, *map(str, names[job.words[0]])],
  )
  made.run_part(2, jobs, time.time() + 60)
  assert log.read_text() == 'begin end begin end '
  (failed,) = [x for x in common.read(output) if x['what'] == 'failed']
  assert failed['job'] == 'c' and "can't open file" in failed['message']
  assert 'part 2, c: ended with 2' in made.failed[0]
  assert (output / 'report.md').exists()


def test_a_job_is_stopped_at_its_limit(output, monkeypatch):
  monkeypatch.setattr(runner, '_GRACE', 1.0)
  made = runner.Runner(sys.executable, None, 2)
  words = [sys.executable, '-c', 'import time; time.sleep(60)']
  monkeypatch.setattr(made, '_command', lambda job: words)
  began = time.monotonic()
  made.run_part(1, [runner.Job(('sleep',))], time.time() + 2.0)
  assert time.monotonic() - began < 10
  assert 'its limit' in made.failed[0]


@pytest.mark.slow
def test_a_dry_run(tmp_path):
  """All four parts on the CPU, on digits where there is no CIFAR-10."""
  environment = {
    **os.environ,
    'GPU_DRY_RUN': '1',
    'GPU_SCRATCH': str(tmp_path / 'scratch'),
    'PYTHONPATH': str(ROOT),
  }
  del environment['XLA_FLAGS']  # eight devices are for the other tests
  done = subprocess.run(
    [
      sys.executable, '-m', 'experiments.gpu.run',
      f'--output={tmp_path / "out"}', '--seconds=1500',
    ],
    env=environment, cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  # So many come back from a machine.
  files = {path.name for path in (tmp_path / 'out').iterdir()}
  assert files == {'results.jsonl', 'log.txt', 'report.md', 'cifar10.jsonl'}
  found = common.read(tmp_path / 'out')
  assert {x['part'] for x in found} == {0, 1, 2, 3, 4}
  assert all(x['ok'] for x in found if 'ok' in x)
  forms = {x['form'] for x in found if x['what'] == 'step'}
  assert forms == {'ours', 'released'}
  assert {x['status'] for x in found if x['what'] == 'timm'} <= {
    'absent', 'measured',
  }  # fmt: skip
  (whole,) = [x for x in found if x['what'] == 'cifar10']
  assert whole['status'] == 'finished' and json.dumps(whole['command'])
  page = (tmp_path / 'out' / 'report.md').read_text()
  assert 'A dry run: no number here means anything.' in page
