"""TFRecord copies are converted whole, or gone on with, and never touched.

What tensorflow would read is read here without it; `build_slow_test` has
tensorflow read.
"""

import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys

import pytest
from array_record.python import array_record_data_source
from tensorflow_datasets.core import file_adapters

from nfnets_jax.data import datasets
from nfnets_jax.data.prepare import __main__ as command
from nfnets_jax.data.prepare import tfrecord

NUM_SHARDS = {'train': 5, 'test': 2}


class Reader:
  """Reads a TFRecord file as tensorflow does, but for the checksums."""

  def __init__(self, path):
    self._path = pathlib.Path(path)

  def as_numpy_iterator(self):
    data = self._path.read_bytes()
    while data:
      (length,) = struct.unpack_from('<Q', data)
      if len(data) < 16 + length:
        raise RuntimeError('truncated record')
      yield data[12 : 12 + length]
      data = data[16 + length :]


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch):
  adapter = file_adapters.TfRecordFileAdapter
  monkeypatch.setattr(adapter, 'make_tf_data', Reader)


def records(paths):
  source = array_record_data_source.ArrayRecordDataSource(
    [str(path) for path in sorted(paths)]
  )
  return [source[i] for i in range(len(source))]


@pytest.fixture
def copy(digits_dir, tmp_path):
  """A data_dir with `digits` as TFRecord files."""
  source = digits_dir / 'digits' / '1.0.0'
  folder = tmp_path / 'copy' / 'digits' / '1.0.0'
  folder.mkdir(parents=True)
  info = json.loads((source / 'dataset_info.json').read_text())
  info['fileFormat'] = 'tfrecord'
  for split in info['splits']:
    examples = records(source.glob(f'digits-{split["name"]}.*'))
    num_shards = NUM_SHARDS[split['name']]
    shards = [examples[i::num_shards] for i in range(num_shards)]
    split['shardLengths'] = [str(len(shard)) for shard in shards]
    for i, shard in enumerate(shards):
      name = f'digits-{split["name"]}.tfrecord-{i:05d}-of-{num_shards:05d}'
      with (folder / name).open('wb') as file:
        for record in shard:
          file.write(struct.pack('<Q', len(record)) + bytes(4) + record)
          file.write(bytes(4))
  (folder / 'dataset_info.json').write_text(json.dumps(info))
  for path in source.iterdir():
    if path.suffix in ('.json', '.txt') and path.name != 'dataset_info.json':
      shutil.copy(path, folder)
  return tmp_path / 'copy'


def state(folder):
  return {
    path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes())
    for path in [folder, *folder.rglob('*')]
  }


def check_is_digits(data_dir, digits_dir):
  for split in 'train', 'test':
    mine = records((data_dir / 'digits' / '1.0.0').glob(f'digits-{split}.*'))
    other = records((digits_dir / 'digits' / '1.0.0').glob(f'digits-{split}.*'))
    num_shards = NUM_SHARDS[split]
    assert mine == [x for i in range(num_shards) for x in other[i::num_shards]]
    dataset = datasets.load('digits', split, data_dir)
    assert len(dataset) == len(other)
    assert dataset.source[0]['image'].startswith(b'\x89PNG')


@pytest.mark.parametrize('source', ['', 'digits/1.0.0'])
def test_converts_and_leaves_the_copy(source, copy, digits_dir, tmp_path):
  before = state(copy)
  builder = tfrecord.convert('digits', copy / source, tmp_path / 'new')
  assert pathlib.Path(builder.data_dir) == tmp_path / 'new' / 'digits' / '1.0.0'
  assert builder.info.splits['train'].num_examples == 1437
  check_is_digits(tmp_path / 'new', digits_dir)
  assert state(copy) == before
  names = {path.name for path in (tmp_path / 'new' / 'digits').iterdir()}
  assert names == {'1.0.0'}
  folder = tmp_path / 'new' / 'digits' / '1.0.0'
  ours, theirs = (
    {path.name.replace('array_record', 'tfrecord') for path in x.iterdir()}
    for x in (folder, copy / 'digits' / '1.0.0')
  )
  assert ours == theirs


def test_command_reports(copy, tmp_path, capsys):
  words = ['digits', f'--from_tfrecord={copy}', f'--data_dir={tmp_path}/new']
  command.main(words)
  folder = tmp_path / 'new' / 'digits' / '1.0.0'
  expected = f'digits: prepared in {folder}\n  train: 1,437 examples\n'
  output, progress = capsys.readouterr()
  assert output.startswith(expected)
  assert 'Converting digits: 100%' in progress and '1797/1797' in progress
  before = state(folder)
  command.main(words)
  assert f'{folder} exists already' in capsys.readouterr().out
  assert state(folder) == before


def killed():
  """Returns the number of a process that has ended."""
  with subprocess.Popen([sys.executable, '-c', '']) as process:
    pass
  return process.pid


@pytest.mark.parametrize('how', [KeyboardInterrupt, 'killed'])
def test_goes_on_where_it_was(how, copy, digits_dir, tmp_path, capsys):
  convert_shard = tfrecord._convert_shard
  done = []

  def interrupted(shard, adapter, progress):
    if len(done) < 2:
      convert_shard(shard, adapter, progress)
      done.append(shard.target)
    elif how == 'killed':  # what it leaves, as it cannot tidy up
      name = f'{shard.target.name}.partial.{killed()}'
      shard.target.with_name(name).write_bytes(b'half a file')
      raise SystemExit
    else:
      raise how

  words = ['digits', f'--from_tfrecord={copy}', f'--data_dir={tmp_path}/new']
  with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as info:
    patch.setattr(tfrecord, '_convert_shard', interrupted)
    command.main(words)
  if how is KeyboardInterrupt:
    assert info.value.code == 130
    assert 'finished files are kept' in capsys.readouterr().err
  with pytest.raises(FileNotFoundError, match='not prepared'):
    datasets.load('digits', 'train', tmp_path / 'new')
  done[1].write_bytes(done[1].read_bytes()[:-100])  # lost by the disk
  for path in done:
    os.utime(path, ns=(1, 1))  # clocks of files may be too coarse to tell
  command.main(words)
  # Its own folder is no leftover.
  assert 'rm -r' not in capsys.readouterr().out
  check_is_digits(tmp_path / 'new', digits_dir)
  folder = tmp_path / 'new' / 'digits' / '1.0.0'
  times = [(folder / path.name).stat().st_mtime_ns for path in done]
  assert [time == 1 for time in times] == [True, False]
  assert not list((tmp_path / 'new').rglob('*partial*'))


def test_files_of_a_run_that_goes_on_are_not_deleted(copy, tmp_path):
  write_info = tfrecord._write_info
  names = [f'x.partial.{number}' for number in (os.getppid(), killed())]

  def with_others(info, folder, work):
    write_info(info, folder, work)
    for name in [*names, 'x.partial.mine']:
      (work / name).write_bytes(b'half a file')

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tfrecord, '_write_info', with_others)
    tfrecord.convert('digits', copy, tmp_path / 'new')
  left = {path.name for path in (tmp_path / 'new').rglob('*.partial.*')}
  assert left == {names[0], 'x.partial.mine'}


@pytest.mark.parametrize('when', ['writes', 'has written'])
def test_run_that_another_overtakes_finds_it_done(
  when, copy, digits_dir, tmp_path, capsys
):
  convert_shard = tfrecord._convert_shard
  records_of = tfrecord._records

  def overtake():
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(tfrecord, '_convert_shard', convert_shard)
      patch.setattr(tfrecord, '_records', records_of)
      patch.setattr(os, 'getpid', os.getppid)
      tfrecord.convert('digits', copy, tmp_path / 'new')

  def overtaken_records(*args):
    for i, record in enumerate(records_of(*args)):
      if i == 3:
        overtake()
      yield record

  def overtaken_shard(*args):
    convert_shard(*args)
    overtake()

  with pytest.MonkeyPatch.context() as patch:
    if when == 'writes':
      patch.setattr(tfrecord, '_records', overtaken_records)
    else:
      patch.setattr(tfrecord, '_convert_shard', overtaken_shard)
    builder = tfrecord.convert('digits', copy, tmp_path / 'new')
  assert builder.is_prepared()
  folder = tmp_path / 'new' / 'digits' / '1.0.0'
  assert f'{folder} was finished by another' in capsys.readouterr().out
  check_is_digits(tmp_path / 'new', digits_dir)
  assert [path.name for path in folder.parent.iterdir()] == ['1.0.0']
  assert not list(folder.glob('*.partial.*'))


def test_another_copy_does_not_mix(copy, digits_dir, tmp_path, monkeypatch):
  work = tmp_path / 'new' / 'digits' / 'incomplete.00000000_1.0.0'
  work.mkdir(parents=True)
  wrong = work / 'digits-train.array_record-00000-of-00005'
  wrong.write_bytes(b'of another')
  tfrecord.convert('digits', copy, tmp_path / 'new')
  check_is_digits(tmp_path / 'new', digits_dir)
  assert wrong.read_bytes() == b'of another'


def refused(copy, data_dir, name='digits'):
  before = state(copy)
  with pytest.raises(SystemExit) as info:
    command.main([name, f'--from_tfrecord={copy}', f'--data_dir={data_dir}'])
  assert state(copy) == before
  assert str(info.value).startswith('error: ')
  return str(info.value)


def test_the_copy_itself_is_not_written_to(copy, tmp_path):
  link = tmp_path / 'link'
  link.symlink_to(copy)
  for data_dir in copy, link:
    message = refused(copy, data_dir)
    assert 'is the source itself; give another --data_dir' in message


def test_other_files_are_not_written_over(copy, tmp_path):
  folder = tmp_path / 'new' / 'digits' / '1.0.0'
  folder.mkdir(parents=True)
  (folder / 'mine.txt').write_text('mine')
  before = state(folder)
  message = refused(copy, tmp_path / 'new')
  assert f'{folder} exists already and is not a prepared data set' in message
  assert state(folder) == before


def test_a_copy_without_random_access_is_not_taken_for_done(copy, tmp_path):
  shutil.copytree(copy, tmp_path / 'new')
  folder = tmp_path / 'new' / 'digits' / '1.0.0'
  assert refused(copy, tmp_path / 'new') == (
    f'error: {folder} exists already, in the format tfrecord; give another '
    '--data_dir'
  )


def test_other_splits_are_not_taken_for_done(copy, tmp_path):
  folder = tmp_path / 'new' / 'digits' / '1.0.0'
  tfrecord.convert('digits', copy, tmp_path / 'new')
  path = folder / 'dataset_info.json'
  info = json.loads(path.read_text())
  (test,) = (x for x in info['splits'] if x['name'] == 'test')
  test['shardLengths'] = ['180', '179']
  path.write_text(json.dumps(info))
  message = refused(copy, tmp_path / 'new')
  assert "'test': 359" in message and "'test': 360" in message
  assert message.endswith('give another --data_dir')


@pytest.mark.parametrize('where', ['copy', 'new'])
def test_corrupt_description_is_named(where, copy, tmp_path):
  shutil.copytree(copy, tmp_path / 'new')
  path = tmp_path / where / 'digits' / '1.0.0' / 'dataset_info.json'
  path.write_text('')
  assert f'{path} is corrupt: ' in refused(
    copy / 'digits' / '1.0.0', tmp_path / 'new'
  )


def test_missing_files_are_named_at_once(copy, tmp_path):
  for i in 1, 3:
    path = copy / f'digits/1.0.0/digits-train.tfrecord-0000{i}-of-00005'
    path.unlink()
  message = refused(copy, tmp_path / 'new')
  assert f'2 of 7 files are missing in {copy}/digits/1.0.0: ' in message
  assert 'digits-train.tfrecord-00001-of-00005' in message
  assert not (tmp_path / 'new').exists()


def test_truncated_file_is_named(copy, tmp_path):
  path = copy / 'digits/1.0.0/digits-train.tfrecord-00003-of-00005'
  path.write_bytes(path.read_bytes()[:-1])
  message = refused(copy, tmp_path / 'new')
  assert f'cannot read {path}: truncated record' in message
  found = {path.name for path in (tmp_path / 'new').rglob('*record-*')}
  expected = {f'digits-train.array_record-0000{i}-of-00005' for i in range(3)}
  assert found == expected


def test_wrong_number_of_records_is_named(copy, tmp_path):
  folder = copy / 'digits' / '1.0.0'
  path = folder / 'digits-train.tfrecord-00003-of-00005'
  shutil.copy(folder / 'digits-test.tfrecord-00000-of-00002', path)
  message = refused(copy, tmp_path / 'new')
  assert f'{path} holds 180 records' in message
  assert 'its dataset_info.json says 287' in message


def test_copies_that_are_not_there_are_named(copy, digits_dir, tmp_path):
  message = refused(tmp_path, tmp_path / 'new')
  assert f"no data set 'digits' in {tmp_path}" in message
  assert f'{tmp_path}/digits/<version>/dataset_info.json' in message
  assert "holds data set 'digits'" in refused(
    copy / 'digits/1.0.0', tmp_path / 'new', 'cifar10'
  )
  assert "no data set 'digits:2.0.0'" in refused(
    copy, tmp_path / 'new', 'digits:2.0.0'
  )
  assert 'array_record already' in refused(digits_dir, tmp_path / 'new')


def test_versions_are_told_apart(copy, tmp_path, capsys):
  old = copy / 'digits' / '0.9.0'
  shutil.copytree(copy / 'digits' / '1.0.0', old)
  path = old / 'dataset_info.json'
  info = json.loads(path.read_text())
  path.write_text(json.dumps({**info, 'version': '0.9.0'}))
  message = refused(copy, tmp_path / 'new')
  assert 'several versions' in message
  assert f'{old}, {copy}/digits/1.0.0' in message
  command.main(
    ['digits:0.9.0', f'--from_tfrecord={copy}', f'--data_dir={tmp_path}/new']
  )
  assert f'prepared in {tmp_path}/new/digits/0.9.0' in capsys.readouterr().out
  assert len(datasets.load('digits:0.9.0', 'test', tmp_path / 'new')) == 360
  command.main(
    ['digits', f'--from_tfrecord={old}', f'--data_dir={tmp_path}/other']
  )
  assert 'name the version: digits:0.9.0' in capsys.readouterr().out


def test_copy_without_space_is_refused(copy, tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  assert 'not enough space' in refused(copy, tmp_path / 'new')
  assert not (tmp_path / 'new').exists()
