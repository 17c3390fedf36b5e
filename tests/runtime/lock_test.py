"""A folder has one writer, and a dead one does not hold it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import uuid

import fsspec
import pytest
from fsspec.implementations import local

from nfnets_jax.runtime import holder, lock

HOLDER = """
import sys, time
from nfnets_jax.runtime import lock
from tests.runtime import lock_test
with lock.hold(sys.argv[1], beat=0.2):
  print('held', flush=True)
  time.sleep(60)
"""

ELSEWHERE = {
  'owner': 'another',
  'host': 'elsewhere',
  'pid': 7,
  'since': 'noon',
  'kernel': 'other',
  'pids': '',
  'started': '3',
}


class Bucket(local.LocalFileSystem):
  """A bucket in a folder, `bucket:///folder`; its writes are atomic."""

  protocol = ('bucket',)

  def pipe_file(self, path, value, mode='overwrite', **kwargs):
    path = pathlib.Path(self._strip_protocol(path))
    partial = path.with_name(f'{path.name}-{uuid.uuid4().hex}')
    partial.write_bytes(value)
    if mode == 'create':
      try:
        path.hardlink_to(partial)
      finally:
        partial.unlink()
    else:
      partial.replace(path)


class CarelessBucket(Bucket):
  """A bucket that ignores that a file is only to be created."""

  protocol = ('careless',)

  def pipe_file(self, path, value, mode='overwrite', **kwargs):
    super().pipe_file(path, value, 'overwrite')


fsspec.register_implementation('bucket', Bucket, clobber=True)
fsspec.register_implementation('careless', CarelessBucket, clobber=True)


@pytest.fixture(params=['', 'bucket://'])
def folder(request, tmp_path):
  """A folder on a disk, and one in a bucket."""
  return f'{request.param}{tmp_path}'


def _holder(folder):
  """Another process that holds the lock on a folder."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLDER, str(folder)],
    stdout=subprocess.PIPE,
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
    text=True,
  )
  assert process.stdout.readline() == 'held\n'
  return process


def _pretend(tmp_path, **about):
  """Writes the lock of a process on a host that is not this one."""
  partial = tmp_path / 'partial'
  partial.write_text(json.dumps({**ELSEWHERE, **about}))
  partial.replace(tmp_path / lock.NAME)


def _record(tmp_path):
  return json.loads((tmp_path / lock.NAME).read_text())


def test_leaves_nothing_behind(tmp_path):
  folder = tmp_path / 'a' / 'run'
  with lock.hold(folder):
    assert [path.name for path in folder.iterdir()] == [lock.NAME]
  assert not folder.exists()
  with pytest.raises(KeyError), lock.hold(folder):
    raise KeyError
  assert not folder.exists()
  folder.mkdir()
  (folder / 'config.json').touch()
  for path in (folder, f'bucket://{folder}'):
    with lock.hold(path):
      assert (folder / lock.NAME).exists()
    assert [path.name for path in folder.iterdir()] == ['config.json']


def test_a_second_process_is_refused_by_name_and_may_follow(tmp_path, folder):
  process = _holder(folder)
  try:
    message = f'in use by process {process.pid} on .*since 20.*another folder'
    # The refused one leaves the lock as it was.
    for _ in range(2):
      with (
        pytest.raises(lock.InUseError, match=message),
        lock.hold(folder, beat=0.1),
      ):
        pytest.fail('two processes hold the lock')
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert _record(tmp_path)['pid'] == process.pid
    began = time.monotonic()
    with lock.hold(folder, beat=0.1):
      assert time.monotonic() < began + lock.LAPSE / 4
      assert _record(tmp_path)['pid'] == os.getpid()
  finally:
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_thread_is_refused(folder):
  caught = []

  def enter():
    try:
      with lock.hold(folder, beat=0.05):
        pass
    except lock.InUseError as error:
      caught.append(str(error))

  with lock.hold(folder, beat=0.02):
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
  assert len(caught) == 1
  assert f'process {os.getpid()}' in caught[0]


def test_two_folders_can_be_held(tmp_path):
  with lock.hold(tmp_path / 'a'), lock.hold(tmp_path / 'b'):
    pass


def test_the_lock_of_a_dead_host_lapses(tmp_path, folder, capsys):
  _pretend(tmp_path, beat=1.0)
  with lock.hold(folder, beat=0.02, lapse=0.1):
    assert _record(tmp_path)['pid'] == os.getpid()
  assert 'no heartbeat of process 7 on elsewhere' in capsys.readouterr().out


def test_one_of_several_takes_a_lapsed_lock(tmp_path, folder):
  _pretend(tmp_path, beat=1.0)
  held, refused = [], []
  end = threading.Event()

  def enter():
    try:
      with lock.hold(folder, beat=0.05, lapse=0.3) as mine:
        held.append(mine)
        assert end.wait(20)
        mine.check()
    except lock.InUseError:
      refused.append(None)
      if len(refused) == 3:
        end.set()

  threads = [threading.Thread(target=enter) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (len(held), len(refused)) == (1, 3)


def test_the_lock_of_a_living_host_is_respected(tmp_path, folder):
  _pretend(tmp_path, beat=1.0)
  timer = threading.Timer(0.1, lambda: _pretend(tmp_path, beat=2.0))
  timer.start()
  message = 'process 7 on elsewhere, since noon'
  with (
    pytest.raises(lock.InUseError, match=message),
    lock.hold(folder, beat=0.02, lapse=20.0),
  ):
    pytest.fail('two hosts hold the lock')
  timer.join()


def test_the_lock_that_another_host_releases_is_free(tmp_path, folder):
  _pretend(tmp_path, beat=1.0)
  timer = threading.Timer(0.1, (tmp_path / lock.NAME).unlink)
  timer.start()
  with lock.hold(folder, beat=0.02, lapse=20.0):
    assert _record(tmp_path)['pid'] == os.getpid()
  timer.join()


def test_a_process_that_has_the_id_of_a_dead_one_is_another(tmp_path):
  before = {**holder.this_process(), 'started': '1'}
  _pretend(tmp_path, **before)
  with lock.hold(f'bucket://{tmp_path}', beat=0.02, lapse=60.0):  # at once
    assert _record(tmp_path)['owner'] != before['owner']
  # The same numbers in another container tell nothing.
  _pretend(tmp_path, **{**before, 'pids': 'pid:[1]'})
  began = time.monotonic()
  with lock.hold(f'bucket://{tmp_path}', beat=0.02, lapse=0.2):
    assert time.monotonic() > began + 0.2


def test_a_lock_that_is_lost_is_found_out(tmp_path, folder):
  with lock.hold(folder, beat=0.02) as mine:
    mine.check()
    _pretend(tmp_path)
    time.sleep(0.1)  # some heartbeats
    with pytest.raises(lock.LostError, match='process 7 on elsewhere, since'):
      mine.check()
  assert _record(tmp_path) == ELSEWHERE
  (tmp_path / lock.NAME).unlink()
  with lock.hold(folder) as mine:
    (tmp_path / lock.NAME).unlink()
    with pytest.raises(lock.LostError, match='held by nobody'):
      mine.check()


def test_a_store_without_conditions_has_one_writer(tmp_path):
  folder = f'careless://{tmp_path}'
  with (
    lock.hold(folder, beat=0.02),
    pytest.raises(lock.InUseError),
    lock.hold(folder, beat=0.1),
  ):
    pytest.fail('two processes hold the lock')


@pytest.mark.parametrize(
  'content', [b'', b'\0' * 600, b'{', b'\xff', b'[1]', b'{"pid": 7}']
)
def test_corrupt_lock_has_no_holder(tmp_path, content):
  path = tmp_path / lock.NAME
  path.write_bytes(content)
  # Writes to a bucket are whole, so that this is no lock.
  with (
    pytest.raises(ValueError, match=r'/lock is not a lock; move it away'),
    lock.hold(f'bucket://{tmp_path}'),
  ):
    pytest.fail('the file was taken')
  assert path.read_bytes() == content
  with lock.hold(tmp_path):
    assert _record(tmp_path)['pid'] == os.getpid()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / 'file').touch()
  with (
    pytest.raises(OSError, match='cannot write to .*file/run: '),
    lock.hold(tmp_path / 'file' / 'run'),
  ):
    pytest.fail('a file holds a folder')


def test_the_heart_beats(tmp_path, folder):
  with lock.hold(folder, beat=0.01):
    beats = set()
    while len(beats) < 3:
      beats.add(_record(tmp_path)['beat'])
