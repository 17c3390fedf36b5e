"""Buckets on this machine: servers that speak Google's and Amazon's protocols.

The fixture `bucket` needs the packages of the extra 'dev'.
"""

import contextlib
import importlib.util
import pathlib
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
_GCS = pathlib.Path(__file__).with_name('gcs.py')


def _command(scheme, host, port):
  if scheme == 's3':
    return ['-m', 'moto.server', f'--host={host}', f'--port={port}']
  return [_GCS, host, str(port)]


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
def _process(scheme, host):
  """Yields a new server and its address."""
  with socket.create_server((host, 0)) as free:
    port = free.getsockname()[1]
  address = f'http://{host}:{port}'
  with subprocess.Popen(
    [sys.executable, *_command(scheme, host, port)],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  ) as process:
    try:
      deadline = time.monotonic() + 100
      while True:
        assert process.poll() is None and time.monotonic() < deadline
        with contextlib.suppress(OSError):
          urllib.request.urlopen(f'{address}/', timeout=10).close()
          break
        time.sleep(0.05)
      yield process, address
    finally:
      process.kill()


def _forget_clients(scheme):
  """Removes the clients, with the address of a server, that libraries keep."""
  import fsspec
  from etils.epath import backend

  backend.fsspec_backend._get_filesystem.cache_clear()
  fsspec.get_filesystem_class(scheme).clear_instance_cache()


@contextlib.contextmanager
def served(scheme, host='127.0.0.1'):
  """Serves an empty `<scheme>://bucket` to this process and its children.

  Args:
    scheme: 'gs' or 's3'.
    host: address of this machine that clients reach.

  Yields:
    The process that serves.
  """
  for package in _SERVERS[scheme]:
    if importlib.util.find_spec(package) is None:
      pytest.skip(f'{package} is not installed; it comes with the extra dev')
  with (
    _process(scheme, host) as (process, address),
    pytest.MonkeyPatch.context() as patch,
  ):
    for name, value in _environment(scheme, address).items():
      patch.setenv(name, value)
    _forget_clients(scheme)
    if scheme == 's3':
      paths.expand('s3://bucket/a')  # sets up fsspec
      import s3fs

      s3fs.S3FileSystem().mkdir('bucket')
    yield process
  _forget_clients(scheme)


@pytest.fixture(scope='session', params=['gs', 's3'])
def _server(request):
  with served(request.param):
    yield request.param


@pytest.fixture
def bucket(_server):
  """An empty folder in a bucket, of each kind."""
  return paths.expand(f'{_server}://bucket/{uuid.uuid4().hex}')
