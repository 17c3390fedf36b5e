"""Downloads from a server that does what servers do on bad days."""

import hashlib
import http.server
import threading

import numpy as np
import pytest

from nfnets_jax.weights import download

DATA = np.random.default_rng(0).bytes(3_000_000)


class Server(http.server.ThreadingHTTPServer):
  """Serves DATA; `plan` holds what goes wrong, request by request."""

  def __init__(self):
    super().__init__(('127.0.0.1', 0), Handler)
    self.data, self.etag, self.plan, self.ranges = DATA, '"one"', [], []
    self.released = threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *arguments):
    pass

  def do_GET(self):
    server = self.server
    trouble = server.plan.pop(0) if server.plan else None
    asked = self.headers.get('Range')
    server.ranges.append(asked)
    if isinstance(trouble, int):
      self.send_error(trouble)
      return
    start = 0
    if asked and self.headers.get('If-Range') == server.etag:
      start = int(asked.removeprefix('bytes=').removesuffix('-'))
    body = server.data[start:]
    self.send_response(206 if start else 200)
    self.send_header('Content-Length', str(len(body)))
    if server.etag:
      self.send_header('ETag', server.etag)
    self.end_headers()
    if trouble in ('truncate', 'stall'):
      self.wfile.write(body[: len(body) // 2])
      self.wfile.flush()
      if trouble == 'stall':
        server.released.wait(20)
    else:
      self.wfile.write(body)


@pytest.fixture
def server(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setattr(download.time, 'sleep', lambda seconds: None)
  server = Server()
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  yield server
  server.released.set()
  server.shutdown()
  server.server_close()


def fetch(server, **kwargs):
  address = f'http://127.0.0.1:{server.server_port}/F0_haiku.npz'
  return download.fetch('nfnet_f0', address=address, timeout=0.5, **kwargs)


def files(tmp_path):
  return sorted(x.name for x in (tmp_path / 'nfnets_jax').iterdir())


def test_downloads_once_and_shows_it(server, tmp_path, capsys):
  path = fetch(server)
  assert path == tmp_path / 'nfnets_jax/nfnet_f0.npz'
  assert path.read_bytes() == DATA
  assert '3.00M/3.00M' in capsys.readouterr().err
  assert files(tmp_path) == ['nfnet_f0.npz', 'nfnet_f0.sha256']
  digest = path.with_suffix('.sha256').read_text().strip()
  assert digest == hashlib.sha256(DATA).hexdigest()
  assert fetch(server) == path
  assert server.ranges == [None]


@pytest.mark.parametrize('trouble', ['truncate', 'stall'])
def test_goes_on_where_it_broke_off(server, tmp_path, trouble):
  server.plan = [trouble, 503, trouble]
  assert fetch(server).read_bytes() == DATA
  assert server.ranges == [
    None,
    'bytes=1500000-',
    'bytes=1500000-',
    'bytes=2250000-',
  ]
  assert files(tmp_path) == ['nfnet_f0.npz', 'nfnet_f0.sha256']


def test_goes_on_in_a_later_call(server, tmp_path):
  server.plan = ['truncate', 404]
  with pytest.raises(ConnectionError, match=r'404.*copy it to .*nfnet_f0.npz'):
    fetch(server)
  assert not (tmp_path / 'nfnets_jax/nfnet_f0.npz').exists()
  assert fetch(server).read_bytes() == DATA
  assert server.ranges[-1] == 'bytes=1500000-'


def test_begins_anew_if_the_file_has_changed(server):
  server.plan = ['truncate', 404]
  with pytest.raises(ConnectionError):
    fetch(server)
  server.data, server.etag = DATA[::-1], '"two"'
  assert fetch(server).read_bytes() == DATA[::-1]


@pytest.mark.parametrize('etag', [None, 'W/"weak"'])
def test_begins_anew_if_nobody_can_tell(server, etag):
  server.etag = etag
  server.plan = ['truncate']
  assert fetch(server).read_bytes() == DATA
  assert server.ranges == [None, None]


def test_gives_up(server):
  server.plan = [500] * 5
  with pytest.raises(ConnectionError, match='HTTP Error 500'):
    fetch(server)
  assert len(server.ranges) == 5


def test_corrupted_in_the_cache(server):
  path = fetch(server)
  path.write_bytes(DATA[:-1] + b'x')
  with pytest.raises(ValueError, match='changed or is corrupt.*remove it to'):
    fetch(server)
  path.unlink()
  assert fetch(server).read_bytes() == DATA
  path.unlink()
  server.data = DATA[:-1] + b'x'
  with pytest.raises(ValueError, match='has changed: .*to accept it'):
    fetch(server)
  assert not path.exists()


def test_copied_by_hand(server, tmp_path):
  path = tmp_path / 'nfnets_jax/nfnet_f0.npz'
  path.parent.mkdir()
  path.write_bytes(b'mine')
  assert fetch(server) == path
  assert server.ranges == []
  path.write_bytes(b'damaged')
  with pytest.raises(ValueError, match='changed or is corrupt'):
    fetch(server)


def test_offline(server):
  server.server_close()
  with pytest.raises(ConnectionError, match='Without network access, download'):
    fetch(server)


def test_unknown_name():
  with pytest.raises(ValueError, match="no released weights of 'resnet50'"):
    download.fetch('resnet50')


@pytest.mark.parametrize('value', ['', 'relative/path'])
def test_cache_without_a_usable_variable(monkeypatch, tmp_path, value):
  monkeypatch.setenv('XDG_CACHE_HOME', value)
  monkeypatch.setenv('HOME', str(tmp_path))
  assert download.cache_dir() == tmp_path / '.cache/nfnets_jax'


def test_cache_without_a_home(monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', '')
  monkeypatch.delenv('HOME', raising=False)
  monkeypatch.setattr('os.getuid', lambda: 2**31 - 7)  # of no account
  with pytest.raises(
    ValueError, match=r'\$XDG_CACHE_HOME=~/.cache: .*set HOME'
  ):
    download.cache_dir()


def test_cache_below_the_home(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', '~/scratch')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert download.cache_dir() == tmp_path / 'scratch/nfnets_jax'
  monkeypatch.setenv('XDG_CACHE_HOME', 'gs://bucket/cache')
  with pytest.raises(ValueError, match=r'\$XDG_CACHE_HOME=gs://bucket/cache'):
    download.cache_dir()


@pytest.mark.parametrize(
  'page',
  [b'<!doctype html><title>Log in</title>', b'<?xml version="1.0"?>', b'{}'],
)
def test_pages_are_not_kept(server, tmp_path, page):
  server.data = page
  with pytest.raises(ValueError, match='not weights, and was not kept: this'):
    fetch(server)
  assert files(tmp_path) == []
  server.data = DATA
  assert fetch(server).read_bytes() == DATA


def test_two_processes_download_once(server, tmp_path, capsys):
  server.plan = ['stall', 503]
  found = []
  threads = [
    threading.Thread(target=lambda: found.append(fetch(server)))
    for _ in range(3)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(20)
  assert found == [tmp_path / 'nfnets_jax/nfnet_f0.npz'] * 3
  assert found[0].read_bytes() == DATA
  assert server.ranges == [None, 'bytes=1500000-', 'bytes=1500000-']
  assert files(tmp_path) == ['nfnet_f0.npz', 'nfnet_f0.sha256']
  assert 'another process is downloading' in capsys.readouterr().out


@pytest.mark.parametrize('text', [b'', b'F0', b'\xff\xfe'])
def test_damaged_digest(server, text):
  path = fetch(server)
  digest = path.with_suffix('.sha256')
  digest.write_bytes(text)
  with pytest.raises(ValueError, match='instead of a sha256'):
    fetch(server)
  digest.unlink()
  assert fetch(server) == path
