import json

import pytest
from ml_collections import config_dict

from nfnets_jax.data import datasets
from nfnets_jax.runtime import workdir as workdirs
from nfnets_jax.training import build


def _config(**changes):
  fields = {
    'epochs': 3.0,
    'model': {'name': 'nfnet_f0', 'width': (16, 32)},
    'augment': {'cutmix': True, 'rand_augment': None},
  }
  return config_dict.ConfigDict({**fields, **changes}, type_safe=False)


def _claim(workdir, config, allow_change=False):
  same = workdirs.check(workdir, config, allow_change)
  workdirs.record(workdir, config)
  return same


def _recorded(workdir):
  return json.loads((workdir / 'config.json').read_text())


def test_new_folder_is_anyones_and_stays_untouched(tmp_path):
  folder = tmp_path / 'new'
  assert workdirs.check(folder, _config(), allow_change=False)
  assert not folder.exists()


def test_run_records_its_config(tmp_path):
  folder = tmp_path / 'runs' / 'new'
  workdirs.record(folder, _config())
  assert _recorded(folder) == {
    'epochs': 3.0,
    'model': {'name': 'nfnet_f0', 'width': [16, 32]},
    'augment': {'cutmix': True, 'rand_augment': None},
  }


def test_report_of_another_config_is_removed(tmp_path):
  workdirs.record(tmp_path, _config())
  workdirs.write_json(tmp_path / 'report.json', {})
  workdirs.record(tmp_path, _config(epochs=4.0))
  assert [path.name for path in tmp_path.iterdir()] == ['config.json']


@pytest.mark.parametrize('allow_change', [False, True])
@pytest.mark.parametrize('width', [(16, 32), [16, 32]])
def test_the_same_config_may_go_on(tmp_path, width, allow_change):
  workdirs.record(tmp_path, _config())
  model = {'name': 'nfnet_f0', 'width': width}
  assert workdirs.check(tmp_path, _config(model=model), allow_change)


@pytest.mark.parametrize(
  ('changes', 'lines'),
  [
    ({'epochs': 4.0}, ['config.epochs: 3.0 -> 4.0']),
    (
      {'augment': {'cutmix': False, 'rand_augment': '4x5'}},
      [
        'config.augment.cutmix: True -> False',
        "config.augment.rand_augment: None -> '4x5'",
      ],
    ),
    (
      {'model': {'name': 'nfnet_f0', 'width': (16, 32, 64)}},
      ['config.model.width: [16, 32] -> [16, 32, 64]'],
    ),
    (
      {'model': {'name': 'nfnet_f0', 'width': (16, 32), 'drop_rate': 0.1}},
      ["config.model.drop_rate: '(absent)' -> 0.1"],
    ),
    (
      {'model': {'name': 'nfnet_f0'}},
      ["config.model.width: [16, 32] -> '(absent)'"],
    ),
  ],
)
def test_another_config_is_refused_or_allowed(tmp_path, changes, lines):
  workdirs.record(tmp_path, _config())
  before = _recorded(tmp_path)
  other = _config(**changes)
  with pytest.raises(ValueError, match='holds a run of another') as caught:
    workdirs.check(tmp_path, other, allow_change=False)
  message = str(caught.value)
  assert str(tmp_path) in message
  assert '--allow_config_change' in message
  assert [x.strip() for x in message.splitlines() if ' -> ' in x] == lines
  assert not workdirs.check(tmp_path, other, allow_change=True)
  assert _recorded(tmp_path) == before


def test_sizes_of_evaluations_and_logs_may_change(tmp_path):
  workdirs.record(tmp_path, _config(eval_batch_size=8, log_every_steps=2))
  other = _config(eval_batch_size=6, log_every_steps=4)
  assert workdirs.check(tmp_path, other, allow_change=False)


def _split(split, count, names=('cat', 'dog')):
  return datasets.Dataset('folder', split, range(count), tuple(names))


def _data(train=40, test=10, names=('cat', 'dog')):
  return build.describe_data(
    _split('train', train, names), _split('test', test, names)
  )


def test_a_run_records_its_data(tmp_path):
  data = _data()
  assert data == {
    'name': 'folder',
    'splits': {
      'train': {'split': 'train', 'count': 40},
      'test': {'split': 'test', 'count': 10},
    },
    'class_names': ['cat', 'dog'],
  }
  assert workdirs.check_data(tmp_path, data, allow_change=False)  # a new run
  workdirs.write_json(tmp_path / 'data.json', data)
  assert workdirs.check_data(tmp_path, data, allow_change=False)


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    (
      _data(names=('Dog', 'cat')),
      "classes 0: 'cat' -> 'Dog', 1: 'dog' -> 'cat",
    ),
    (
      _data(names=('dog', 'cat')),
      "classes 0: 'cat' -> 'dog', 1: 'dog' -> 'cat",
    ),
    (_data(names=('cat', 'cow', 'dog')), '2 classes -> 3 classes'),
    (_data(train=100), 'train split: 40 -> 100 images'),
    (_data(train=39), 'train split: 40 -> 39 images'),
  ],
)
def test_other_data_are_refused_or_said(tmp_path, capsys, changed, message):
  workdirs.write_json(tmp_path / 'data.json', _data())
  with pytest.raises(ValueError, match='(?s)have changed.*--allow') as caught:
    workdirs.check_data(tmp_path, changed, allow_change=False)
  assert message in str(caught.value)
  assert not workdirs.check_data(tmp_path, changed, allow_change=True)
  assert message in capsys.readouterr().out


@pytest.mark.parametrize(
  'text', ['', '{', '[]', '{"class_names": ["cat"]}', '{"class_names": 3}']
)
def test_corrupt_record(tmp_path, text):
  (tmp_path / 'data.json').write_text(text)
  with pytest.raises(ValueError, match='data.json is corrupt; move it away'):
    workdirs.check_data(tmp_path, _data(), allow_change=False)


def test_other_test_images_are_said(tmp_path, capsys):
  workdirs.write_json(tmp_path / 'data.json', _data())
  assert workdirs.check_data(tmp_path, _data(test=12), allow_change=False)
  assert 'test split: 10 -> 12 images' in capsys.readouterr().out


def test_an_evaluation_looks_at_the_classes_alone(tmp_path):
  workdirs.write_json(tmp_path / 'data.json', _data())
  names = {'class_names': ['cat', 'dog']}
  assert workdirs.check_data(tmp_path, names, allow_change=False)
  with pytest.raises(ValueError, match="1: 'dog' -> 'cow'"):
    workdirs.check_data(tmp_path, {'class_names': ['cat', 'cow']}, False)


def test_both_splits_have_the_same_classes():
  with pytest.raises(ValueError, match="train and test .* 1: 'dog' -> 'cow'"):
    build.describe_data(_split('train', 4), _split('test', 4, ['cat', 'cow']))


REPORT = {
  'steps': 112_603,
  'eval_top_1': 0.83571,
  'eval_top_5': 0.96,
  'eval_loss': 0.71234,
  'ema_eval_top_1': 0.836,
  'ema_eval_top_5': 1.0,
  'ema_eval_loss': 12.5,
  'images_per_second': 1234.56,
  'num_params': 71_489_284,
}


def test_report_for_people(tmp_path):
  lines = workdirs.format_report(REPORT, tmp_path).splitlines()
  values = [line.split() for line in lines]
  assert ['top-1', '83.57', '%', '83.60', '%'] in values
  assert ['top-5', '96.00', '%', '100.00', '%'] in values
  assert ['loss', '0.7123', '12.5000'] in values
  assert ['parameters', '71,489,284'] in values
  assert ['steps', '112,603'] in values
  assert ['images/s', '1,235'] in values
  assert lines[-1] == f'run: {tmp_path}'


@pytest.mark.parametrize(('num_classes', 'shown'), [(4, 0), (5, 0), (6, 1)])
def test_top_5_of_few_classes_says_nothing(tmp_path, num_classes, shown):
  report = {**REPORT, 'num_classes': num_classes}
  assert workdirs.format_report(report, tmp_path).count('top-5') == shown


def test_report_without_a_speed(tmp_path):
  report = {**REPORT, 'images_per_second': None}
  text = workdirs.format_report(report, tmp_path)
  assert ['images/s', '-'] in [line.split() for line in text.splitlines()]


def test_report_of_an_evaluation(tmp_path):
  results = {name: x for name, x in REPORT.items() if 'eval' in name}
  text = workdirs.format_report(results, tmp_path)
  assert 'top-1' in text
  assert 'parameters' not in text


def test_report_comes_back(tmp_path):
  assert workdirs.read_report(tmp_path) is None
  workdirs.write_json(tmp_path / 'report.json', REPORT)
  assert workdirs.read_report(tmp_path) == REPORT
  assert [path.name for path in tmp_path.iterdir()] == ['report.json']


@pytest.mark.parametrize('text', ['', '{"seed": 0', '[]', '\x00'])
def test_corrupt_config(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(ValueError, match=r'config\.json is corrupt'):
    workdirs.read_config(tmp_path)
  assert workdirs.read_config(tmp_path / 'new') is None
