"""The data set `digits`, prepared once, and photographs for the tests here."""

import pathlib
import tarfile

import pytest

from nfnets_jax.data import prepare


@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory) -> pathlib.Path:
  """A data_dir in which `digits` is prepared."""
  path = tmp_path_factory.mktemp('data')
  prepare.prepare('digits', path)
  return path


@pytest.fixture(scope='module')
def photographs(shared):
  path = shared / 'data' / 'imagenet-sample' / 'ILSVRC2012_img_val.tar'
  if not path.is_file():
    pytest.skip('no ImageNet photographs beside the checkout')
  with tarfile.open(path) as tar:
    return [tar.extractfile(member).read() for member in tar.getmembers()[:4]]


@pytest.fixture(scope='module')
def reference(shared):
  path = shared / 'reference' / 'golden'
  if not path.is_dir():
    pytest.skip('no large golden files beside the checkout')
  return path
