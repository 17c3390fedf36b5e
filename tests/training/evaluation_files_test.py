import csv
import json

import numpy as np
import pytest
from PIL import Image

from nfnets_jax.training import evaluate, evaluation_files, published

NAMES = ('cat', 'hot air balloon', 'emu', 'a fish', 'elk', 'owl', 'yak')


def _evaluation(prefixes=('eval', 'ema_eval'), figures=(), **changes):
  rng = np.random.default_rng(0)
  label = rng.integers(6, size=70)  # none of the last class
  predicted = np.stack([rng.permutation(7)[:5] for _ in label])
  images = {
    'predicted': predicted,
    'label': label,
    'hit': predicted[:, 0] == label,
    'confidence': rng.uniform(0.2, 1, 70),
  }
  results = {'eval_count': 70, 'num_classes': 7}
  for prefix, top_1 in (('eval', 0.25), ('ema_eval', 0.5)):
    results |= {f'{prefix}_top_1': top_1, f'{prefix}_top_5': 0.75}
    results[f'{prefix}_loss'] = 1.5
  about = {
    'model': 'nfnet_tiny',
    'weights': 'runs/x',
    'step': 12,
    'data': 'folder',
    'data_dir': 'my photos/',
    'split': 'test[:70]',
    'label_sets': None,
    'classes': 7,
    'classes_of_net': 7,
    'image_size': 16,
    'crop': 'resize',
    'images': 70,
    'skipped': 0,
    'dtype': 'float32',
    'devices': 8,
    'device': 'cpu',
    'images_per_second': 35.5,
    **changes,
  }
  return evaluate.Evaluation(
    results, about, dict.fromkeys(prefixes, images), NAMES, list(figures)
  )


def test_files_are_added_and_none_is_overwritten(tmp_path):
  evaluation = _evaluation()
  workdir = tmp_path / 'runs' / 'x'
  first = evaluation_files.write(workdir, evaluation)
  before = first[0].read_bytes()
  second = evaluation_files.write(workdir, evaluation, per_class=True)
  other = evaluation_files.write(workdir, _evaluation(image_size=32))
  assert first[0].read_bytes() == before
  name = 'evaluation-my_photos-test_70_'
  assert sorted(x.name for x in {*first, *second, *other}) == [
    f'{name}-16px-2-classes.csv',
    f'{name}-16px-2-confusion.png',
    f'{name}-16px-2.json',
    f'{name}-16px.json',
    f'{name}-32px.json',
    'evaluations.csv',
  ]
  record = json.loads(before)
  assert record['ema_eval_top_1'] == 0.5 and record['step'] == 12
  assert record['eval_ece'] == evaluation.calibration_error('eval')
  with (workdir / 'evaluations.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert [x['average'] for x in rows] == ['False', 'True'] * 3
  assert [x['image_size'] for x in rows] == ['16'] * 4 + ['32'] * 2
  assert float(rows[1]['top_1']) == 0.5
  assert {x for row in rows for x in row if row[x] == ''} == {'label_sets'}


def test_accuracy_of_each_class(tmp_path):
  evaluation = _evaluation()
  table, picture = evaluation_files.write(tmp_path, evaluation, True)[2:]
  images = evaluation.images['ema_eval']
  with table.open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert [row['name'] for row in rows] == list(NAMES)
  for k, row in enumerate(rows[:6]):
    mine = images['predicted'][images['label'] == k]
    assert int(row['images']) == len(mine)
    assert float(row['top_1']) == np.mean(mine[:, 0] == k)
    assert float(row['top_5']) == np.mean((mine == k).any(axis=1))
    wrong = [NAMES[j] for j in mine[:, 0] if j != k]
    most = max(map(wrong.count, wrong))
    assert int(row['times']) == most == wrong.count(row['mistaken_for'])
  assert list(rows[6].values()) == ['6', 'yak', '0', '', '', '', '0']
  with Image.open(picture) as image:
    assert min(image.size) > 300


def test_table_with_other_columns_is_left_alone(tmp_path):
  (tmp_path / 'evaluations.csv').write_text('date,accuracy\n')
  with pytest.raises(
    ValueError, match=r'other columns \(accuracy, average, .* differ\); move'
  ):
    evaluation_files.write(tmp_path, _evaluation())
  assert [x.name for x in tmp_path.iterdir()] == ['evaluations.csv']


def test_description():
  figures = published.accuracies('nfnet_f0', 'ImageNet')
  text = evaluation_files.describe(
    _evaluation(['eval'], figures, step=None, skipped=3)
  )
  lines = [line.split() for line in text.splitlines()]
  assert ['weights', 'timm', 'paper'] in lines
  assert ['top-1', '25.00', '%', '83.49', '%', '83.60', '%'] in lines
  assert ['top-5', '75.00', '%', '96.57', '%', '96.80', '%'] in lines
  assert 'published for the released weights' in text
  assert 'skipped: 3 images' in text
  text = evaluation_files.describe(_evaluation(classes=3))
  assert 'top-5' not in text and 'published' not in text
  lines = [line.split() for line in text.splitlines()]
  assert ['top-1', '25.00', '%', '50.00', '%'] in lines
  assert (
    'nfnet_tiny of runs/x after step 12; my photos test[:70], 16 px' in text
  )
