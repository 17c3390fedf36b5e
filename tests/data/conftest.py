"""Photographs and golden files that may be beside a checkout."""

import tarfile

import pytest


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
