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


@pytest.mark.parametrize(
  ('statement', 'hidden', 'message'),
  [
    (
      "from nfnets_jax import models; models.create('nfnet_f0')",
      'haiku',
      "No module named 'haiku'; .* pip install 'nfnets_jax[models]'",
    ),
    (
      'from nfnets_jax import weights',
      'safetensors',
      "No module named 'safetensors'; .* pip install 'nfnets_jax[models]'",
    ),
    (
      'from nfnets_jax.data import datasets',
      'grain,PIL',
      "No module named 'grain'; .* pip install 'nfnets_jax[train]'",
    ),
    (
      'import nfnets_jax.training.train',
      'orbax',
      "No module named 'orbax.checkpoint'; .* pip install 'nfnets_jax[train]'",
    ),
    (
      'import nfnets_jax.convert',
      'haiku',
      "No module named 'haiku'; .* pip install 'nfnets_jax[train]'",
    ),
    (
      'import nfnets_jax.main',
      'ml_collections',
      "No module named 'ml_collections'; .* pip install 'nfnets_jax[train]'",
    ),
  ],
)
def test_extras_are_named(statement, hidden, message):
  done = subprocess.run(
    [sys.executable, '-c', f'{_BARE}\n{statement}', hidden],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 1
  pattern = re.escape(message).replace(r'\.\*', '.*')
  assert re.search(f'ModuleNotFoundError: {pattern}', done.stderr), done.stderr


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


def test_extras_install_what_is_asked_for():
  """`need` names no package that its extra does not bring."""
  names = {'haiku': 'dm-haiku', 'PIL': 'pillow', 'orbax': 'orbax-checkpoint'}
  text = (ROOT / 'setup.py').read_text()
  models = text[text.index('_MODELS = [') : text.index('_TRAIN = [')]
  train = models + text[text.index('_TRAIN = [') : text.index('_TEST = [')]
  found = 0
  for path in (ROOT / 'nfnets_jax').rglob('*.py'):
    for call in re.findall(r'extras\.need\(([^)]*)\)', path.read_text()):
      extra, *packages = re.findall(r"'([\w.]+)'", call)
      for package in packages:
        name = package.partition('.')[0]
        distribution = names.get(name, name)
        spelt = re.compile(
          distribution.replace('_', '[-_]').replace('absl', 'absl-py')
        )
        assert spelt.search({'models': models, 'train': train}[extra]), package
        found += 1
  assert found > 20
