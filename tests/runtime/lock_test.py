"""A folder has one writer, and a dead one does not hold it."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from nfnets_jax.runtime import lock

HOLDER = """
import pathlib, sys, time
from nfnets_jax.runtime import lock
with lock.hold(pathlib.Path(sys.argv[1])):
  print('held', flush=True)
  time.sleep(60)
"""


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


def _pretend(folder, **about):
  """Writes the lock of a process on a host that is not this one."""
  fields = {'host': 'elsewhere', 'pid': 7, 'since': 'noon', 'kernel': 'other'}
  folder.mkdir(exist_ok=True)
  (folder / lock.NAME).write_text(json.dumps({**fields, **about}))


def test_leaves_nothing_behind(tmp_path):
  folder = tmp_path / 'a' / 'run'
  with lock.hold(folder):
    assert [path.name for path in folder.iterdir()] == [lock.NAME]
  assert not folder.exists()
  folder.mkdir()
  (folder / 'config.json').touch()
  with lock.hold(folder):
    pass
  assert [path.name for path in folder.iterdir()] == ['config.json']


def test_a_second_process_is_refused_by_name_and_may_follow(tmp_path):
  process = _holder(tmp_path)
  try:
    message = f'in use by process {process.pid} on .*since 20.*another folder'
    with pytest.raises(lock.InUseError, match=message), lock.hold(tmp_path):
      pytest.fail('two processes hold the lock')
    # The refused one has left the lock as it was.
    with pytest.raises(lock.InUseError, match=message), lock.hold(tmp_path):
      pytest.fail('two processes hold the lock')
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / lock.NAME).exists()
    with lock.hold(tmp_path):  # at once
      about = json.loads((tmp_path / lock.NAME).read_text())
      assert about['pid'] == os.getpid()
  finally:
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_thread_is_refused(tmp_path):
  caught = []

  def enter():
    try:
      with lock.hold(tmp_path):
        pass
    except lock.InUseError as error:
      caught.append(str(error))

  with lock.hold(tmp_path):
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
  assert len(caught) == 1
  assert f'process {os.getpid()}' in caught[0]


def test_two_folders_can_be_held(tmp_path):
  with lock.hold(tmp_path / 'a'), lock.hold(tmp_path / 'b'):
    pass


def test_the_lock_of_a_dead_host_lapses(tmp_path, capsys):
  _pretend(tmp_path, beat=1.0)
  with lock.hold(tmp_path, beat=0.02, lapse=0.1):
    about = json.loads((tmp_path / lock.NAME).read_text())
    assert about['pid'] == os.getpid()
  assert 'no heartbeat of process 7 on elsewhere' in capsys.readouterr().out


def test_the_lock_of_a_living_host_is_respected(tmp_path):
  _pretend(tmp_path, beat=1.0)
  timer = threading.Timer(0.1, lambda: _pretend(tmp_path, beat=2.0))
  timer.start()
  message = 'process 7 on elsewhere, since noon'
  with (
    pytest.raises(lock.InUseError, match=message),
    lock.hold(tmp_path, beat=0.02, lapse=20.0),
  ):
    pytest.fail('two hosts hold the lock')
  timer.join()


def test_the_lock_that_another_host_releases_is_free(tmp_path):
  _pretend(tmp_path, beat=1.0)
  timer = threading.Timer(0.1, (tmp_path / lock.NAME).unlink)
  timer.start()
  with lock.hold(tmp_path, beat=0.02, lapse=20.0):
    about = json.loads((tmp_path / lock.NAME).read_text())
    assert about['pid'] == os.getpid()
  timer.join()


@pytest.mark.parametrize(
  'content', [b'', b'\0' * 600, b'{', b'\xff', b'[1]', b'{"pid": 7}']
)
def test_corrupt_lock_has_no_holder(tmp_path, content):
  (tmp_path / lock.NAME).write_bytes(content)
  with lock.hold(tmp_path):
    about = json.loads((tmp_path / lock.NAME).read_text())
    assert about['pid'] == os.getpid()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / 'file').touch()
  with (
    pytest.raises(OSError, match='cannot write to .*file/run: '),
    lock.hold(tmp_path / 'file' / 'run'),
  ):
    pytest.fail('a file holds a folder')


def test_the_heart_beats(tmp_path):
  path = tmp_path / lock.NAME
  with lock.hold(tmp_path, beat=0.01):
    beats = set()
    while len(beats) < 3:
      beats.add(json.loads(path.read_text())['beat'])
