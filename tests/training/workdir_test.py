import json

import pytest
from ml_collections import config_dict

from nfnets_jax.training import workdir as workdirs


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
