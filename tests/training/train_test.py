"""Whole runs on handwritten digits, forty steps long."""

import json
import re
import shutil
import threading

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from experiments import digits
from nfnets_jax.runtime import (
  checkpoint,
  lock,
  logbook,
  meters,
  parallel,
  progress,
)
from nfnets_jax.training import (
  build,
  check,
  evaluate,
  schedules,
  train,
  train_step,
)

# Its runs take minutes together.
pytestmark = pytest.mark.thorough

STEPS = 40
RUN = {
  'log_every_steps': 4,
  'eval_every_epochs': 2.0,
  'checkpoint_every_epochs': 1.0,
}


@pytest.fixture(scope='module')
def config(make_config):
  return make_config(STEPS, RUN)


@pytest.fixture(scope='module')
def straight(config, tmp_path_factory):
  """The folder of a run from beginning to end, and its report."""
  workdir = tmp_path_factory.mktemp('straight')
  return workdir, train.train_and_evaluate(config, workdir, profile_steps=2)


@pytest.fixture
def copy(straight, tmp_path):
  """A copy of the finished run, to go on with."""
  return shutil.copytree(straight[0], tmp_path / 'copy')


def _restore(config, workdir):
  """The newest checkpoint's state and loader state."""
  net = build.create_net(config, num_classes=10)
  optimizer = build.create_optimizer(config, lambda step: 0.0)
  template = train_step.init_state(net, optimizer, 0, config.data.image_size)
  checkpoints = checkpoint.Checkpointer(workdir / 'checkpoints', keep=3)
  try:
    return checkpoints.restore(parallel.replicate(template))
  finally:
    checkpoints.close()


def test_run_leaves_its_files(config, straight):
  workdir, report = straight
  assert {path.name for path in workdir.iterdir()} == {
    'config.json',
    'data.json',
    'metrics.jsonl',
    'tensorboard',
    'checkpoints',
    'curves.png',
    'report.json',
  }
  recorded = json.loads((workdir / 'config.json').read_text())
  assert recorded == json.loads(config.to_json())
  data = json.loads((workdir / 'data.json').read_text())
  assert data['splits']['train'] == {'split': 'train[:320]', 'count': 320}
  assert data['class_names'] == [str(label) for label in range(10)]
  assert json.loads((workdir / 'report.json').read_text()) == report
  (events,) = (workdir / 'tensorboard').glob('events.out.tfevents.*')
  for name in (b'train/loss', b'test/eval_top_1', b'test/ema_eval_loss'):
    assert name in events.read_bytes()
  with Image.open(workdir / 'curves.png') as image:
    image.verify()
  kept = sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())
  assert kept == [20, 30, 40]


def test_report(straight):
  _, report = straight
  assert report.keys() >= {
    'steps',
    'eval_top_1',
    'eval_top_5',
    'eval_loss',
    'ema_eval_top_1',
    'ema_eval_top_5',
    'ema_eval_loss',
    'images_per_second',
    'num_params',
  }
  assert report['steps'] == STEPS
  assert report['images_per_second'] > 0
  for name in ('eval', 'ema_eval'):
    hits = 360 * report[f'{name}_top_1'], 360 * report[f'{name}_top_5']
    assert hits == pytest.approx(np.round(hits))
    assert 0 <= hits[0] <= hits[1] <= 360
  assert report['eval_loss'] != report['ema_eval_loss']


@pytest.fixture
def compiled(tmp_path):
  """A folder of its own, in which every compiled program is kept."""
  fields = {
    'jax_compilation_cache_dir': str(tmp_path / 'compiled'),
    'jax_persistent_cache_min_compile_time_secs': 0.0,
  }
  before = {name: getattr(jax.config, name) for name in fields}
  _configure(fields)
  yield tmp_path / 'compiled'
  _configure(before)


def _configure(fields):
  for name, value in fields.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def test_other_rates_thresholds_and_seeds_take_no_other_program(
  make_config, compiled, tmp_path
):
  def programs_after(name, changes):
    train.train_and_evaluate(make_config(2, changes), tmp_path / name)
    return {path.name for path in compiled.glob('*-cache')}

  rate = {'optimizer.learning_rate_per_256': 0.03}
  changes = {'seed': 7, 'optimizer.clipping': 0.5, **rate}
  first = programs_after('first', {})
  assert any(name.startswith('jit_init-') for name in first)
  assert programs_after('second', changes) == first
  one, other = (
    logbook.read(tmp_path / name)[0] for name in ('first', 'second')
  )
  expected = 0.03 * one['learning_rate']  # that of the digits is 1
  assert other['learning_rate'] == pytest.approx(expected)
  assert 0 < other['clipped'] != one['clipped']
  # Any other field makes another program.
  assert programs_after('third', {'optimizer.momentum': 0.5}) > first


def test_number_of_parameters(config, straight):
  state, _ = _restore(config, straight[0])
  expected = sum(x.size for x in jax.tree.leaves(state.params))
  assert straight[1]['num_params'] == expected


def _metrics(workdir):
  """What was measured, but for the speed."""
  lines = logbook.read(workdir)
  return [
    {name: x for name, x in line.items() if name not in meters.SPEEDS}
    for line in lines
  ]


def test_metrics_are_written_as_often_as_asked(straight):
  seen = [(line['step'], line['split']) for line in _metrics(straight[0])]
  train_steps = [step for step, split in seen if split == 'train']
  test_steps = [step for step, split in seen if split == 'test']
  # Every four steps, and at the checkpoints.
  assert train_steps == sorted({*range(4, 41, 4), *range(10, 41, 10)})
  assert test_steps == [20, 40]
  assert seen == sorted(seen, key=lambda pair: pair[0])


def test_metrics_tell_the_state_of_the_run(straight):
  lines = [line for line in logbook.read(straight[0]) if 'loss' in line]
  for line in lines:
    assert line['step_seconds'] > line['data_wait_seconds'] >= 0
    assert line['ema_distance'] > 0
    shares = {
      name: line[f'{name}_share']
      for name in ('data', 'checkpoint', 'evaluation')
    }
    assert 0 < shares['data'] <= sum(shares.values()) < 1
    # Of the time since the last report.
    assert (shares['checkpoint'] > 0) == (line['step'] in (12, 24, 32))
    assert (shares['evaluation'] > 0) == (line['step'] == 24)
    parts = {name for name in line if name.startswith('clipped')}
    assert parts == {
      'clipped',
      'clipped_stem',
      'clipped_stage_1',
      'clipped_head',
    }
    assert all(0 <= line[name] <= 1 for name in parts)
  assert any(line['clipped'] > 0 for line in lines)


def test_a_profile_is_of_steps_after_the_first(straight):
  (path,) = (straight[0] / 'tensorboard').glob('plugins/profile/*/*.xplane.pb')
  assert b'train' in path.read_bytes()


def test_learning_rate_follows_the_schedule(config, straight):
  schedule = schedules.warmup_cosine(
    config.optimizer.learning_rate_per_256 * 32 / 256, 0.0, STEPS
  )
  lines = [line for line in _metrics(straight[0]) if line['split'] == 'train']
  for line in lines:
    expected = float(schedule(line['step'] - 1))
    assert line['learning_rate'] == pytest.approx(expected, rel=1e-5)


def test_it_learns(straight):
  losses = [x['loss'] for x in _metrics(straight[0]) if 'loss' in x]
  assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.05
  # Better than to guess, which scores ln 10 and one half.
  for name in ('eval', 'ema_eval'):
    assert straight[1][f'{name}_loss'] < np.log(10) - 0.1
    assert straight[1][f'{name}_top_5'] > 0.65


class _Interruption:
  """A person who stops the run when it shows this."""

  def __init__(self, step, name):
    self._step, self._name = step, name

  def __call__(self, bar, step, epoch, values):
    if step == self._step and self._name in values:
      raise KeyboardInterrupt


def test_resumed_equals_straight_through(
  config, straight, tmp_path, monkeypatch, capsys
):
  # Once during an evaluation, before which the state is kept; once long after.
  for step, name in ((20, 'eval_loss'), (36, 'loss')):
    with monkeypatch.context() as patch:
      show = _Interruption(step, name)
      patch.setattr(
        progress.Progress, 'show', lambda *args, show=show: show(*args)
      )
      with pytest.raises(KeyboardInterrupt):
        train.train_and_evaluate(config, tmp_path)
    assert not (tmp_path / 'report.json').exists()
  report = train.train_and_evaluate(config, tmp_path)
  resumed = re.findall(r'resumed after step (\d+)', capsys.readouterr().out)
  assert resumed == ['20', '30']

  workdir, expected = straight
  assert _metrics(tmp_path) == _metrics(workdir)
  assert report.pop('images_per_second') > 0
  assert report == {k: x for k, x in expected.items() if k in report}
  ours, theirs = _restore(config, tmp_path), _restore(config, workdir)
  assert ours[1] == theirs[1]
  for (path, x), y in zip(
    jax.tree.leaves_with_path(ours[0]), jax.tree.leaves(theirs[0]), strict=True
  ):
    np.testing.assert_array_equal(
      x, y, err_msg=jax.tree_util.keystr(path), strict=True
    )


def test_a_kept_state_that_cannot_be_evaluated_is_named(
  config, tmp_path, monkeypatch
):
  def diverged(*arguments):
    raise FloatingPointError('eval_loss is nan')

  monkeypatch.setattr(evaluate, 'evaluate', diverged)
  message = (
    'eval_loss is nan at step 20; to go on from an earlier checkpoint, move '
    '.*/checkpoints/20 away. Lower optimizer.learning_rate_per_256'
  )
  for _ in range(2):  # also when it is resumed
    with pytest.raises(FloatingPointError, match=message):
      train.train_and_evaluate(config, tmp_path)


def test_finished_run_is_reported_as_it_is(config, straight, capsys):
  workdir, report = straight
  files = {path: path.stat().st_mtime_ns for path in workdir.rglob('*')}
  files.pop(workdir / 'config.json')
  assert train.train_and_evaluate(config, workdir) == report
  assert capsys.readouterr().out == 'this run is finished after 40 steps\n'
  for path, written in files.items():
    assert path.stat().st_mtime_ns == written or path.is_dir()


def test_run_killed_before_its_report_is_reported(config, straight, copy):
  (copy / 'report.json').unlink()
  report = train.train_and_evaluate(config, copy)
  assert report == straight[1]
  assert logbook.read(copy) == logbook.read(straight[0])


def test_another_config_is_refused_or_taken_on(
  make_config, config, straight, copy
):
  longer = make_config(STEPS + 2, RUN)
  with pytest.raises(ValueError, match=r'config.epochs: 4.0 -> 4.2'):
    train.train_and_evaluate(longer, copy)
  shorter = make_config(STEPS - 20, RUN)
  message = 'has made 40 steps, and this config asks for 20'
  with pytest.raises(ValueError, match=message):
    train.train_and_evaluate(shorter, copy, allow_config_change=True)
  # As if nothing had been asked.
  assert train.train_and_evaluate(config, copy) == straight[1]
  assert _metrics(copy) == _metrics(straight[0])

  report = train.train_and_evaluate(longer, copy, allow_config_change=True)
  assert report['steps'] == STEPS + 2
  assert json.loads((copy / 'config.json').read_text())['epochs'] == 4.2
  lines = _metrics(copy)
  assert lines[: len(_metrics(straight[0]))] == _metrics(straight[0])
  assert [line['step'] for line in lines[-2:]] == [42, 42]


def test_checkpoint_is_evaluated_as_in_the_run(config, straight):
  workdir, report = straight
  results = evaluate.evaluate_checkpoint(config, workdir)
  assert results == {name: report[name] for name in results}
  assert results['eval_count'] == 360


def test_divergence_names_the_step_and_the_last_good_checkpoint(
  make_config, tmp_path
):
  changes = {
    'optimizer.clip': None,
    'optimizer.learning_rate_per_256': 1e30,
    'checkpoint_every_epochs': 0.1,
  }
  message = (
    r'(loss|grad_norm) is (nan|-?inf) at step 2; last good checkpoint in '
    r'.*checkpoints: step 1\.'
  )
  with pytest.raises(FloatingPointError, match=message):
    train.train_and_evaluate(make_config(STEPS, changes), tmp_path)
  assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['1']
  assert not (tmp_path / 'report.json').exists()


def test_too_many_steps_left_out_stop_the_run(make_config, tmp_path):
  changes = {
    'optimizer.clip': None,
    'optimizer.learning_rate_per_256': 1e30,
    'optimizer.skip_nonfinite': 3,
    'log_every_steps': 1,
  }
  with pytest.raises(
    FloatingPointError, match=r'at step 5, number 4 in a row.* allows 3'
  ):
    train.train_and_evaluate(make_config(STEPS, changes), tmp_path)
  lines = logbook.read(tmp_path)
  assert [line['nonfinite'] for line in lines] == [0, 1, 1, 1]
  assert ['loss' in line for line in lines] == [True, False, False, False]


def _copies(values):
  """An array that claims to be replicated, of these values on the devices."""
  like = parallel.replicate(np.float32(0))
  return jax.make_array_from_single_device_arrays(
    (), like.sharding, list(map(jax.device_put, values, jax.devices()))
  )


@pytest.mark.parametrize(
  'where',
  ['params', 'model_state', 'opt_state', 'ema_params', 'ema_model_state'],
)
def test_state_that_differs_between_devices_is_not_kept(where):
  same = _copies(np.full(8, 1, np.float32))
  state = train_step.TrainState(*[same] * 7)
  train.check_replicas(state, step=3)

  different = _copies(np.array([1, 1, 1.5, 1, 1, 1, 1, 1], np.float32))
  message = 'on 8 devices differ by 0.5 at step 3'
  with pytest.raises(RuntimeError, match=message):
    train.check_replicas(state._replace(**{where: different}), step=3)

  for value in (np.nan, np.inf):
    broken = _copies(np.full(8, value, np.float32))
    with pytest.raises(FloatingPointError, match='not finite at step 3'):
      train.check_replicas(state._replace(**{where: broken}), step=3)


@pytest.mark.slow
def test_noise_trains_in_bfloat16(make_config, tmp_path):
  changes = {
    'batch_size': 16,
    'eval_batch_size': 8,
    'data.name': 'fake',
    'data.prepare': False,
    'data.train_split': 'train[:64]',
    'data.test_split': 'validation[:20]',
    'data.crop': 'random_resized',
    'data.eval_crop': 'resize_crop_32',
    'data.flip': True,
    'augment.rand_augment': '2x5',
    'compute_dtype': 'bfloat16',
  }
  report = train.train_and_evaluate(make_config(5, changes), tmp_path)
  assert report['steps'] == 2  # half an epoch of 64 images in batches of 16
  assert report['eval_count'] == 20
  assert report['eval_loss'] == pytest.approx(np.log(1000), rel=0.05)


def test_variant_is_more_than_its_name(make_config):
  config = digits.get_config()
  config.model.name = 'nfnet_f0'
  with pytest.raises(ValueError, match='called nfnet_f0, but .* of nfnet_tiny'):
    build.create_net(config, num_classes=10)
  build.create_net(make_config(), num_classes=10)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'batch_size': 36},
      'batch_size 36 is not divisible by 8 devices; use a .*multiple of 8',
    ),
    (
      {'eval_batch_size': 100},
      'eval_batch_size 100 is not divisible by 8 devices; use a .*multiple',
    ),
    ({'batch_size': 0}, 'batch_size 0'),
    ({'eval_batch_size': 0}, 'eval_batch_size 0'),
  ],
)
def test_batches_that_cannot_be_split(make_config, changes, message):
  with pytest.raises(ValueError, match=f'^{message}'):
    check.check_config(make_config(1, changes), devices=8)


@pytest.mark.parametrize('field', ['compute_dtype', 'eval_dtype'])
def test_unknown_dtypes_are_refused(make_config, field):
  config = make_config(1, {field: 'float16'})
  message = f"^{field} is 'float16'; choose one of float32, bfloat16"
  with pytest.raises(ValueError, match=message):
    check.check_config(config, devices=8)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'seed': -1}, 'seed -1 is not in'),
    ({'seed': 2**32}, 'seed 4294967296 is not in'),
    ({'data.image_size': 0}, 'data.image_size must be at least 1, got 0'),
    ({'data.eval_image_size': -4}, 'data.eval_image_size must be at least 1'),
    ({'data.num_workers': -1}, 'num_workers must be 0 or more, got -1'),
    ({'data.worker_type': 'x'}, 'worker_type must be one of threads'),
    (
      {'optimizer.sam_rho': 0.05, 'optimizer.sam_fraction': 2.0},
      r'optimizer.sam_fraction must be in \(0, 1\], got 2',
    ),
    ({'epochs': np.nan}, 'epochs is nan; give a finite number above 0'),
    ({'max_loss': 0.0}, 'max_loss is 0.0; give a finite number above 0'),
    ({'optimizer.end_learning_rate': -1.0}, 'optimizer.end_learning_rate is -'),
    (
      {'log_every_steps': 0},
      'log_every_steps is 0; give a finite number above',
    ),
    ({'eval_every_epochs': -1.0}, 'eval_every_epochs is -1.0; give a finite'),
    ({'checkpoint_every_epochs': np.nan}, 'checkpoint_every_epochs is nan; '),
    ({'optimizer.max_norm': -1.0}, 'optimizer.max_norm is -1.0; give a finite'),
    (
      {'optimizer.learning_rate_per_256': np.nan},
      'optimizer.learning_rate_per',
    ),
    ({'optimizer.weight_decay': -1.0}, 'optimizer.weight_decay is -1.0; give'),
    ({'optimizer.skip_nonfinite': -1}, 'optimizer.skip_nonfinite is -1; give'),
    ({'optimizer.momentum': 1.0}, r'optimizer.momentum is 1.0; .* in \[0, 1\)'),
    ({'label_smoothing': 2.0}, 'label_smoothing is 2.0; give a number in'),
    ({'ema_decay': -0.5}, 'ema_decay is -0.5; give a number in'),
  ],
)
def test_impossible_numbers_are_refused(make_config, changes, message):
  with pytest.raises(ValueError, match=f'^{message}'):
    check.check_config(make_config(1, changes), devices=8)


def test_batches_that_can_be_split(make_config):
  check.check_config(make_config(), devices=8)
  check.check_config(make_config(1, {'batch_size': 36}), devices=2)
  # Three images for each.
  check.check_config(make_config(1, {'batch_size': 24}), devices=8)


def test_after_a_mistake_the_folder_takes_the_right_config(
  make_config, tmp_path
):
  for wrong, message in (
    ({'batch_size': 36}, 'batch_size 36'),
    ({'optimizer.warmup_epochs': 9.0}, 'a warm-up of 90 steps'),
    ({'optimizer.clip': 'acg'}, "clip is 'acg'"),
    ({'model.name': 'nfnet_f9'}, "unknown model 'nfnet_f9'"),
    ({'data.train_split': 'training'}, "split 'training'"),
    ({'data.test_split': 'test[:0]'}, r"split 'test\[:0\]' has no examples"),
  ):
    with pytest.raises(ValueError, match=message):
      train.train_and_evaluate(make_config(STEPS, wrong), tmp_path)
    assert not (tmp_path / 'config.json').exists()


def test_nothing_was_trained(config, tmp_path):
  with pytest.raises(FileNotFoundError, match='no run to evaluate .*; train'):
    evaluate.evaluate_checkpoint(config, tmp_path / 'missing')
  assert not (tmp_path / 'missing').exists()
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(FileNotFoundError, match='no checkpoint .*; train first'):
    evaluate.evaluate_checkpoint(config, tmp_path)


def test_data_set_that_is_not_prepared(make_config, tmp_path):
  changes = {'data.prepare': False, 'data.data_dir': str(tmp_path / 'empty')}
  with pytest.raises(FileNotFoundError, match="'digits' is not prepared in"):
    train.train_and_evaluate(make_config(1, changes), tmp_path / 'run')


def _photos(folder, counts):
  """Writes noise of the classes cat and dog: `{split: images of each}`."""
  rng = np.random.default_rng(0)
  for split, count in counts.items():
    for label in ('cat', 'dog'):
      path = folder / split / label
      path.mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(256, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f'{i}.png')
  return folder


def test_a_run_remembers_its_data(make_config, tmp_path, capsys):
  photos = _photos(tmp_path / 'photos', {'train': 16, 'test': 4})
  config = make_config(
    1,
    {
      'data.name': 'folder',
      'data.data_dir': str(photos),
      'data.train_split': 'train',
      'data.prepare': False,
      'eval_batch_size': 8,
      'epochs': 2.0,
    },
  )
  workdir = tmp_path / 'run'
  report = train.train_and_evaluate(config, workdir)
  assert (report['steps'], report['num_classes']) == (2, 2)

  cats = photos / 'train' / 'cat'
  for i in range(32):
    shutil.copy(cats / '0.png', cats / f'new{i}.png')
  with pytest.raises(ValueError, match='train split: 32 -> 64 images'):
    train.train_and_evaluate(config, workdir)
  capsys.readouterr()
  longer = train.train_and_evaluate(config, workdir, allow_config_change=True)
  assert longer['steps'] == 4
  assert 'train split: 32 -> 64 images' in capsys.readouterr().out
  assert train.train_and_evaluate(config, workdir) == longer

  for split in ('train', 'test'):
    (photos / split / 'dog').rename(photos / split / 'Dog')
  message = "classes 0: 'cat' -> 'Dog', 1: 'dog' -> 'cat'"
  for run in (evaluate.evaluate_checkpoint, train.train_and_evaluate):
    with pytest.raises(ValueError, match=message):
      run(config, workdir)
  assert evaluate.evaluate_checkpoint(config, workdir, True)['eval_count'] == 8


def test_a_folder_takes_one_run_at_a_time(make_config, tmp_path):
  with (
    lock.hold(tmp_path),
    pytest.raises(lock.InUseError, match='in use by process'),
  ):
    train.train_and_evaluate(make_config(), tmp_path)
  assert not (tmp_path / 'config.json').exists()


def test_a_run_that_was_taken_over_ends(config, tmp_path, monkeypatch):
  def take_over(bar, step, epoch, values):
    holder = json.loads((tmp_path / lock.NAME).read_text())
    holder |= {'owner': 'another', 'host': 'elsewhere'}
    (tmp_path / lock.NAME).write_text(json.dumps(holder))

  monkeypatch.setattr(progress.Progress, 'show', take_over)
  with pytest.raises(lock.LostError, match='now held by .* on elsewhere'):
    train.train_and_evaluate(config, tmp_path)
  assert [line['step'] for line in logbook.read(tmp_path)] == [4]
  assert not (tmp_path / 'checkpoints').exists()
  assert (tmp_path / lock.NAME).exists()  # that of the other


@pytest.mark.parametrize('name', ['lr=[0.1]', 'a\\b', 'x*'])
def test_a_folder_that_cannot_be_read_back_is_refused(
  make_config, tmp_path, name
):
  with pytest.raises(ValueError, match='--workdir=.*pattern'):
    train.train_and_evaluate(make_config(), tmp_path / name / 'run')
  assert not (tmp_path / name).exists()
  config = make_config(1, {'compilation_cache': f'/{name}'})
  with pytest.raises(ValueError, match=r'config.compilation_cache=.*pattern'):
    train.train_and_evaluate(config, tmp_path / 'run')


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('optimizer.name', 'sgdm', 'did you mean sgd'),
    ('data.crop', 'random_resize', 'unknown crop'),
    ('data.eval_crop', 'resize_corp_32', 'unknown crop'),
    ('augment.rand_augment', '4y5', '4y5'),
  ],
)
def test_names_are_checked_before_data_are_read(
  make_config, tmp_path, field, value, message
):
  config = make_config(1, {'data.name': 'missing', field: value})
  with pytest.raises(ValueError, match=message):
    train.train_and_evaluate(config, tmp_path)


def test_it_runs_in_a_thread(make_config, tmp_path):
  reports = []

  def run():
    reports.append(train.train_and_evaluate(make_config(), tmp_path))

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert [report['steps'] for report in reports] == [1]


@pytest.mark.slow
def test_damaged_images_stop_the_run_or_are_counted(make_config, tmp_path):
  photos = _photos(tmp_path / 'photos', {'train': 9, 'test': 5})
  for name in ('train/cat/3.png', 'test/dog/2.png'):
    content = (photos / name).read_bytes()
    (photos / name).write_bytes(content[: len(content) // 2])
  config = make_config(
    4,
    {
      'data.name': 'folder',
      'data.data_dir': str(photos),
      'data.train_split': 'train',
      'data.prepare': False,
      'batch_size': 16,
      'eval_batch_size': 8,
      # 18 images: each of 3 epochs meets the damaged one, by itself and as the
      # partner of another.
      'epochs': 3.0,
      'log_every_steps': 1,
    },
  )
  with pytest.raises(
    ValueError, match=r'cannot read example \d+ of folder .*cat/3.png'
  ):
    train.train_and_evaluate(config, tmp_path / 'stops')
  config.data.skip_corrupt = True
  report = train.train_and_evaluate(config, tmp_path / 'skips')
  assert report['steps'] == 3
  lines = logbook.read(tmp_path / 'skips')
  counts = [line['skipped'] for line in lines if 'skipped' in line]
  assert len(counts) == 3
  assert 4 <= sum(counts) == report['skipped'] <= 6
  assert report['eval_skipped'] == 1
  assert report['eval_count'] == 9
