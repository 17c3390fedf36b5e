"""What a run writes, in buckets."""

import pytest
from ml_collections import config_dict
from PIL import Image

from nfnets_jax.runtime import checkpoint, files, logbook
from nfnets_jax.runtime import workdir as workdirs
from tests.runtime import checkpoint_test

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
