import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from nfnets_jax.training import metrics


def _scalars(loss, grad_norm=1.0, **others):
  values = {'loss': loss, 'grad_norm': grad_norm, **others}
  return {name: jnp.asarray(x, jnp.float32) for name, x in values.items()}


def test_window_averages_each_step_once():
  window = metrics.Window(images_per_step=32)
  for step, loss in enumerate([1, 2, 3, 6], start=1):
    window.push(step, _scalars(loss, top_1=0.5))
  means = window.summarize()
  speeds = {name: means.pop(name) for name in metrics.SPEEDS}
  assert means == {'loss': 3, 'grad_norm': 1, 'top_1': 0.5}
  assert speeds['images_per_second'] * speeds['step_seconds'] == (
    pytest.approx(32)
  )
  assert speeds['data_wait_seconds'] == 0
  # It starts anew.
  window.push(5, _scalars(7))
  assert window.summarize()['loss'] == 7


def test_waiting_for_data_is_part_of_a_step():
  window = metrics.Window(images_per_step=32)
  for step in (1, 2):
    with window.waiting():
      time.sleep(0.05)
    window.push(step, _scalars(1))
  means = window.summarize()
  assert means['step_seconds'] >= means['data_wait_seconds'] >= 0.05
  window.push(3, _scalars(1))
  assert window.summarize()['data_wait_seconds'] == 0


def test_steps_left_out_are_counted_and_not_averaged():
  window = metrics.Window(32, skip_nonfinite=2)
  for step, (loss, in_a_row) in enumerate(
    [(1, 0), (math.nan, 1), (math.inf, 2), (5, 0)], start=1
  ):
    left_out = float(in_a_row > 0)
    window.push(
      step, _scalars(loss, nonfinite=left_out, nonfinite_in_a_row=in_a_row)
    )
  means = window.summarize()
  assert (means['loss'], means['nonfinite']) == (3, 2)
  assert 'nonfinite_in_a_row' not in means
  window.push(5, _scalars(math.nan, nonfinite=1, nonfinite_in_a_row=3))
  with pytest.raises(
    FloatingPointError, match='step 5, number 3 in a row; .* allows 2'
  ):
    window.summarize()


def test_a_vote_to_stop_is_seen():
  window = metrics.Window(32)
  window.push(1, _scalars(1, stop=0))
  window.push(2, _scalars(1, stop=1))
  assert 'stop' not in window.summarize()
  assert window.stop_requested


def test_pausing_loses_no_step():
  window = metrics.Window(images_per_step=32)
  for step in range(1, 8):
    window.push(step, _scalars(step))
    if step in (1, 4):
      with window.paused():
        pass
  assert window.summarize()['loss'] == 4


def test_what_was_forgotten_is_not_timed():
  window = metrics.Window(images_per_step=32)
  window.push(1, _scalars(1))
  window.forget_time()
  assert window.summarize() == {'loss': 1, 'grad_norm': 1}


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('name', ['loss', 'grad_norm'])
def test_step_that_is_not_finite_is_named(name, value):
  window = metrics.Window(images_per_step=32)
  window.push(11, _scalars(1.0))
  window.push(12, _scalars(**{'loss': 1.0, name: value}))
  with pytest.raises(FloatingPointError, match=f'{name} is {value} at step 12'):
    window.summarize()


def test_a_loss_that_is_too_large_ends_the_run():
  window = metrics.Window(32, skip_nonfinite=1, max_loss=20.0)
  window.push(1, _scalars(20.0))
  # What was left out for an infinite loss did no harm.
  window.push(2, _scalars(math.inf, nonfinite=1, nonfinite_in_a_row=1))
  window.push(3, _scalars(20.5))
  with pytest.raises(
    FloatingPointError, match='loss is 20.5 at step 3, above max_loss 20'
  ):
    window.summarize()


def test_step_that_is_not_finite_is_seen_soon():
  window = metrics.Window(images_per_step=32)
  with pytest.raises(FloatingPointError, match='loss is nan at step 1'):
    for step in range(1, 10):
      window.push(step, _scalars(np.nan))
  assert step <= 4


def _write(workdir, steps, start=0):
  """What a run writes from after `start`; nobody ends it properly."""
  writer = metrics.Writer(workdir, start)
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


def test_lines_are_json_and_come_back(tmp_path):
  _write(tmp_path, [1, 2])
  text = (tmp_path / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  assert lines == metrics.read(tmp_path)
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
  seen = [(line['step'], line['split']) for line in metrics.read(tmp_path)]
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
  assert [line['step'] for line in metrics.read(tmp_path)] == [1, 3]
  _write(tmp_path, [5], start=3)
  assert [line['step'] for line in metrics.read(tmp_path)] == [1, 3, 5]


def test_reading_nothing(tmp_path):
  assert metrics.read(tmp_path) == []


def test_line_that_cannot_be_read_is_named(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
  message = f"{path}, line 2, is not JSON: 'nonsense"
  with pytest.raises(ValueError, match=message):
    metrics.read(tmp_path)


@pytest.mark.parametrize('steps', [[], [1], range(1, 20)])
def test_curves_are_an_image(tmp_path, steps):
  _write(tmp_path, steps)
  metrics.plot_curves(tmp_path)
  with Image.open(tmp_path / 'curves.png') as image:
    assert image.format == 'PNG'
    width, height = image.size
    pixels = np.asarray(image.convert('L'))
  assert 900 <= width <= 2400
  assert 250 <= height <= 800
  assert pixels.std() > 10  # not blank


@pytest.mark.parametrize('top_1', [0.0, 1.0])
def test_curves_of_perfect_and_hopeless_nets(tmp_path, top_1):
  writer = metrics.Writer(tmp_path, 0)
  for step in (1, 2):
    writer.write(step, 'test', {'eval_top_1': top_1, 'ema_eval_top_1': top_1})
  metrics.plot_curves(tmp_path)
  assert (tmp_path / 'curves.png').stat().st_size > 0


def test_more_training_shows_in_the_curves(tmp_path):
  images = []
  for steps in (range(1, 5), range(1, 20)):
    _write(tmp_path, steps)
    metrics.plot_curves(tmp_path)
    images.append((tmp_path / 'curves.png').read_bytes())
  assert images[0] != images[1]


def test_compile_times_are_of_what_is_compiled_inside():
  function = jax.jit(lambda x: jnp.sin(x) @ x)
  with metrics.CompileTimes() as times:
    function(jnp.ones((3, 3)))
  assert min(times.trace, times.lower, times.compile) > 0
  with metrics.CompileTimes() as again:
    function(jnp.ones((3, 3)))
  assert (again.trace, again.compile) == (0, 0)
  before = times.compile
  function(jnp.ones((4, 4)))
  assert times.compile == before  # it listens no more
