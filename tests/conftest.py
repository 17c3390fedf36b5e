"""Strict settings for all tests, made before jax starts a backend."""

import gc
import importlib.metadata
import os
import pathlib

# Eight virtual devices catch what one device hides: a missing pmean, a batch
# split wrongly, replicas that differ.
# The tests compile far more than they compute, and level 0 compiles ten times
# as fast. The old emitters of jaxlib 0.10 compile three times as fast as the
# new ones; later versions reject the flag.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',
    '--xla_cpu_parallel_codegen_split_count=1',
    '--xla_cpu_use_fusion_emitters=false'
    if importlib.metadata.version('jaxlib').startswith('0.10.')
    else '',
  ]
)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import pytest

from tests.buckets import _server as _server
from tests.buckets import bucket as bucket

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')

# Tracing creates many objects, and each collection visits all that jax holds: a
# fifth of the time with Python's thresholds.
gc.freeze()
gc.set_threshold(100_000, 20, 100)

GOLDEN = pathlib.Path(__file__).parent / 'golden'


@pytest.fixture(scope='session')
def golden() -> pathlib.Path:
  """The folder with the small golden files."""
  return GOLDEN


@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory) -> pathlib.Path:
  """A data_dir in which `digits` is prepared, to read from."""
  from nfnets_jax.data import prepare

  path = tmp_path_factory.mktemp('data')
  prepare.prepare('digits', path)
  return path


@pytest.fixture(scope='session')
def shared() -> pathlib.Path:
  """The folder of sample data that may be beside a checkout."""
  path = pathlib.Path(__file__).parents[2] / 'shared'
  if not path.is_dir():
    pytest.skip(f'no folder {path.name}/ with sample data beside the checkout')
  return path
