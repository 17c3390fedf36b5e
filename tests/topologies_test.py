"""Names of devices that are not here, and their compilers where installed."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from nfnets_jax import devices, topologies

ROOT = pathlib.Path(__file__).parents[1]


def test_local_devices():
  found = topologies.get('local')
  assert found.devices == jax.devices()
  assert (found.platform, found.kind) == ('cpu', None)
  assert found.memory == devices.memory()


@pytest.mark.parametrize(
  'name',
  [
    '',
    'mars',
    'v3',
    'v3:',
    'v3:4',
    'v3:4x',
    'v9:2x2',
    'v3:2x2x2',
    'v4:2x2',
    'h100x0',
    'V3:4x4',
    'gpu',
  ],
)
def test_unknown_names_are_told_what_there_is(name):
  with pytest.raises(ValueError) as error:
    topologies.get(name)
  assert f'there is no topology {name!r}; give local, h100' in str(error.value)
  for kind in topologies.KINDS.values():
    assert kind.example in str(error.value)


@pytest.mark.parametrize(
  ('name', 'module'), [('v3:2x2', 'libtpu'), ('h100', 'jax_cuda13_plugin')]
)
def test_compiler_that_is_not_installed(name, module, monkeypatch):
  find = importlib.util.find_spec
  hidden = ('libtpu', 'jax_cuda13_plugin', 'jax_cuda12_plugin')
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda x: None if x in hidden else find(x)
  )
  with pytest.raises(ModuleNotFoundError, match=f'make compile .*={name}') as e:
    topologies.get(name)
  assert e.value.name == module


@pytest.mark.parametrize('kind', topologies.KINDS)
def test_kinds_are_possible(kind):
  found = topologies.KINDS[kind]
  assert 8 * 2**30 <= found.memory <= 100 * 2**30
  assert 0 < found.allocated <= 1
  assert found.exact_flops < found.float32_flops <= found.flops
  # Operations for each byte, at peak: of the order of a hundred.
  assert 50 < found.flops / found.bandwidth < 600


# In a process of its own, for jax must not have started.
_COMPILE = """
import sys
import jax, jax.numpy as jnp
from nfnets_jax import hlo, topologies
from nfnets_jax.runtime import parallel
topology = topologies.get(sys.argv[1])
count = len(topology.devices)
mean = lambda x: jax.lax.pmean(jnp.sum(x), 'devices')
step = lambda state, batch: (state + 1, mean(batch))
lowered = parallel.lower_train_step(
  step, jax.ShapeDtypeStruct((4,), 'float32'),
  jax.ShapeDtypeStruct((count, 8), 'float32'), devices=topology.devices)
compiled = lowered.compile(compiler_options=topology.options)
opcodes = [x.opcode for x in hlo.read(compiled.as_text()).collectives]
print(count, jax.default_backend(), *opcodes)
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
  ('name', 'module', 'expected'),
  [
    ('v3:2x2', 'libtpu', '8 cpu all-reduce'),
    ('v4:2x2x1', 'libtpu', '4 cpu all-reduce'),
    ('v5e:1x1', 'libtpu', '1 cpu'),
    ('h100x8', 'jax_cuda13_plugin', '8 cpu all-reduce'),
    ('h100', 'jax_cuda13_plugin', '1 cpu'),
  ],
)
def test_compiles_for_devices_that_are_not_here(name, module, expected):
  if importlib.util.find_spec(module) is None:
    pytest.skip(f'{module} is not installed; make compile TOPOLOGY={name}')
  done = subprocess.run(
    [sys.executable, '-c', _COMPILE, name],
    cwd=ROOT,
    env={**os.environ, 'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.stdout.strip() == expected, done.stderr


@pytest.mark.thorough
def test_slice_that_does_not_exist():
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed; make compile TOPOLOGY=v3:4x4')
  done = subprocess.run(
    [sys.executable, '-c', _COMPILE, 'v3:3x5'],
    cwd=ROOT,
    env={**os.environ, 'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 1
  assert "ValueError: there is no topology 'v3:3x5'; give" in done.stderr
