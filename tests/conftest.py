"""Strict settings for every test, made before jax starts a backend."""

import gc
import importlib.metadata
import os
import pathlib

# Eight virtual devices show what one device hides: a forgotten pmean, a batch
# split wrongly, state that differs between replicas.
# The tests compile far more than they compute, and level 0 compiles ten times
# as fast. The old emitters of jaxlib 0.10 compile three times as fast as the
# new ones; later versions refuse the flag.
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

# Tracing makes many objects, and a collection looks at all that jax holds: a
# fifth of the time at Python's thresholds.
gc.freeze()
gc.set_threshold(100_000, 20, 100)

GOLDEN = pathlib.Path(__file__).parent / 'golden'


@pytest.fixture(scope='session')
def golden() -> pathlib.Path:
  """The folder with the small golden files."""
  return GOLDEN


@pytest.fixture(scope='session')
def shared() -> pathlib.Path:
  """The folder with photographs and CIFAR-10 that may lie beside a checkout."""
  path = pathlib.Path(__file__).parents[2] / 'shared'
  if not path.is_dir():
    pytest.skip(f'no folder {path.name}/ with sample data beside the checkout')
  return path
