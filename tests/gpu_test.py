"""What is made for an accelerator: limits, records, and a dry run of it all."""

import importlib.metadata
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from experiments.gpu import (
  common,
  effect,
  pack,
  peer,
  process,
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
  found = common.read(output / 'results.jsonl')
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
  common.add(2, 'kernels', model='nfnet_f0', count=2682.0, seconds=0.0119)
  common.add(4, 'failed', job='record', message='stopped after 9 s, its limit')
  common.add(1, 'failed', job='right f0', message='no such convolution')
  common.add(1, 'loss', job='right f0', value=0.0)
  report.write(output)
  page = (output / 'report.md').read_text()
  assert '| NF + AGC |  | 90.20% |' in page
  assert '| NF |  | loss is nan at step 3 |' in page
  assert 'nfnet_f0: 2682 kernels a step, 11.90 ms in all' in page
  assert 'part 4, record: stopped after 9 s, its limit' in page
  assert 'no such convolution' not in page  # the same job gave a result later
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


def test_the_length_of_part_4_follows_the_speed():
  assert record.choose_epochs(20_000, 60.0 + 100.0, 50_000) == 36
  assert record.choose_epochs(1e6, 160.0, 50_000) == 200
  assert record.choose_epochs(20_000, 10.0, 50_000) == 2


def test_a_run_of_part_4_without_a_checkpoint(output, monkeypatch, capsys):
  monkeypatch.setenv('GPU_DEADLINE', str(time.time() + 60))
  fails = [sys.executable, '-c', 'raise SystemExit(3)']
  status, result = record.train(fails, output)
  assert (status, result) == ('ended with 3, without a checkpoint', None)
  monkeypatch.setenv('GPU_DEADLINE', str(time.time()))
  sleeps = [sys.executable, '-c', 'import time; time.sleep(60)']
  status, result = record.train(sleeps, output)
  assert status == 'stopped before its end, without a checkpoint'
  lines = [
    {'step': 50, 'loss': 2.5, 'images_per_second': 9.0, 'step_seconds': 0.4,
     'data_wait_seconds': 0.1},
    {'step': 60, 'ema_eval_top_1': 0.1},
  ]  # fmt: skip
  values = record.summarize(status, None, lines)
  assert values['data_wait'] == 0.25
  assert record.summarize(status, None, [])['steps'] is None
  common.add(4, 'cifar10', **values, epochs=5.0, seconds=9.0, data='cifar10')
  report.write(output)
  page = (output / 'report.md').read_text()
  assert f'5 epochs, {status}, last loss 2.5 at step 50, 9 s.' in page
  assert '96 % on CIFAR-10: not measured' in page


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
    'print("measured", flush=True)\n'
  )
  script = tmp_path / 'one.py'
  script.write_text(one)
  log = tmp_path / 'turns'
  names = {'a': [script, log], 'b': [script, log], 'c': [tmp_path / 'no.py']}
  jobs = [process.Job(2, (x,), waits=True) for x in names]
  made = runner.Runner(sys.executable, None)
  monkeypatch.setattr(
    made,
    '_command',
    lambda job: [sys.executable, *map(str, names[job.words[0]])],
  )
  made.run(jobs, 1, 2, time.time() + 60)
  assert log.read_text() == 'begin end begin end '
  (failed,) = common.read(output / 'results.jsonl')
  assert failed['job'] == 'c' and "can't open file" in failed['message']
  assert 'part 2, c: ended with 2' in made.log.failed[0]
  assert (output / 'report.md').exists()


def test_jobs_are_stopped_at_their_limit(output, monkeypatch):
  monkeypatch.setattr(process, 'GRACE', 1.0)
  made = runner.Runner(sys.executable, None)
  words = [sys.executable, '-c', 'import time; time.sleep(60)']
  monkeypatch.setattr(made, '_command', lambda job: words)
  began = time.monotonic()
  jobs = [
    process.Job(1, ('sleep',), limit=2.0),
    process.Job(2, ('prepare',), waits=True, limit=2.0),
    process.Job(2, ('later',), waits=True, limit=2.0),
  ]
  made.run(jobs, 1, 1, time.time() + 60)
  assert time.monotonic() - began < 10
  messages = sorted(x.partition(' after')[0] for x in made.log.failed)
  assert messages == [
    'part 1, sleep: stopped',
    'part 2, later: there was no time for it',
    'part 2, prepare: stopped',
  ]


def test_a_job_that_fails_untuned_is_run_once_more(
  output, tmp_path, monkeypatch
):
  script = tmp_path / 'one.py'
  script.write_text(
    'import os, sys\n'
    'print(os.environ["XLA_FLAGS"], os.environ["GPU_JOB"])\n'
    'sys.exit("autotune_level=0" in os.environ["XLA_FLAGS"])\n'
  )
  monkeypatch.setenv('XLA_FLAGS', '--xla_mine=1')
  made = runner.Runner(sys.executable, None)
  words = [sys.executable, str(script)]
  monkeypatch.setattr(made, '_command', lambda job: words)
  made.run([process.Job(3, ('one',), tuned=False)], 1, 1, time.time() + 60)
  lines = (output / 'log.txt').read_text().splitlines()
  assert lines[0].startswith('[one] --xla_mine=1 --xla_gpu_autotune_level=0')
  assert lines[0].endswith(' one') and lines[3] == '[one] --xla_mine=1 one'
  assert len(made.log.failed) == 1


def test_an_interrupt_ends_all_jobs(output, monkeypatch):
  # The workers of pytest-xdist ignore it.
  handler = signal.signal(signal.SIGINT, signal.default_int_handler)
  made = runner.Runner(sys.executable, None)
  code = 'import time; print("started", flush=True); time.sleep(60)'
  words = [sys.executable, '-c', code]
  monkeypatch.setattr(made, '_command', lambda job: words)
  log = output / 'log.txt'

  def interrupt():
    while not log.exists():
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)

  thread = threading.Thread(target=interrupt)
  thread.start()
  job = process.Job(1, ('sleep',), tuned=False)
  with pytest.raises(KeyboardInterrupt):
    made.run([job], 1, 1, time.time() + 60)
  thread.join()
  signal.signal(signal.SIGINT, handler)
  # Not run once more.
  assert log.read_text().count('[sleep] started') == 1
  assert 'ended with -9' in made.log.failed[0]


def test_versions_of_packages_from_wheels(output, tmp_path):
  folder = tmp_path / 'site' / 'dm_haiku-9.8.7.dist-info'
  folder.mkdir(parents=True)
  (folder / 'METADATA').write_text('Name: dm-haiku\nVersion: 9.8.7\n')
  found = run.versions(folder.parent)
  assert found['dm-haiku'] == '9.8.7'
  assert found['jax'] == importlib.metadata.version('jax')


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
  assert files == {
    'results.jsonl', 'log.txt', 'report.md', 'cifar10.jsonl',
    'kernels-nfnet_f0.json', 'hlo-nfnet_f0.txt.gz',
  }  # fmt: skip
  found = common.read(tmp_path / 'out' / 'results.jsonl')
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
