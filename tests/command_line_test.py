"""The flags, parsed in this process as by the command."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

import nfnets_jax
from nfnets_jax import __main__ as command
from nfnets_jax import command_line, main, paths
from nfnets_jax.training import config as defaults

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = ROOT / 'experiments' / 'digits.py'


@pytest.fixture
def parse(monkeypatch):
  """Parses arguments behind --workdir; returns the config."""
  assert main._CONFIG is not None  # defines the flags
  monkeypatch.setattr('sys.argv', ['main'])

  def parsed(*arguments):
    command_line.parse_flags(['main', '--workdir=run', *map(str, arguments)])
    return flags.FLAGS.config

  with flagsaver.flagsaver():
    yield parsed


def test_config_is_read_and_overridden(parse):
  config = parse(
    f'--config={DIGITS}',
    '--config.batch_size=8',
    '--config.model.width=(8, 8, 8)',
    '--noconfig.data.flip',
    '--config.augment.mixup_alpha=None',
    '--config.model.alpha=None',
  )
  assert config.batch_size == 8 and config.model.width == (8, 8, 8)
  assert config.data.flip is False
  assert config.augment.mixup_alpha is None and config.model.alpha is None
  assert config.is_locked


def test_home_directory_in_the_path(parse, monkeypatch):
  monkeypatch.setenv('HOME', str(ROOT))
  config = parse('--config=~/experiments/nf_resnet_imagenet.py:101')
  assert config.model.name == 'nf_resnet101'
  monkeypatch.setenv('HOME', '/of nothing')
  with pytest.raises(SystemExit, match='there is no file /of nothing/'):
    parse('--config=~/experiments/nf_resnet_imagenet.py:101')


def test_characters_of_patterns_in_the_path(parse, tmp_path):
  path = tmp_path / 'a [0.1]*' / 'c?.py'
  path.parent.mkdir()
  path.write_text(DIGITS.read_text())
  assert parse(f'--config={path}').epochs == 40


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    (
      'experiments/digit.py',
      r'no file .*experiments/digit\.py; did you .* digi',
    ),
    (
      'experiments/nfnet_imagenet:F0',
      r'no file .*did you mean nfnet_imagenet\.',
    ),
    ('expermients/digits.py', 'there is no folder .*/expermients either'),
    ('experiments', 'is a folder, not a file'),
    ('experiments/nfnet_imagenet.py:F9', "no NFNet 'F9'; choose one of F0, F0"),
    (
      'experiments/finetune.py:nfnet_f0',
      "'nfnet_f0' is no 'MODEL,",
    ),
    ('experiments/digits.py:F0', 'it takes no argument; omit :F0'),
    ('experiments/__init__.py', 'it defines no function get_config'),
  ],
)
def test_configs_that_are_refused(parse, config, message):
  with pytest.raises(SystemExit, match=f'^error: --config.*{message}') as told:
    parse(f'--config={ROOT / config}')
  assert 'Traceback' not in str(told.value)


def test_empty_path(parse):
  with pytest.raises(SystemExit, match='error: --config is empty; give a path'):
    parse('--config=')


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('def get_config(:\n  pass', 'SyntaxError: '),
    ('import no_such_module', "No module named 'no_such_module'"),
    ('def get_config():\n  return config', "name 'config' is not defined"),
    ('def get_config():\n  return open("x")', "No such file .*: 'x'"),
    ('def get_config():\n  raise ValueError("mine")', 'ValueError: mine'),
  ],
)
def test_faults_of_a_config_keep_their_traceback(
  parse, text, message, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  path = tmp_path / 'faulty.py'
  path.write_text(text)
  with pytest.raises(SystemExit, match=message) as told:
    parse(f'--config={path}')
  words = str(told.value)
  assert f'File "{path}", line ' in words
  assert 'command_line' not in words  # from the config file on


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('def get_config(x):\n  return x', 'it needs an argument: --config='),
    ('def get_config():\n  pass', 'returns NoneType, not a ConfigDict'),
    ('def get_config():\n  return {}', 'returns dict, not a ConfigDict'),
  ],
)
def test_configs_without_a_config(parse, text, message, tmp_path):
  path = tmp_path / 'odd.py'
  path.write_text(text)
  with pytest.raises(SystemExit, match=message):
    parse(f'--config={path}')


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    (
      'batchsize=8',
      r'batchsize: there is no such .* did you mean batch_size\?$',
    ),
    ('ephocs=None', r'ephocs: .* did you mean epochs\?$'),
    ('epochs.x=1', r'epochs\.x: .* did you mean epochs\?$'),
    ('clipping=0.1', r'did you mean optimizer\.clipping\?$'),
    ('optimizer.nmae=sgd', r'did you mean optimizer\.name\?$'),
    ('model.groupwidth=(8,)', r'did you mean model\.group_width\?$'),
    ('zzz=1', r'there is no such field; nfnets_jax/training/config\.py lists'),
    ('batch_size=abc', 'batch_size=abc: not a whole number'),
    ('batch_size=1.5', 'batch_size=1.5: not a whole number'),
    ('epochs=ten', 'epochs=ten: not a number'),
    ('data.flip=perhaps', 'data.flip=perhaps: neither true nor false'),
    ('seed=None', 'seed=None: it cannot be off; it is 0'),
    ('data.crop=None', "data.crop=None: it cannot be off; it is 'pad_2'"),
    ('model=3', 'model=3: .* is not a dict'),
  ],
)
def test_fields_that_are_refused(parse, argument, message):
  with pytest.raises(SystemExit, match=r'^error: --config\.') as told:
    parse(f'--config={DIGITS}', f'--config.{argument}')
  first_line = str(told.value).splitlines()[0]

  assert len(first_line) < 120
  assert re.search(message, first_line)


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--mode=test', r'--mode=test: choose one of train\|evaluate'),
    ('--start_timeout=soon', '--start_timeout=soon: not a whole number'),
    ('--wordkir=x', r'there is no flag --wordkir; did you mean --workdir\?'),
    ('--zzz=x', 'there is no flag --zzz; --help shows the flags'),
    ('--zzz x', 'there is no flag --zzz; --help'),
    ('--workdir', '--workdir has no value; give --workdir=VALUE'),
    ('--workdir --mode=train', '--workdir has no value'),
    ('train', 'unexpected argument train; flags begin with --'),
    ('--noallow_config_change train', 'unexpected argument train'),
    (
      'experiments/digits.py:x',
      r'unexpected .*; did you mean --config=experiments/digits\.py:x\?',
    ),
  ],
)
def test_flags_that_are_refused(parse, argument, message):
  with pytest.raises(SystemExit, match=f'^error: {message}') as told:
    parse(f'--config={DIGITS}', *argument.split())
  assert '\n' not in str(told.value)


def test_values_behind_a_space(parse):
  config = parse(
    '--config', DIGITS, '--config.batch_size', '8', '--workdir', '-'
  )
  assert config.batch_size == 8 and flags.FLAGS.workdir == '-'


@pytest.mark.parametrize(
  ('arguments', 'shown'),
  [
    ([], 'epochs=360.0  eval_batch_size=1024'),
    ([f'--config={DIGITS}'], 'epochs=40.0  eval_batch_size=128'),
    (['--config', DIGITS], 'data.name=digits'),
  ],
)
def test_help_shows_the_fields(parse, capsys, arguments, shown):
  with pytest.raises(SystemExit) as told:
    parse(*arguments, '--help')
  assert told.value.code is None
  out = capsys.readouterr().out
  words = {
    word.partition('=')[0] for word in out[out.index('Fields') :].split()
  }
  config = defaults.get_config()
  assert words >= {*command_line._fields(config)}
  assert shown in out


def test_help_refuses_a_missing_config(parse):
  with pytest.raises(
    SystemExit, match='no file .*digit.py; did you mean digits'
  ):
    parse(f'--config={DIGITS.parent}/digit.py', '--help')


def test_subcommands(capsys):
  for arguments in [], ['--help']:
    command.main(arguments)
    usage = capsys.readouterr().out
    for name, (module, _, text) in command._COMMANDS.items():
      assert f'  {name} ' in usage and text in usage
      assert importlib.util.find_spec(f'nfnets_jax.{module}')
  command.main(['--version'])
  assert capsys.readouterr().out == f'{nfnets_jax.__version__}\n'
  with pytest.raises(
    SystemExit, match="no command 'pedict'; did you mean pred"
  ):
    command.main(['pedict', 'cat.jpg'])
  with pytest.raises(SystemExit, match="no command 'x'; choose one of train, "):
    command.main(['x'])


def test_a_subcommand_is_the_module():
  words = ['evaluate', f'--config={DIGITS}', '--help']
  done = subprocess.run(
    [sys.executable, '-m', 'nfnets_jax', *words],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert '  --workdir: ' in done.stdout  # its own flags
  assert 'data.name=digits' in done.stdout


def test_faults_are_not_hidden():
  """Only what this package raises on purpose is told without a traceback."""
  with (
    pytest.raises(SystemExit, match='error: path is empty; give a path'),
    command_line.telling(),
  ):
    paths.expand('')
  with (
    pytest.raises(SystemExit, match='error: no/such: No such file or dir'),
    command_line.telling(),
  ):
    pathlib.Path('no/such').read_bytes()
  # In a line of this package that is no `raise`, and in Python.
  with pytest.raises(TypeError), command_line.telling():
    paths.expand(3)
  with pytest.raises(ValueError, match='invalid'), command_line.telling():
    int('x')
  with pytest.raises(KeyError), command_line.telling():
    raise KeyError('of a test, which is not of this package')
