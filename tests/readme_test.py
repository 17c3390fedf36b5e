"""What the documents tell people to type exists, and their Python runs."""

import functools
import importlib.util
import itertools
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
# Without docs/_build, where `make docs` copies the pages.
PAGES = [x for x in (ROOT / 'docs').rglob('*.md') if '_build' not in x.parts]
PYTHON = '.venv/bin/python'
PYTHONS = [PYTHON, '.venv-tensorflow/bin/python']
# `launch_test.py` has those of experiments/launch/README.md.
DOCUMENTS = [
  'README.md',
  'CONTRIBUTING.md',
  'experiments/README.md',
  *sorted(str(x.relative_to(ROOT)) for x in PAGES),
]


def _blocks(document, language):
  text = (ROOT / document).read_text()
  return re.findall(rf'^```{language}\n(.*?)^```', text, re.M | re.S)


def _lines(text):
  for line in text.replace('\\\n', ' ').splitlines():
    if words := shlex.split(line, comments=True):
      yield words


def _commands():
  found = {}
  for document in DOCUMENTS:
    for block in _blocks(document, 'bash'):
      for words in _lines(block):
        found.setdefault(' '.join(words), words)
  return [pytest.param(words, id=line[:60]) for line, words in found.items()]


def _snippets():
  # `tests/agc/docs_test.py` has those of the guide to AGC.
  documents = [x for x in DOCUMENTS if x != 'docs/agc.md']
  codes = [code for x in documents for code in _blocks(x, 'python')]
  return list(dict.fromkeys(codes))


def _make_targets():
  return set(
    re.findall(r'^([a-z0-9-]+):', (ROOT / 'Makefile').read_text(), re.M)
  )


@pytest.mark.parametrize('words', _commands())
def test_command_exists(words, monkeypatch):
  program, *arguments = words
  if program == 'make':
    for words in _recipe(tuple(arguments)):
      _check_python(words, monkeypatch)
  elif program.rpartition('/')[2] == 'nfnets-jax':
    module, first, _ = command._COMMANDS[arguments[0]]
    module = f'nfnets_jax.{module}'
    _check_python(['-m', module, *first, *arguments[1:]], monkeypatch)
  elif program in PYTHONS and arguments[1] != 'pip':
    _check_python(arguments, monkeypatch)
  elif program == 'docker':
    options = dict(itertools.pairwise(arguments))
    text = (ROOT / options.get('--file', 'Dockerfile')).read_text()
    if '--build-arg' in options:
      name = options['--build-arg'].partition('=')[0]
      assert re.search(f'^ARG {name}=', text, re.M)
  elif program not in (*PYTHONS, 'pip'):
    assert (ROOT / program).exists()


@functools.cache
def _recipe(arguments):
  """The arguments of our Python commands that make would run."""
  done = subprocess.run(
    ['make', '--dry-run', *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  ours = re.findall(
    r'python (-m (?:nfnets_jax|experiments)\..*)',
    done.stdout.replace('\\\n', ' '),
  )
  return [shlex.split(line) for line in ours]


def _check_python(arguments, monkeypatch):
  dash, module, *arguments = arguments
  assert dash == '-m'
  assert importlib.util.find_spec(module) is not None
  if module == 'nfnets_jax.main':
    _parse_config(arguments, monkeypatch)
    return
  for argument in arguments:
    flag = re.match(r'--([\w-]+)', argument)
    if flag and not argument.startswith('--config'):
      assert re.fullmatch(_flags(module), flag[1]), f'{module} has no {flag[0]}'


@functools.cache
def _flags(module):
  """A pattern of the flags that a command or the modules beside it declare."""
  path = pathlib.Path(importlib.util.find_spec(module).origin)
  text = ''.join(x.read_text() for x in path.parent.glob('*.py'))
  absl = re.findall(r"DEFINE_\w+\(\s*'(\w+)'", text)
  # One of argparse may be made of a variable: f'--{name}_python'.
  others = re.findall(r"'--([\w{}-]+)'", text)
  names = [re.sub(r'{\w+}', r'\\w+', name) for name in others]
  return '|'.join([*absl, *(f'no{name}' for name in absl), *names])


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
@pytest.mark.parametrize('code', _snippets())
def test_python_runs(code):
  exec(compile(code, 'snippet', 'exec'), {})


def test_links_lead_somewhere():
  for document in DOCUMENTS:
    text = (ROOT / document).read_text()
    for link in re.findall(r'\]\((?!http)([^)#]+)\)', text):
      target = (ROOT / document).parent / link
      assert target.exists(), f'{document} links to {link}'


def test_files_and_modules_that_are_named_exist():
  documents = {
    *ROOT.glob('*.md'),
    *PAGES,
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
    (ROOT / 'docs/networks.md').read_text(),
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
