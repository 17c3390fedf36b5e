"""Buckets on this machine: servers that speak Google's and Amazon's protocols.

The fixture `bucket` needs the packages of the extra 'dev'.
"""

import contextlib
import importlib.util
import socket
import subprocess
import sys
import time
import urllib.request
import uuid

import pytest

from nfnets_jax import paths

_SERVERS = {
  'gs': ('gcsfs', 'gcp_storage_emulator'),
  's3': ('s3fs', 'moto'),
}


def _command(scheme, port):
  if scheme == 's3':
    return ['moto.server', f'--port={port}']
  options = ['--host=127.0.0.1', f'--port={port}', '--in-memory']
  return ['gcp_storage_emulator', 'start', *options, '--default-bucket=bucket']


def _environment(scheme, address):
  """What points the libraries of a scheme to a server."""
  if scheme == 's3':
    return {
      'AWS_ENDPOINT_URL': address,
      'AWS_ACCESS_KEY_ID': 'test',
      'AWS_SECRET_ACCESS_KEY': 'test',
      'AWS_DEFAULT_REGION': 'us-east-1',
    }
  return {
    'STORAGE_EMULATOR_HOST': address,  # of gcsfs
    'TENSORSTORE_GCS_HTTP_URL': address,
    'FSSPEC_GCS_TOKEN': 'anon',
    'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'test',  # of tensorstore
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',  # which needs an account
  }


@contextlib.contextmanager
def _serving(scheme):
  with socket.create_server(('127.0.0.1', 0)) as free:
    port = free.getsockname()[1]
  address = f'http://127.0.0.1:{port}'
  with subprocess.Popen(
    [sys.executable, '-m', *_command(scheme, port)],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  ) as process:
    try:
      deadline = time.monotonic() + 100
      while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
          urllib.request.urlopen(f'{address}/', timeout=10).close()
          break
        time.sleep(0.05)
      yield address
    finally:
      process.kill()


@pytest.fixture(scope='session', params=['gs', 's3'])
def _server(request):
  scheme = request.param
  for package in _SERVERS[scheme]:
    if importlib.util.find_spec(package) is None:
      pytest.skip(f'{package} is not installed; it comes with the extra dev')
  with _serving(scheme) as address, pytest.MonkeyPatch.context() as patch:
    for name, value in _environment(scheme, address).items():
      patch.setenv(name, value)
    if scheme == 's3':
      paths.expand('s3://bucket/a')  # sets up fsspec
      import s3fs

      s3fs.S3FileSystem().mkdir('bucket')
    yield scheme


@pytest.fixture
def bucket(_server):
  """An empty folder in a bucket, of each kind."""
  return paths.expand(f'{_server}://bucket/{uuid.uuid4().hex}')
