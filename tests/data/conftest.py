"""The data set `digits`, prepared once for all the tests here."""

import pathlib

import pytest

from nfnets_jax.data import prepare


@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory) -> pathlib.Path:
  """A data_dir in which `digits` is prepared."""
  path = tmp_path_factory.mktemp('data')
  prepare.prepare('digits', path)
  return path
