"""What the README tells people to type exists, and its Python runs."""

import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from nfnets_jax import __main__ as command
from nfnets_jax import command_line, main
from nfnets_jax.models import variants

ROOT = pathlib.Path(__file__).parents[1]
PYTHONS = ['.venv/bin/python', '.venv-tensorflow/bin/python']
DOCUMENTS = [
  'README.md',
  'CONTRIBUTING.md',
  'experiments/README.md',
  'docs/training.md',
  'docs/weights.md',
  'docs/photographs.md',
  'docs/compile.md',
]


def _blocks(document, language):
  text = (ROOT / document).read_text()
  return re.findall(rf'^```{language}\n(.*?)^```', text, re.M | re.S)


def _commands():
  for document in DOCUMENTS:
    for block in _blocks(document, 'bash'):
      for line in block.replace('\\\n', ' ').splitlines():
        if words := shlex.split(line, comments=True):
          yield pytest.param(words, id=' '.join(words)[:60])


def _make_targets():
  return set(
    re.findall(r'^([a-z0-9-]+):', (ROOT / 'Makefile').read_text(), re.M)
  )


@pytest.mark.parametrize('words', list(_commands()))
def test_command_exists(words, monkeypatch):
  program, *arguments = words
  if program.rpartition('/')[2] == 'nfnets-jax':
    module, first, _ = command._COMMANDS[arguments[0]]
    program = PYTHONS[0]
    arguments = ['-m', f'nfnets_jax.{module}', *first, *arguments[1:]]
  if program == 'make':
    targets = [word for word in arguments if '=' not in word]
    assert set(targets) <= _make_targets()
  elif program in PYTHONS and arguments[1] != 'pip':
    assert arguments[0] == '-m'
    assert importlib.util.find_spec(arguments[1]) is not None
    if arguments[1] == 'nfnets_jax.main':
      _parse_config(arguments[2:], monkeypatch)
  elif program not in (*PYTHONS, 'pip'):
    assert (ROOT / program).exists()


def _parse_config(arguments, monkeypatch):
  """Loads the config and applies the overrides as main does."""
  assert main._CONFIG is not None  # defines the flags
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(sys, 'argv', ['main'])
  if '--mode=evaluate' in arguments and '--config=' not in ' '.join(arguments):
    # The config is that of a run or file, which is not here.
    arguments = ['--config=experiments/digits.py', *arguments]
  with flagsaver.flagsaver():
    command_line.parse_flags(['main', *arguments])
    if config := flags.FLAGS.config:
      variants.get(config.model.name)


@pytest.mark.thorough
@pytest.mark.parametrize('code', _blocks('README.md', 'python'))
def test_python_runs(code):
  exec(compile(code, 'README.md', 'exec'), {})


def test_links_lead_somewhere():
  for document in DOCUMENTS:
    text = (ROOT / document).read_text()
    for link in re.findall(r'\]\((?!http)([^)#]+)\)', text):
      target = (ROOT / document).parent / link
      assert target.exists(), f'{document} links to {link}'


def test_files_and_modules_that_are_named_exist():
  documents = {
    *ROOT.glob('*.md'),
    *(ROOT / 'docs').rglob('*.md'),
    *(ROOT / 'experiments').rglob('*.md'),
  }
  # The changelog names what is gone, too.
  for document in documents - {ROOT / 'CHANGELOG.md'}:
    text = document.read_text()
    for path in re.findall(
      r'(?<![\w/.])(?:tests|experiments|nfnets_jax|docs)/[\w/-]+\.\w+', text
    ):
      assert (ROOT / path).exists(), f'{document.name} names {path}'
    for module in re.findall(
      r'python -m\s+((?:experiments|nfnets_jax)[.\w]*\w)', text
    ):
      assert importlib.util.find_spec(module), f'{document.name}: {module}'


def test_table_of_models_is_the_code():
  rows = re.findall(
    r'^\| (F\d) \| ([\d.]+) M \| ([\d.]+) G \| (\d+) / (\d+)',
    (ROOT / 'README.md').read_text(),
    re.M,
  )
  assert len(rows) == 7
  for name, _, _, train, test in rows:
    variant = variants.get(f'nfnet_{name.lower()}')
    assert (variant.train_size, variant.test_size) == (int(train), int(test))


def test_make_helps_with_every_target():
  out = subprocess.run(
    ['make'], cwd=ROOT, capture_output=True, text=True, check=True
  ).stdout
  listed = set(re.findall(r'^  make ([a-z0-9-]+) +\S', out, re.M))
  assert listed == _make_targets() - {'check-topology'}
