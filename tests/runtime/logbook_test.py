import json

import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

from nfnets_jax.runtime import logbook


def _write(workdir, steps, start=0):
  """What a run writes from after `start`; each line is on disk at once."""
  with logbook.Writer(workdir, start) as writer:
    for step in steps:
      writer.write(step, 'train', {'loss': 10.0 - step, 'learning_rate': 0.1})
      if step % 2 == 0:
        results = {'loss': 5.0 - step / 2, 'top_1': 1 - 0.5**step}
        values = {
          f'{prefix}_{name}': x
          for name, x in results.items()
          for prefix in ('eval', 'ema_eval')
        }
        writer.write(step, 'test', values)
      assert logbook.read(workdir)[-1]['step'] == step


def test_lines_are_json_and_come_back(tmp_path):
  _write(tmp_path, [1, 2])
  text = (tmp_path / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  assert lines == logbook.read(tmp_path)
  assert [(line['step'], line['split']) for line in lines] == [
    (1, 'train'),
    (2, 'train'),
    (2, 'test'),
  ]
  assert lines[1] == {
    'step': 2,
    'split': 'train',
    'loss': 8.0,
    'learning_rate': 0.1,
  }


def test_resuming_removes_what_lies_after_the_checkpoint(tmp_path):
  _write(tmp_path, [1, 2, 3, 4, 5])
  _write(tmp_path, [4, 5, 6], start=3)
  seen = [(line['step'], line['split']) for line in logbook.read(tmp_path)]
  assert seen == [
    (1, 'train'),
    (2, 'train'),
    (2, 'test'),
    (3, 'train'),
    (4, 'train'),
    (4, 'test'),
    (5, 'train'),
    (6, 'train'),
    (6, 'test'),
  ]


def test_line_that_a_killed_run_was_writing_is_dropped(tmp_path):
  _write(tmp_path, [1, 3])
  path = tmp_path / 'metrics.jsonl'
  with path.open('a') as file:
    file.write('{"step": 5, "spl')
  assert [line['step'] for line in logbook.read(tmp_path)] == [1, 3]
  _write(tmp_path, [5], start=3)
  assert [line['step'] for line in logbook.read(tmp_path)] == [1, 3, 5]


def test_reading_nothing(tmp_path):
  assert logbook.read(tmp_path) == []


def test_line_that_cannot_be_read_is_named(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
  message = f"{path}, line 2, is not JSON: 'nonsense"
  with pytest.raises(ValueError, match=message):
    logbook.read(tmp_path)


@pytest.mark.parametrize('steps', [[], [1], range(1, 20)])
def test_curves_are_an_image(tmp_path, steps):
  _write(tmp_path, steps)
  logbook.plot_curves(tmp_path)
  with Image.open(tmp_path / 'curves.png') as image:
    assert image.format == 'PNG'
    width, height = image.size
    pixels = np.asarray(image.convert('L'))
  assert 900 <= width <= 2400
  assert 250 <= height <= 800
  assert pixels.std() > 10  # not blank


@pytest.mark.parametrize('top_1', [0.0, 1.0])
def test_curves_of_perfect_and_hopeless_nets(tmp_path, top_1):
  with logbook.Writer(tmp_path, 0) as writer:
    for step in (1, 2):
      writer.write(step, 'test', {'eval_top_1': top_1, 'ema_eval_top_1': top_1})
  logbook.plot_curves(tmp_path)
  assert (tmp_path / 'curves.png').stat().st_size > 0


def test_more_training_shows_in_the_curves(tmp_path):
  images = []
  for steps in (range(1, 5), range(1, 20)):
    _write(tmp_path, steps)
    logbook.plot_curves(tmp_path)
    images.append((tmp_path / 'curves.png').read_bytes())
  assert images[0] != images[1]


def test_the_curves_name_the_run_and_share_units(tmp_path, monkeypatch):
  workdir = tmp_path / 'my run'
  workdir.mkdir()
  with logbook.Writer(workdir, 0) as writer:
    writer.write(1, 'train', {'loss': 2.0, 'top_1': 0.25, 'learning_rate': 0.1})
    writer.write(1, 'test', {'eval_top_1': 0.5, 'ema_eval_top_1': 0.75})
  drawn = []
  savefig = matplotlib.figure.Figure.savefig
  monkeypatch.setattr(
    matplotlib.figure.Figure,
    'savefig',
    lambda figure, *a, **k: (drawn.append(figure), savefig(figure, *a, **k)),
  )
  logbook.plot_curves(workdir)
  (figure,) = drawn
  assert figure.get_suptitle() == 'my run'
  (accuracy,) = [x for x in figure.axes if '%' in x.get_title()]
  curves = {x.get_label(): list(x.get_ydata()) for x in accuracy.lines}
  assert curves == {'training': [25.0], 'test': [50.0], 'test, EMA': [75.0]}
