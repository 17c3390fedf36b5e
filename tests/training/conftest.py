"""A small net on digits, and a compilation cache for all tests."""

from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import config_dict

from experiments import digits
from nfnets_jax.runtime import progress


@pytest.fixture(scope='package', autouse=True)
def compile_once(tmp_path_factory):
  """Compiles a step that several runs share once."""
  folder = str(tmp_path_factory.mktemp('compiled'))
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
  compilation_cache.reset_cache()  # it looked for a folder before there was one
  yield
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.reset_cache()


@pytest.fixture
def said(monkeypatch) -> list[str]:
  """What a test prints as progress."""
  lines: list[str] = []
  monkeypatch.setattr(progress, 'say', lines.append)
  return lines


@pytest.fixture(scope='session')
def make_config(digits_dir) -> Callable[..., config_dict.ConfigDict]:
  """Makes configs of short runs: `make_config(steps, {'field.name': value})`.

  An epoch is ten steps.
  """

  def make(steps: int = 1, changes: dict[str, Any] | None = None):
    config = digits.get_config()
    config.lock()
    config.model.width = (64,)
    config.model.depth = (1,)
    config.model.strides = (1,)
    config.model.group_width = (16,)
    config.model.stem_width = (32,)
    config.model.stem_strides = (2,)
    config.model.drop_rate = 0.0
    config.model.stochdepth_rate = 0.0
    config.epochs = steps / 10
    config.batch_size = 32
    config.data.data_dir = str(digits_dir)
    config.data.train_split = 'train[:320]'
    config.data.image_size = 8
    config.data.eval_image_size = 8
    config.data.crop = 'pad_1'
    config.data.num_workers = 1
    config.optimizer.warmup_epochs = 0.0
    # A test process goes on with other runs.
    config.compilation_cache = None
    config.update_from_flattened_dict(changes or {})
    return config

  return make
