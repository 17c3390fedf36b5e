"""The floors of the house: who may import whom, and where tests are."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / 'nfnets_jax').rglob('*.py'))
PARTS = {
  'agc',
  'models',
  'data',
  'devices',
  'extras',
  'hlo',
  'hlo_text',
  'paths',
  'runtime',
  'topologies',
  'weights',
  'training',
}

# Which other parts of the library the parts may import.
ALLOWED = {
  'agc': set(),
  'models': {'extras'},
  'devices': set(),
  'extras': set(),
  'hlo': {'hlo_text'},
  'hlo_text': set(),
  'paths': {'extras'},
  'runtime': {'devices', 'extras', 'paths'},
  'topologies': {'devices'},
  'data': {'extras', 'paths'},
  'weights': {'extras', 'models', 'paths'},
  'training': PARTS,
}


# Tests of a subject that is in several modules, or is none.
SUBJECTS = {
  'agc/docs_test.py',
  'data/prepare/build_slow_test.py',
  'experiments/configs_test.py',
  'experiments/launch/launch_test.py',
  'experiments/launch/rehearsal_test.py',
  'experiments/examples/quickstart_test.py',
  'experiments/reproduce/paper_scale_test.py',
  'floors_test.py',
  'models/features_test.py',
  'multi_process_test.py',
  'network_test.py',
  'readme_test.py',
  'rivals_test.py',
  'runtime/buckets_test.py',
}


# Directories in which only the doors may know the config of a run.
ROOMS = {'agc', 'data', 'models', 'runtime', 'training', 'weights'}
DOORS = {
  'nfnets_jax/runtime/workdir.py',  # which writes it down
  *(
    f'nfnets_jax/training/{name}.py'
    for name in (
      'build',
      'check',
      'config',
      'estimates',
      'eval_state',
      'evaluate',
      'init_from',
      'programs',
      'recorded',
      'train',
    )
  ),
}


def _name(path):
  return path.relative_to(ROOT).as_posix()


@functools.cache
def _tree(path):
  return ast.parse(path.read_text(), _name(path))


def _imports(path):
  """Full names of all that is imported, anywhere in the file."""
  package = path.relative_to(ROOT).parent.parts
  names = set()
  for node in ast.walk(_tree(path)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) - node.level + 1] if node.level else ()
      module = '.'.join((*base, *filter(None, [node.module])))
      names |= {f'{module}.{alias.name}' for alias in node.names}
  return names


def _identifiers(path):
  """Names and attributes that the code uses; no strings, no comments."""
  names = set()
  for node in ast.walk(_tree(path)):
    if isinstance(node, ast.Name):
      names.add(node.id)
    elif isinstance(node, ast.Attribute):
      names.add(node.attr)
    elif isinstance(node, ast.alias):
      names |= set(node.name.split('.'))
  return names


def test_there_is_something_to_look_at():
  assert {_name(path) for path in FILES} >= {
    'nfnets_jax/agc/clip.py',
    'nfnets_jax/data/prepare/build.py',
    'nfnets_jax/runtime/parallel.py',
  }
  assert 'nfnets_jax.agc' in _imports(ROOT / 'nfnets_jax/training/optimizer.py')
  assert 'pmap' in _identifiers(ROOT / 'nfnets_jax/runtime/parallel.py')


def test_tests_mirror_the_tree():
  """`x/y.py` is tested by `tests/x/y_test.py`."""
  tests = ROOT / 'tests'
  paths = [path.relative_to(tests) for path in tests.rglob('*_test.py')]
  alone = set()
  for path in paths:
    source = path.with_name(path.name.removesuffix('_test.py'))
    found = [ROOT / 'nfnets_jax' / source, ROOT / source]
    if not any(x.is_dir() or x.with_suffix('.py').exists() for x in found):
      alone.add(path.as_posix())
  assert alone == SUBJECTS


@pytest.mark.parametrize('path', FILES, ids=_name)
def test_imports_only_the_floors_below(path):
  part = path.relative_to(ROOT / 'nfnets_jax').parts[0].removesuffix('.py')
  allowed = ALLOWED.get(part, PARTS) | {part}
  inside = [x.split('.') for x in _imports(path) if x.startswith('nfnets_jax')]
  used = {x[1] for x in inside if len(x) > 1}
  assert used & PARTS <= allowed
  # The commands on top are imported by nobody.
  if part in PARTS:
    assert used <= PARTS


@pytest.mark.parametrize('path', FILES, ids=_name)
def test_foreign_imports(path):
  packages = {name.split('.')[0] for name in _imports(path)}
  assert not packages & {'experiments', 'tests', 'jaxline', 'tensorflow'}


@pytest.mark.parametrize('path', FILES, ids=_name)
def test_only_parallel_knows_pmap(path):
  if _name(path) != 'nfnets_jax/runtime/parallel.py':
    assert 'pmap' not in _identifiers(path)


@pytest.mark.parametrize('path', FILES, ids=_name)
def test_no_hidden_context(path):
  assert 'contextvars' not in _imports(path)
  assert 'ContextVar' not in _identifiers(path)


@pytest.mark.parametrize('path', FILES, ids=_name)
def test_config_stops_at_the_door(path):
  """Steps, optimizers, data and models take plain arguments."""
  room = path.relative_to(ROOT / 'nfnets_jax').parts[0]
  if room in ROOMS and _name(path) not in DOORS:
    # In `data` and `weights` a config may be that of TFDS or of timm.
    foreign = {'config'} if room in ('data', 'weights') else set()
    assert not {'config', 'config_dict'} & (_identifiers(path) - foreign)


@pytest.mark.parametrize('path', FILES, ids=_name)
def test_what_is_gone_from_the_field_is_not_mentioned(path):
  text = path.read_text()
  for gone in ('jax.tree_map', 'device_put_replicated', 'jaxline'):
    assert gone not in text


@pytest.mark.parametrize(
  ('module', 'absent'),
  [
    # Help and mistyped flags respond at once, and workers import no training.
    ('main', {'jax', 'haiku', 'orbax.checkpoint', 'grain'}),
    ('predict', {'orbax.checkpoint', 'matplotlib', 'tensorboardX'}),
    ('training.config', {'jax', 'haiku', 'grain', 'tensorflow_datasets'}),
  ],
)
def test_what_an_import_loads(module, absent):
  code = f'import sys, nfnets_jax.{module}; print(*sys.modules)'
  printed = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  loaded = set(printed.split())
  assert 'nfnets_jax' in loaded
  assert not loaded & absent
