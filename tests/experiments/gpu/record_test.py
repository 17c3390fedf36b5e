"""The length of the run of part 4, and a run without a checkpoint."""

import sys
import time

from experiments.gpu import common, record, report


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
