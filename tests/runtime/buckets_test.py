"""What a run writes, in buckets."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from ml_collections import config_dict
from PIL import Image

from nfnets_jax import paths
from nfnets_jax.runtime import checkpoint, files, lock, logbook
from nfnets_jax.runtime import workdir as workdirs
from tests import buckets
from tests.runtime import checkpoint_test, lock_test

pytestmark = [
  pytest.mark.thorough,
  # Orbax and the clients of buckets leave connections to the very end.
  pytest.mark.filterwarnings('ignore::ResourceWarning'),
]


def test_files(bucket, tmp_path):
  for folder in (bucket, tmp_path):
    path = folder / 'a.csv'
    files.append(path, b'1\n')
    files.append(path, b'2\n')
    assert path.read_bytes() == b'1\n2\n'
    with pytest.raises(FileExistsError, match='a.csv'):
      files.create(path, b'3\n')
    files.write(path, b'4\n')
    assert path.read_bytes() == b'4\n'
    files.create(folder / 'b.csv', b'5\n')
    assert sorted(x.name for x in folder.iterdir()) == ['a.csv', 'b.csv']


def test_a_file_that_is_replaced_is_read(bucket):
  versions = [bytes([i]) * (i + 1) for i in range(40)]
  files.write(bucket / 'log', versions[0])

  def replace():
    for version in versions[1:]:
      files.write(bucket / 'log', version)

  writer = threading.Thread(target=replace)
  writer.start()
  found = []
  while writer.is_alive():
    found.append(files.read(bucket / 'log'))
  writer.join()
  assert set(found) <= set(versions)
  assert len(set(found)) > 1


def test_records_of_a_run(bucket):
  config = config_dict.ConfigDict({'seed': 0, 'data': {'name': 'digits'}})
  assert workdirs.read_config(bucket) is None
  assert workdirs.check(bucket, config, False)
  workdirs.record(bucket, config)
  assert workdirs.read_config(bucket) == config.to_dict()
  assert workdirs.read_report(bucket) is None
  workdirs.write_json(bucket / 'report.json', {'steps': 4})
  assert workdirs.read_report(bucket) == {'steps': 4}
  assert workdirs.check(bucket, config, False)
  config.seed = 1
  with pytest.raises(ValueError, match=f'{bucket} holds a run of another'):
    workdirs.check(bucket, config, False)
  workdirs.record(bucket, config)  # removes the report
  assert workdirs.read_report(bucket) is None


def test_logs(bucket):
  writer = logbook.Writer(bucket, 0)
  gone = bucket.parent / f'{bucket.name}-killed'  # what it writes at its end
  for step in (1, 2, 3):
    writer.write(step, 'train', {'loss': 1.0 / step})
    if step == 2:
      writer.flush()  # as before a checkpoint
  assert [x['step'] for x in logbook.read(bucket)] == [1, 2]
  writer._workdir = gone  # killed here
  writer.__exit__()
  assert [x['step'] for x in logbook.read(gone)] == [1, 2, 3]
  with logbook.Writer(bucket, 2) as writer:
    writer.write(3, 'train', {'loss': 0.5})
    writer.write(4, 'train', {'loss': 0.25})
  assert [x['step'] for x in logbook.read(bucket)] == [1, 2, 3, 4]
  events = list((bucket / 'tensorboard').iterdir())
  assert len(events) == 2
  assert all(b'train/loss' in x.read_bytes() for x in events)
  logbook.plot_curves(bucket)
  with (bucket / 'curves.png').open('rb') as file, Image.open(file) as image:
    assert image.format == 'PNG'


def _names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_checkpoints(bucket, capsys):
  assert not checkpoint.steps(bucket)
  checkpoint_test._save(bucket, [3, 5, 7], keep=2)
  assert _names(bucket) == ['5', '7']
  assert checkpoint.steps(bucket)
  state, loader_state = checkpoint_test._restore(
    bucket, checkpoint_test._state(seed=1)
  )
  checkpoint_test._assert_identical(state, checkpoint_test._state(7))
  assert loader_state == {'next_index': 70}

  # A killed run was writing 9, and 7 is corrupt.
  (bucket / '9' / 'state' / 'd').mkdir(parents=True, exist_ok=True)
  (bucket / '9' / 'state' / '_METADATA').write_bytes(b'{}')
  checkpoint_test._change_position(bucket / '7')
  checkpoints = checkpoint.Checkpointer(bucket, keep=2)
  assert checkpoints.latest_step == 7
  assert checkpoints.shape_of('gain') == ()
  state, _ = checkpoints.restore(checkpoint_test._state(seed=1))
  checkpoint_test._assert_identical(state, checkpoint_test._state(5))
  assert 'skipped a corrupt checkpoint' in capsys.readouterr().out
  checkpoints.save(9, checkpoint_test._state(9), {'next_index': 90})
  checkpoints.close()
  assert _names(bucket) == ['5', '7.corrupt', '9']
  state, _ = checkpoint_test._restore(bucket, checkpoint_test._state(seed=1))
  checkpoint_test._assert_identical(state, checkpoint_test._state(9))


def test_a_bucket_that_is_gone_is_named(monkeypatch):
  monkeypatch.setenv('AWS_MAX_ATTEMPTS', '1')
  with buckets.served('s3') as server:
    folder = paths.expand('s3://bucket/run')
    checkpoints = checkpoint.Checkpointer(folder, keep=2)
    checkpoints.save(1, checkpoint_test._state(1), {'next_index': 10})
    checkpoints.wait()
    server.kill()
    checkpoints.save(2, checkpoint_test._state(2), {'next_index': 20})
    with pytest.raises(OSError, match='step 2 into s3://bucket/run') as caught:
      checkpoints.wait()
    assert 'Earlier checkpoints cannot be read now: ' in str(caught.value)
    checkpoints.close()


_HOLDER = """
import sys
from nfnets_jax import paths
from nfnets_jax.runtime import lock
try:
  with lock.hold(paths.expand(sys.argv[1]), beat=2.0, lapse=4.0) as held:
    print('held', flush=True)
    sys.stdin.read()
    held.check()
except lock.InUseError as error:
  print('refused:', error)
"""


@contextlib.contextmanager
def _holders(folder, count):
  """Processes that start at once; each wants the lock until its input ends."""
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', _HOLDER, str(folder)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
      text=True,
    )
    for _ in range(count)
  ]
  try:
    yield processes
  finally:
    for process in processes:
      process.kill()
      process.communicate()


def _pretend(folder, beat):
  """Writes the lock of a process on another host."""
  record = json.dumps({**lock_test.ELSEWHERE, 'beat': beat})
  (folder / lock.NAME).write_text(record)


def test_lock(bucket, capsys):
  # A copy is refused; once the first is dead, it is not.
  with _holders(bucket, 1) as (process,):
    assert process.stdout.readline() == 'held\n'
    message = f'{bucket} is in use by process {process.pid} on '
    with (
      pytest.raises(lock.InUseError, match=message),
      lock.hold(bucket, beat=0.2),
    ):
      pytest.fail('two processes hold the lock')
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock.hold(bucket, beat=0.2) as mine:
      mine.check()
  assert not (bucket / lock.NAME).exists()

  # That of another host is respected as long as its heart beats.
  _pretend(bucket, 1.0)
  timer = threading.Timer(0.5, lambda: _pretend(bucket, 2.0))
  timer.start()
  with (
    pytest.raises(lock.InUseError, match='process 7 on elsewhere, since noon'),
    lock.hold(bucket, beat=0.2, lapse=20.0),
  ):
    pytest.fail('two hosts hold the lock')
  timer.join()
  with lock.hold(bucket, beat=0.2, lapse=0.5) as mine:
    assert 'no heartbeat of process 7 on elsewhere' in capsys.readouterr().out
    mine.check()

  # A holder that was silent for too long finds out.
  with lock.hold(bucket, beat=60.0) as mine:
    _pretend(bucket, 3.0)
    with pytest.raises(lock.LostError, match='process 7 on elsewhere'):
      mine.check()
  assert (bucket / lock.NAME).exists()


@pytest.mark.parametrize('lapsed', [False, True])
def test_one_of_several_processes_takes_the_lock(bucket, lapsed):
  if lapsed:
    _pretend(bucket, 1.0)
  with _holders(bucket, 3) as processes:
    deadline = time.monotonic() + 300
    while len([x for x in processes if x.poll() is None]) > 1:
      assert time.monotonic() < deadline
      time.sleep(0.1)
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3
  held = [text for text in printed if 'held\n' in text]
  refused = [text for text in printed if 'refused: ' in text]
  assert (len(held), len(refused)) == (1, 2), printed
  assert not (bucket / lock.NAME).exists()
