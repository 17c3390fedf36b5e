"""The commands that reproduce the paper: data checks, reports, rehearsals."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile

import pytest

from experiments import nfnet_imagenet, rehearse
from experiments.benchmarks import programs
from experiments.reproduce import nfnet, nfnet_report, paper
from nfnets_jax.data import prepare
from nfnets_jax.models import variants
from nfnets_jax.training import check

ROOT = pathlib.Path(__file__).parents[3]

REPORT = {
  'steps': 112_603,
  'devices': 8,
  'device_kind': 'NVIDIA H100',
  'eval_count': 50_000,
  'eval_top_1': 0.8412,
  'eval_top_5': 0.9671,
  'ema_eval_top_1': 0.8467,
  'ema_eval_top_5': 0.9712,
  'images_per_second': 8192.0,
  'num_params': 132_632_076,
}


def _run(*arguments, **environment):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.reproduce.nfnet', *arguments],
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', **environment},
    capture_output=True,
    text=True,
    timeout=600,
  )


def _rows(page):
  return dict(re.findall(r'^\| ([^|]+) \| (.*) \|$', page, re.M))


@pytest.mark.parametrize('name', [*paper.RESULTS, *paper.WITH_SAM])
def test_the_papers_nets_are_ours(name):
  assert variants.get(name)


@pytest.mark.thorough
def test_macs_are_those_of_the_training_size():
  # Counted from the released code's formulas, at 192 and 224 px.
  for name, expected in [('F0', 6.98), ('F1', 17.44)]:
    config = nfnet_imagenet.get_config(name)
    macs = programs.count_macs(config, config.data.image_size)
    assert round(macs / 1e9, 2) == expected


def test_report_sets_the_run_beside_the_paper():
  config = nfnet_imagenet.get_config('F1')
  page = nfnet_report.format_markdown(REPORT, config, 17_440_000_000, 400.0)
  rows = _rows(page)
  assert rows['top-1, EMA'] == '84.67 % | 84.7 %'
  assert rows['top-5, EMA'] == '97.12 % | 97.1 %'
  assert rows['top-1, weights'] == '84.12 % | -'
  assert rows['training step'] == '500.0 ms | 158.5 ms'
  assert rows['images a step'] == '4,096 on 8 | 1,024 on 32'
  # 32 · 32 images in 158.5 ms.
  assert rows['images/s'] == '8,192.0 | 6,460.6'
  # 6 · 17.44 G · images/s / devices.
  assert rows['TFLOP/s a device'] == '107.151 | 21.126'
  assert rows['share of its peak'] == (
    '26.79 % of 400.000 TFLOP/s, measured | 34.35 % of 61.5 TFLOP/s, nominal'
  )
  assert 'rehearsal' not in page
  assert '8 × NVIDIA H100' in page


@pytest.mark.parametrize(
  ('name', 'best', 'plain'),
  [('F5', '86.3 %', '86.0 %'), ('F6', '86.5 %', '-')],
)
def test_the_largest_are_compared_with_and_without_sam(name, best, plain):
  config = nfnet_imagenet.get_config(name)
  page = nfnet_report.format_markdown(REPORT, config, 10**10, 400.0)
  rows = _rows(page)
  assert rows['top-1, EMA'] == f'84.67 % | {best}'
  assert 'SAM with ρ 0.05' in page and 'whose ρ is not given' in page
  # 1.2 · 6 · 10 G · images/s / devices.
  ours, theirs = rows['TFLOP/s a device'].split(' | ')
  assert ours == '73.728'
  step = {'F5': 1.958, 'F6': 2.7741}[name]
  assert float(theirs) == pytest.approx(32 * 0.072 / step, abs=1e-3)
  config.optimizer.sam_rho = None
  page = nfnet_report.format_markdown(REPORT, config, 10**10, 400.0)
  assert _rows(page)['top-1, EMA'] == f'84.67 % | {plain}'
  assert _rows(page)['TFLOP/s a device'].startswith('61.440 |')
  assert 'SAM' not in page


def test_report_says_what_is_missing():
  config = nfnet_imagenet.get_config('F6')
  report = {**REPORT, 'images_per_second': None}
  page = nfnet_report.format_markdown(
    report, config, 10**9, 1.0, 'It saw little.'
  )
  assert '**A rehearsal, not a result.** It saw little.' in page
  assert 'SAM' in page
  assert 'images/s' not in page
  config = nfnet_imagenet.get_config('F7')
  page = nfnet_report.format_markdown(REPORT, config, 10**9, 1.0)
  assert _rows(page)['top-1, EMA'] == '84.67 % | -'


@pytest.mark.thorough
def test_missing_data_end_with_the_remedy(tmp_path):
  done = _run(
    '--config=experiments/nfnet_imagenet.py:F1',
    f'--workdir={tmp_path / "run"}',
    f'--config.data.data_dir={tmp_path}',
  )
  assert done.returncode == 2
  for part in (
    "data set 'imagenet2012' is not prepared",
    'https://image-net.org/download-images',
    'ILSVRC2012_img_train.tar',
    'make imagenet IMAGENET_DIR=FOLDER',
    'FROM_TFRECORD=FOLDER',
    'make rehearse-f1',
  ):
    assert part in done.stderr
  assert not (tmp_path / 'run').exists()


def test_a_sample_is_no_imagenet(tmp_path):
  prepare.prepare('digits', tmp_path)
  config = nfnet_imagenet.get_config('F1')
  config.data.name = 'digits'
  config.data.data_dir = str(tmp_path)
  with pytest.raises(
    nfnet.DataError,
    match=r'(?s)1,437 images of 10 classes; the paper has 1,281,167 of',
  ):
    nfnet.check_data(config, rehearse=False)
  config.data.test_split = 'test'
  nfnet.check_data(config, rehearse=True)
  config.data.train_split = 'training'
  with pytest.raises(
    nfnet.DataError, match=r"(?s)split 'training'.*make rehearse-f1 .*name=fake"
  ):
    nfnet.check_data(config, rehearse=True)


def test_corrupt_photographs_are_named_or_skipped(tmp_path):
  for split in ('train', 'test'):
    folder = tmp_path / split / 'cat'
    folder.mkdir(parents=True)
    (folder / '1.jpg').write_bytes(b'no image')
  config = rehearse.get_config('F1')
  config.data.name, config.data.data_dir = 'folder', str(tmp_path)
  config.data.train_split, config.data.test_split = 'train', 'test'
  with pytest.raises(
    nfnet.DataError, match=r'example 0 of folder split train \(train/cat/1.jpg'
  ):
    nfnet.check_data(config, rehearse=True)
  config.data.skip_corrupt = True
  nfnet.check_data(config, rehearse=True)


@pytest.mark.parametrize('devices', [1, 2, 4, 8])
def test_a_rehearsal_runs_on_several_devices(devices):
  check.check_config(rehearse.get_config('F1'), devices)


def test_only_the_flag_itself_is_left_out_of_a_rehearsal():
  words = ['--rehearse', '-rehearse=true', '--workdir', 'rehearse-x']
  assert [w for w in words if not nfnet._is_rehearse(w)] == words[2:]


@pytest.mark.parametrize('name', ['F0', 'F1', 'F6'])
def test_a_rehearsal_shrinks_the_amount_and_nothing_else(name):
  real = nfnet_imagenet.get_config(name).to_dict()
  small = rehearse.get_config(name).to_dict()
  assert {key for key in real if real[key] != small[key]} == {
    'epochs',
    'batch_size',
    'eval_batch_size',
    'data',
    'optimizer',
    'log_every_steps',
    'eval_every_epochs',
    'checkpoint_every_epochs',
  }
  for part, fields in [
    ('data', {'train_split', 'test_split'}),
    ('optimizer', {'warmup_epochs'}),
  ]:
    changed = {k for k in real[part] if real[part][k] != small[part][k]}
    assert changed == fields


@pytest.mark.slow
def test_a_rehearsal_is_killed_resumed_and_reported(tmp_path):
  prepare.prepare('digits', tmp_path / 'data')
  arguments = [
    '--rehearse',
    '--config=experiments/digits.py',
    f'--workdir={tmp_path / "run"}',
    f'--config.data.data_dir={tmp_path / "data"}',
    '--config.epochs=2.0',
    '--config.checkpoint_every_epochs=0.5',
    '--config.optimizer.warmup_epochs=1.0',
  ]
  done = _run(*arguments, XLA_FLAGS='--xla_backend_optimization_level=0')
  assert done.returncode == 0, done.stderr
  killed = re.search(r'killed after the checkpoint of step (\d+)', done.stdout)
  resumed = re.search(r'resumed after step (\d+)', done.stdout)
  assert killed
  assert resumed
  assert int(killed[1]) <= int(resumed[1]) < 44
  report = json.loads((tmp_path / 'run' / 'report.json').read_text())
  assert report['steps'] == 44  # of 44.9
  page = (tmp_path / 'run' / 'report.md').read_text()
  assert 'A rehearsal, not a result.' in page
  assert f'killed after step {killed[1]} and resumed' in page
  again = _run(*arguments)
  assert again.returncode == 0
  assert 'this run is finished' in again.stdout
  assert (tmp_path / 'run' / 'report.md').read_text() == page


@pytest.mark.slow
def test_the_photographs_can_be_learned_by_heart(shared, tmp_path):
  photos = tmp_path / 'photos'
  archive = shared / 'data/imagenet-sample/ILSVRC2012_img_train.tar'
  with tarfile.open(archive) as classes:
    for member in classes:
      with tarfile.open(fileobj=classes.extractfile(member)) as images:
        folder = photos / 'train' / pathlib.Path(member.name).stem
        images.extractall(folder, filter='data')
  subprocess.run(
    [
      sys.executable,
      '-m',
      'nfnets_jax.main',
      '--config=experiments/overfit.py',
      f'--workdir={tmp_path / "run"}',
      '--config.data.name=folder',
      f'--config.data.data_dir={photos}',
      '--config.epochs=40.0',
    ],
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''},
    check=True,
  )
  report = json.loads((tmp_path / 'run' / 'report.json').read_text())
  assert report['eval_count'] == 256
  assert report['ema_eval_top_1'] > 0.9
