"""Weights on the hub, from a local server that speaks its protocol."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import safetensors.numpy

from nfnets_jax import extras, weights
from nfnets_jax.weights import hub, table
from tests import golden as reference

COMMIT = 40 * 'a'


class Handler(http.server.BaseHTTPRequestHandler):
  """Serves `server.files`, `{repository: {name: bytes}}`, at one commit."""

  def log_message(self, *arguments):
    pass

  def do_HEAD(self):
    self.answer()

  def do_GET(self):
    self.wfile.write(self.answer())

  def answer(self):
    repository, _, rest = self.path.strip('/').partition('/resolve/')
    revision, _, name = rest.partition('/')
    files = self.server.files.get(repository)
    error = None
    if files is None:
      error = 'RepoNotFound'
    elif revision not in ('main', 'v1', COMMIT):
      error = 'RevisionNotFound'
    elif name not in files:
      error = 'EntryNotFound'
    data = b'' if error else files[name]
    self.send_response(404 if error else 200)
    self.send_header('Content-Length', str(len(data)))
    self.send_header('X-Repo-Commit', COMMIT)
    if error:
      self.send_header('X-Error-Code', error)
    else:
      self.send_header('ETag', f'"{hashlib.sha1(data).hexdigest()}"')
    self.end_headers()
    return data


@contextlib.contextmanager
def serving(files):
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.files = files
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f'http://127.0.0.1:{server.server_port}'
  server.shutdown()
  server.server_close()


def tiny(**facts):
  params, _ = table.shapes('nfnet_tiny', 3, {})
  net = weights.Weights('nfnet_tiny', reference.fill_tree(params))
  return dataclasses.replace(net, **facts)


def config(**changes):
  pretrained = {
    'input_size': [3, 192, 192],
    'test_input_size': [3, 256, 256],
    'crop_pct': 0.9,
    'mean': [0.485, 0.456, 0.406],
    'std': [0.229, 0.224, 0.225],
  }
  return {
    'architecture': 'dm_nfnet_f0',
    'label_names': ['cat', 'hot air', 'dog'],
    'pretrained_cfg': pretrained | changes,
  }


@pytest.mark.parametrize(
  ('changes', 'crop', 'size'),
  [
    ({}, 'crop_resize_0.9', 256),
    ({'crop_mode': 'squash', 'crop_pct': 0.875}, 'resize_crop_0.875', 256),
    ({'crop_mode': 'squash', 'crop_pct': 1}, 'resize', 256),
    ({'crop_mode': 'border', 'test_input_size': None}, None, 192),
  ],
)
def test_config_of_timm(tmp_path, changes, crop, size):
  path = tmp_path / 'model.safetensors'
  (tmp_path / 'config.json').write_text(json.dumps(config(**changes)))
  weights.write(path, tiny(), 'timm')
  # As timm writes it, without our metadata.
  tensors = safetensors.numpy.load_file(path)
  path.unlink()
  safetensors.numpy.save_file(tensors, path, {'format': 'pt'})
  found = weights.read(path)
  assert (found.image_size, found.crop) == (size, crop)
  assert found.class_names == ('cat', 'hot air', 'dog')


def test_config_without_settings(tmp_path):
  text = json.dumps({**config(), 'pretrained_cfg': None})
  (tmp_path / 'config.json').write_text(text)
  found = hub.read_config(tmp_path / 'model.safetensors')
  assert 'image_size' not in found


def test_other_normalisation_is_refused(tmp_path):
  text = json.dumps(config(mean=[0.5] * 3, std=[0.5] * 3))
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(ValueError, match=r'config.json: .*mean \(0.5, 0.5, 0.5'):
    hub.read_config(tmp_path / 'model.safetensors')


@pytest.mark.parametrize(
  'source', ['hf-hub:', 'hf-hub:f0', 'hf-hub:a/b@', 'hf-hub:a/b c']
)
def test_sources_without_a_repository(source):
  with pytest.raises(ValueError, match='SRC=.* does not name a repository'):
    weights.locate(source, option='SRC')


def test_missing_package_names_extra_and_repository(monkeypatch):
  monkeypatch.setattr(extras, '_is_installed', lambda package: False)
  for take in (weights.locate, weights.fetch):
    with pytest.raises(
      ModuleNotFoundError, match=r'hf-hub:me/net: .*nfnets_jax\[hub\]'
    ):
      take('hf-hub:me/net@v1')


CODE = """
import sys
from nfnets_jax import weights
for source in sys.argv[1:]:
  try:
    found = weights.read(weights.fetch(source))
    w = found.params['NFNet/~/linear']['w']
    print(found.name, found.image_size, found.class_names, w[0, 0])
  except (ValueError, OSError) as error:
    print(type(error).__name__, error)
"""


@pytest.mark.thorough
def test_downloads_and_cache(tmp_path):
  pytest.importorskip('huggingface_hub', reason='needs the extra hub')
  path = tmp_path / 'model.safetensors'
  net = tiny(image_size=24, class_names=('cat', 'hot air', 'dog'))
  weights.write(path, net, 'timm')
  data = path.read_bytes()
  files = {
    'me/net': {'model.safetensors': data, 'config.json': b'{}'},
    'me/bare': {'model.safetensors': data},
    'me/empty': {'config.json': b'{}'},
  }
  names = ['me/net', 'me/net@v1', f'me/net@{COMMIT}', 'me/bare']
  names += ['me/net@v2', 'me/gone', 'me/empty']

  def run(endpoint, offline):
    env = os.environ | {
      'HF_ENDPOINT': endpoint,
      'HF_HOME': str(tmp_path / 'cache'),
      'HF_HUB_OFFLINE': offline,
      'HF_HUB_DISABLE_PROGRESS_BARS': '1',
      'no_proxy': '127.0.0.1',
    }
    argv = [sys.executable, '-c', CODE, *(f'hf-hub:{name}' for name in names)]
    done = subprocess.run(
      argv, env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()

  first = np.float32(net.params['NFNet/~/linear']['w'][0, 0])
  expected = f"nfnet_tiny 24 ('cat', 'hot air', 'dog') {first!s}"
  with serving(files) as endpoint:
    *good, revision, gone, empty = run(endpoint, '0')
  assert good == [expected] * 4
  assert "me/net@v2: the repository has no revision 'v2'" in revision
  assert f'me/gone: there is no such repository at {endpoint}' in gone
  assert 'me/empty: the repository has no model.safetensors' in empty
  # Without a network: by flag, and with a server that does not answer.
  for offline in ('1', '0'):
    *good, revision, gone, _ = run(endpoint, offline)
    assert good == [expected] * 4
    for line in (revision, gone):
      assert line.startswith('ConnectionError hf-hub:me/')
      assert 'is not in the cache' in line
