"""The command line, in processes of its own."""

import csv
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import digits
from nfnets_jax import command_line, main, paths, predict, weights
from nfnets_jax.runtime import checkpoint, logbook, meters
from nfnets_jax.runtime import workdir as workdirs
from nfnets_jax.training import init_from

ROOT = pathlib.Path(__file__).parents[1]

DIGITS = 'experiments/digits.py'


def _start(arguments, config=DIGITS, cache=None, module='nfnets_jax.main'):
  """Starts the command on one device, compiling fast."""
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    # The last of two equal flags counts.
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} '
    '--xla_force_host_platform_device_count=1',
  }
  if cache:
    environment['JAX_COMPILATION_CACHE_DIR'] = str(cache)
  if config:
    arguments = [f'--config={config}', *arguments]
  return subprocess.Popen(
    [sys.executable, '-m', module, *arguments],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _run(arguments, **kwargs):
  process = _start(arguments, **kwargs)
  out, err = process.communicate(timeout=900)
  return process.returncode, out, err


def _flags(tmp_path, **changes):
  """A run of four steps of a small net on 64 small images, with `changes`."""
  fields = {
    'model.width': '(64,)',
    'model.depth': '(1,)',
    'model.strides': '(1,)',
    'model.group_width': '(16,)',
    'model.stem_width': '(32,)',
    'model.stem_strides': '(2,)',
    'data.data_dir': tmp_path / 'data',
    'data.train_split': 'train[:64]',
    'data.image_size': 8,
    'data.eval_image_size': 8,
    'augment.mixup_alpha': None,
    'batch_size': 16,
    'epochs': 1.0,
    'optimizer.warmup_epochs': 0.5,
    **changes,
  }
  return [f'--config.{name}={value}' for name, value in fields.items()]


@pytest.mark.slow
def test_train_and_evaluate(tmp_path):
  workdir = tmp_path / 'run'
  arguments = [f'--workdir={workdir}', *_flags(tmp_path)]
  code, out, err = _run(arguments)
  assert code == 0, err
  recorded = json.loads((workdir / 'config.json').read_text())
  assert recorded['augment']['mixup_alpha'] is None
  assert recorded['model']['width'] == [64]
  report = json.loads((workdir / 'report.json').read_text())
  assert report['steps'] == 4
  table = [line.split() for line in out.splitlines()]
  top_1 = f'{100 * report["eval_top_1"]:.2f}'
  ema_top_1 = f'{100 * report["ema_eval_top_1"]:.2f}'
  assert ['top-1', top_1, '%', ema_top_1, '%'] in table
  assert ['steps', '4'] in table

  # With the config of the run, then with that of its exported weights.
  evaluation = [f'--workdir={workdir}', '--mode=evaluate']
  code, out, err = _run([*evaluation, '--per_class'], config=None)
  assert code == 0, err
  table = [line.split() for line in out.splitlines()]
  assert ['top-1', top_1, '%', ema_top_1, '%'] in table
  assert not any('parameters' in line for line in table)
  assert (workdir / 'evaluation-digits-test-8px-confusion.png').exists()
  written = json.loads(
    (workdir / 'evaluation-digits-test-8px.json').read_text()
  )
  for name in ('eval_loss', 'ema_eval_loss', 'eval_top_5'):
    assert written[name] == report[name]

  # The results are shown even if they cannot be written.
  (workdir / 'evaluation-digits-test-8px-2-classes.csv').touch()
  code, out, err = _run([*evaluation, '--per_class'], config=None)
  assert code == 1 and '8px-2-classes.csv' in err
  assert ['top-1', top_1, '%', ema_top_1, '%'] in map(
    str.split, out.split('\n')
  )

  average = init_from.load_average(workdir)
  weights.write(tmp_path / 'tiny.safetensors', average)
  code, out, err = _run(
    [
      '--mode=evaluate',
      f'--workdir={tmp_path / "other"}',
      f'--config.init_from={tmp_path / "tiny.safetensors"}',
      '--config.data.name=digits',
      '--config.data.test_split=test',
      f'--config.data.data_dir={tmp_path / "data"}',
    ],
    config=None,
  )
  assert code == 0, err
  table = [line.split() for line in out.splitlines()]
  assert ['top-1', ema_top_1, '%'] in table
  with (tmp_path / 'other' / 'evaluations.csv').open() as file:
    (row,) = csv.DictReader(file)
  assert (row['image_size'], row['crop']) == ('8', 'resize')
  assert float(row['top_1']) == report['ema_eval_top_1']


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], '--workdir is missing; --help shows the flags'),
    pytest.param(
      ['--workdir=DIR', '--config.optimizer.name=sgdm'],
      "optimizer.name is 'sgdm'; choose one of sgd, ",
      marks=pytest.mark.thorough,
    ),
  ],
)
def test_mistakes_are_told_in_a_line(tmp_path, arguments, message):
  workdir = tmp_path / 'run'
  code, out, err = _run([x.replace('DIR', str(workdir)) for x in arguments])
  assert code == 1
  assert message in err and 'error: ' in err
  assert 'Traceback' not in err
  assert not out and not workdir.exists()


@pytest.mark.parametrize(
  ('workdir', 'message'),
  [
    ('', '--workdir is empty; give a path'),
    ('runs/lr=[0.1]', r"--workdir=runs/lr=\[0.1\] has '\[', which checkpoints"),
    ('back\\slash', r".* has '\\\\', which checkpoints and data"),
    ('~no_such_user/run', '--workdir=~no_such_user/run: the home directory is'),
    ('FILE', '--workdir=.*/file: .*/file is not a folder'),
    ('FILE/run', '--workdir=.*/file/run: .*/file is not a folder'),
    ('ftp://bucket', '--workdir=ftp://bucket is not a path; buckets are gs://'),
  ],
)
def test_workdirs_that_are_refused(tmp_path, workdir, message):
  (tmp_path / 'file').touch()
  workdir = workdir.replace('FILE', str(tmp_path / 'file'))
  with flagsaver.flagsaver():
    command_line.parse_flags(
      ['main', f'--config={ROOT / DIGITS}', f'--workdir={workdir}']
    )
    with pytest.raises(SystemExit, match=f'error: {message}'):
      main.start()


@pytest.fixture
def parse():
  """Parses arguments of the command, and returns the config."""

  def parse(*arguments):
    main.parse_flags(['main', *arguments])
    return flags.FLAGS['config'].value

  argv = sys.argv
  with flagsaver.flagsaver():
    yield parse
  sys.argv = argv


def test_evaluation_takes_the_config_of_the_run(parse, tmp_path):
  config = digits.get_config()
  config.init_from = 'F0_haiku.npz'
  workdirs.record(tmp_path, config)
  taken = parse(
    '--mode=evaluate',
    f'--workdir={tmp_path}',
    '--config.data.eval_image_size=24',
    '--config.data.data_dir=photos',
  )
  assert taken.init_from is None
  assert (taken.data.eval_image_size, taken.data.data_dir) == (24, 'photos')
  assert taken.model.to_dict() == config.model.to_dict()
  with pytest.raises(
    SystemExit, match='no such field; did you mean data.eval_'
  ):
    parse(
      '--mode=evaluate', f'--workdir={tmp_path}', '--config.data.eval_size=24'
    )


def test_evaluation_without_a_run(parse, tmp_path):
  arguments = ['--mode', 'evaluate', f'--workdir={tmp_path / "x"}']
  with pytest.raises(SystemExit, match='no run to evaluate in .*/x; train fir'):
    parse(*arguments)
  with pytest.raises(SystemExit, match=r'init_from: there is no .*none\.npz'):
    parse(*arguments, '--config.init_from=none.npz')
  with pytest.raises(SystemExit, match='--config is missing'):
    parse(f'--workdir={tmp_path}')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--per_class'], '--per_class needs --mode=evaluate'),
    (['--profile=9', '--mode=evaluate'], '--profile needs --mode=train'),
    (['--label_sets=real.json'], '--label_sets needs --mode=evaluate'),
    (
      ['--per_class', '--label_sets=real.json', '--mode=evaluate'],
      'one label an image; omit --label_sets',
    ),
  ],
)
def test_options_of_evaluation(parse, arguments, message):
  parse(f'--config={ROOT / DIGITS}', '--workdir=x', *arguments)
  with pytest.raises(SystemExit, match=message):
    main.start()


def test_workdir_in_the_home_directory(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  with flagsaver.flagsaver():
    command_line.parse_flags(
      ['main', f'--config={ROOT / DIGITS}', '--workdir=~/a run']
    )
    assert main.start() == tmp_path / 'a run'


def _kept(workdir):
  """The steps of the complete checkpoints."""
  return set(checkpoint.steps(workdir / 'checkpoints'))


def _half_written(workdir):
  """The folders that Orbax has not yet renamed or, in a bucket, marked."""
  try:
    names = {path.name for path in (workdir / 'checkpoints').iterdir()}
  except FileNotFoundError:
    return set()
  return {name for name in names if name not in map(str, _kept(workdir))}


def _kill_at_random(process, workdir, rng, when):
  """Kills without warning; says whether a checkpoint was half-written then."""
  newest = max(_kept(workdir), default=0)
  left, lines = _half_written(workdir), logbook.read(workdir)

  def trains():
    # They are cut back to the checkpoint before training goes on.
    now = logbook.read(workdir)
    return now != lines and max((x['step'] for x in now), default=0) > newest

  def wait_until(condition, seconds, pause):
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
      if condition():
        return
      time.sleep(pause)

  if when == 'starting':
    wait_until(lambda: False, rng.uniform(0, 6), 0.01)
  else:
    wait_until(trains, 300, 0.05)
    wait_until(lambda: False, rng.uniform(0, 1), 0.01)
    if when == 'writing':
      pause = 0.02 if paths.in_bucket(workdir) else 0.0002
      wait_until(lambda: _half_written(workdir) - left, 60, pause)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL, 'the run ended too early'
  return bool(_half_written(workdir) - left)


def _kill_after_next_checkpoint(process, workdir):
  """Waits for a checkpoint that was not there, then kills without warning."""
  before, deadline = _kept(workdir), time.monotonic() + 200
  while process.poll() is None and not _kept(workdir) - before:
    assert time.monotonic() < deadline
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_signals_save_the_run_and_the_same_command_goes_on(tmp_path):
  workdir = tmp_path / 'run'
  changes = {
    'epochs': 1000.0,
    'log_every_steps': 2,
    'checkpoint_every_epochs': 1000.0,
    'eval_every_epochs': 1000.0,
  }
  arguments = [f'--workdir={workdir}', *_flags(tmp_path, **changes)]
  stopped = []
  for number in (signal.SIGTERM, signal.SIGINT):
    process = _start(arguments, cache=tmp_path / 'compiled')
    deadline, seen = time.monotonic() + 200, len(logbook.read(workdir))
    while len(logbook.read(workdir)) <= seen and process.poll() is None:
      assert time.monotonic() < deadline
      time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 75, err
    message = f'{number.name} stopped the run after step '
    assert message in err
    stopped.append(int(err.split(message)[1].split(';')[0]))
    assert (workdir / 'checkpoints' / str(stopped[-1])).is_dir()
  assert f'resumed after step {stopped[0]}' in out
  assert 0 < stopped[0] < stopped[1] < 4000


@pytest.mark.slow
@pytest.mark.parametrize('norm', [None, 'batch'])
def test_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, norm):
  """Without warning and twice, with nothing but what lies on the disk."""
  changes = {
    'model.norm': norm,
    'epochs': 16.0,
    'log_every_steps': 2,
    'eval_every_epochs': 4.0,
    'checkpoint_every_epochs': 1.0,
  }
  flags = _flags(tmp_path, **changes)
  cache = tmp_path / 'compiled'

  straight = tmp_path / 'straight'
  code, _, err = _run([f'--workdir={straight}', *flags], cache=cache)
  assert code == 0, err

  workdir = tmp_path / 'killed'
  arguments = [f'--workdir={workdir}', *flags]
  for _ in range(2):
    _kill_after_next_checkpoint(_start(arguments, cache=cache), workdir)
    assert not (workdir / 'report.json').exists()
  code, out, err = _run(arguments, cache=cache)
  assert code == 0, err
  assert 'resumed after step' in out

  def without_speed(values):
    return {k: x for k, x in values.items() if k not in meters.SPEEDS}

  reports = [
    without_speed(json.loads((folder / 'report.json').read_text()))
    for folder in (straight, workdir)
  ]
  assert reports[0]['steps'] == 64
  assert reports[0] == reports[1]
  assert [without_speed(line) for line in logbook.read(workdir)] == [
    without_speed(line) for line in logbook.read(straight)
  ]


@pytest.mark.slow
def test_weights_and_compiled_steps_in_a_bucket(tmp_path, bucket, monkeypatch):
  """`compile` fills the cache; the second run starts from the first."""
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  # XLA's own caches are local folders, whose names are in jax's keys.
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES', 'none')
  monkeypatch.setenv('JAX_DEBUG_LOG_MODULES', 'jax._src.compiler')
  cache = bucket / 'compiled'
  flags = _flags(tmp_path, compilation_cache=cache)
  code, _, err = _run(flags, cache=cache, module='nfnets_jax.compile')
  assert code == 0, err
  keys = {x.name.removesuffix('-cache') for x in cache.iterdir()}
  steps = {key for key in keys if key.startswith('jit__fun-')}  # of pmap
  assert len(steps) == 2, keys
  for name in ('first', 'second'):
    code, out, err = _run([f'--workdir={bucket / name}', *flags])
    assert code == 0, err
    found = re.findall(r"cache hit for 'jit__fun' with key '(.*)'", err)
    assert steps <= set(found), err
    flags.append(f'--config.init_from={bucket / "first"}')
  assert 'initialised from nfnet_tiny' in out
  curves = bucket / 'second/curves.png'
  drawn = curves.read_bytes()
  logbook.plot_curves(bucket / 'second')
  assert drawn == curves.read_bytes()  # of all metrics, the last ones too


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
  _check_kills(tmp_path, tmp_path / 'killed', epochs=400)


@pytest.mark.slow
def test_twenty_kills_of_a_run_in_a_bucket_change_nothing(tmp_path, bucket):
  # Few steps: a checkpoint takes longer there than all steps before the next.
  _check_kills(tmp_path, bucket, epochs=200)


def _check_kills(tmp_path, workdir, epochs, kills=20):
  """Not one bit of the parameters, and each example is seen just as often."""
  rng = random.Random(0)
  changes = {
    'epochs': float(epochs),
    'log_every_steps': 1,
    'checkpoint_every_epochs': 2.5,
    'eval_every_epochs': epochs / 2,
  }
  flags = _flags(tmp_path, **changes)
  cache = tmp_path / 'compiled'
  straight = tmp_path / 'straight'
  code, _, err = _run([f'--workdir={straight}', *flags], cache=cache)
  assert code == 0, err

  arguments = [f'--workdir={workdir}', *flags]
  half_written, steps = 0, []
  for kill in range(kills):
    when = ('writing', 'training', 'writing', 'writing', 'starting')[kill % 5]
    process = _start(arguments, cache=cache)
    half_written += _kill_at_random(process, workdir, rng, when)
    steps.append(max(_kept(workdir), default=0))
  print(f'killed after steps {steps}, {half_written} half-written checkpoints')
  assert steps == sorted(steps), 'a checkpoint was lost'
  assert half_written >= kills // 7
  assert not (workdir / 'report.json').exists()
  code, out, err = _run(arguments, cache=cache)
  assert code == 0, err
  assert f'resumed after step {steps[-1]}' in out

  def lines(folder):
    return [
      {k: x for k, x in line.items() if k not in meters.SPEEDS}
      for line in logbook.read(folder)
    ]

  # The same loss at each step, so of the same images.
  assert lines(workdir) == lines(straight)
  counted = [x['step'] for x in lines(workdir) if x['split'] == 'train']
  assert counted == list(range(1, 4 * epochs + 1))
  # Of the whole state, and of the loader's place in the stream.
  fingerprints = [
    (folder / f'checkpoints/{4 * epochs}/fingerprint/metadata').read_text()
    for folder in (straight, workdir)
  ]
  assert fingerprints[0] == fingerprints[1]


_NO_BACKEND = """
import sys
from jax._src import xla_bridge
from nfnets_jax import main
main.parse_flags(['main', '--mode=evaluate', '--workdir=x', *sys.argv[1:]])
assert main._CONFIG.value.model.name == 'nfnet_tiny'
assert not xla_bridge.backends_are_initialized()
"""


@pytest.mark.thorough
@pytest.mark.parametrize('form', ['haiku', 'timm'])
def test_settings_of_weights_are_read_before_processes_join(tmp_path, form):
  file = tmp_path / 'tiny.safetensors'
  weights.write(file, predict.random_weights('nfnet_tiny', 10), form)
  subprocess.run(
    [sys.executable, '-c', _NO_BACKEND, f'--config.init_from={file}'],
    check=True,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
  )


def test_init_from_that_is_no_file_is_named(parse, tmp_path):
  with pytest.raises(SystemExit, match=r'config\.init_from: .*runs/typo'):
    parse('--mode=evaluate', '--workdir=x', '--config.init_from=runs/typo')
