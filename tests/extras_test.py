"""What a bare install says of the extras that it lacks."""

import pathlib
import re
import subprocess
import sys

import pytest

from nfnets_jax import extras

ROOT = pathlib.Path(__file__).parents[1]
# Finds what jax, optax and AGC are made of, and nothing else.
_BARE = """
import importlib.abc, sys

class Bare(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] in sys.argv[1].split(','):
      raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Bare())
"""
_MODELS = ('haiku', 'ml_dtypes', 'safetensors', 'tqdm', 'jmp')
_TRAIN = (
  *_MODELS,
  *('array_record', 'chex', 'grain', 'matplotlib', 'ml_collections', 'orbax'),
  *('PIL', 'scipy', 'simplejpeg', 'tensorboardX', 'tensorflow_datasets'),
)


def _run_bare(code, hidden):
  done = subprocess.run(
    [sys.executable, '-c', f'{_BARE}\n{code}', hidden],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 1
  return done.stderr


@pytest.mark.parametrize(
  ('statement', 'hidden', 'distribution', 'extra'),
  [
    (
      "from nfnets_jax import models; models.create('nfnet_f0')",
      *('haiku', 'dm-haiku', 'models'),
    ),
    (
      'from nfnets_jax import weights',
      *('safetensors', 'safetensors', 'models'),
    ),
    ('from nfnets_jax.data import datasets', *('PIL', 'pillow', 'train')),
    (
      'import nfnets_jax.training.train',
      *('orbax', 'orbax-checkpoint', 'train'),
    ),
    ('import nfnets_jax.main', *('ml_collections', 'ml_collections', 'train')),
  ],
)
def test_extras_are_named(statement, hidden, distribution, extra):
  last = _run_bare(statement, hidden).splitlines()[-1]
  assert last.startswith(f"ModuleNotFoundError: No module named '{hidden}")
  assert f"{distribution} comes with the extra '{extra}'" in last
  assert f"pip install 'nfnets_jax[{extra}]'" in last


@pytest.mark.parametrize(
  ('module', 'hidden'), [('main', 'absl'), ('summary', 'haiku')]
)
def test_commands_name_extras_without_a_traceback(module, hidden):
  code = (
    'import runpy\n'
    f"runpy.run_module('nfnets_jax.{module}', None, '__main__', True)"
  )
  error = _run_bare(code, hidden)
  assert error.startswith(f"error: No module named '{hidden}'; ")
  assert "pip install 'nfnets_jax[train]'" in error
  assert len(error.splitlines()) == 1


def test_agc_and_the_variants_need_no_extra():
  code = 'import nfnets_jax.agc, nfnets_jax.models.variants'
  hidden = ','.join({*_TRAIN} - {'ml_dtypes', 'scipy'})  # jax needs these
  subprocess.run(
    [sys.executable, '-c', f'{_BARE}\n{code}', hidden], cwd=ROOT, check=True
  )


def test_missing_packages():
  extras.need('train', 'numpy', 'jax')
  with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_x'"):
    extras.need('train', 'numpy', 'no_such_x')
  with pytest.raises(ModuleNotFoundError, match=r"named 'no_such_x\.y'"):
    extras.need('train', 'no_such_x.y')


def test_extras_install_what_is_needed():
  """`need` names no package that its extra does not bring."""
  text = (ROOT / 'setup.py').read_text()
  requirements = {
    name: set(re.findall(r"'([\w-]+)[>=']", block))
    for name, block in re.findall(r'^_(\w+) = \[(.*?)\]$', text, re.M | re.S)
  }
  requirements['TRAIN'] |= requirements['MODELS']
  count = 0
  for path in (ROOT / 'nfnets_jax').rglob('*.py'):
    for call in re.findall(r'extras\.need\(([^)]*)\)', path.read_text()):
      extra, *packages = re.findall(r"'([\w.]+)'", call)
      for package in packages:
        name = extras.distribution(package)
        assert name in requirements[extra.upper()], f'{path}: {package}'
        count += 1
  assert count > 20


def test_each_extra_is_tried_in_ci():
  setup = (ROOT / 'setup.py').read_text()
  (block,) = re.findall(r'extras_require=\{(.*?)\}', setup, re.S)
  extras_and_none = {'agc', *re.findall(r"^ *'(\w+)':", block, re.M)}
  script = (ROOT / '.ci' / 'extras').read_text()
  assert extras_and_none <= set(re.findall(r'^(\w+)\(\) {$', script, re.M))
  (listed,) = re.findall(r'^all=\((.*)\)$', script, re.M)
  assert {*listed.split()} == extras_and_none
  workflow = (ROOT / '.github' / 'workflows' / 'ci.yml').read_text()
  assert {*re.findall(r'^ {10}- (\w+)$', workflow, re.M)} == extras_and_none
