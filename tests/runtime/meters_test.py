import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax.runtime import meters


def _scalars(loss, grad_norm=1.0, **others):
  values = {'loss': loss, 'grad_norm': grad_norm, **others}
  return {name: jnp.asarray(x, jnp.float32) for name, x in values.items()}


def test_window_averages_each_step_once():
  window = meters.Window(images_per_step=32)
  for step, loss in enumerate([1, 2, 3, 6], start=1):
    window.push(step, _scalars(loss, top_1=0.5))
  means = window.summarize()
  speeds = {name: means.pop(name) for name in meters.SPEEDS}
  assert means == {'loss': 3, 'grad_norm': 1, 'top_1': 0.5}
  assert speeds['images_per_second'] * speeds['step_seconds'] == (
    pytest.approx(32)
  )
  assert speeds['data_wait_seconds'] == speeds['data_share'] == 0
  # It starts anew.
  window.push(5, _scalars(7))
  assert window.summarize()['loss'] == 7


def test_waiting_for_data_is_part_of_a_step():
  window = meters.Window(images_per_step=32)
  for step in (1, 2):
    with window.waiting():
      time.sleep(0.05)
    window.push(step, _scalars(1))
  means = window.summarize()
  assert means['step_seconds'] >= means['data_wait_seconds'] >= 0.05
  window.push(3, _scalars(1))
  assert window.summarize()['data_wait_seconds'] == 0


def test_the_time_of_waits_is_shared_out():
  window = meters.Window(images_per_step=32)
  window.push(1, _scalars(1))
  with window.paused('evaluation'):  # before the clock starts
    time.sleep(0.05)
  window.forget_time()
  began = time.monotonic()
  window.push(2, _scalars(1))
  with window.waiting():
    time.sleep(0.01)
  with window.paused('checkpoint'):
    time.sleep(0.06)
  with window.paused():  # for neither
    time.sleep(0.01)
  means = window.summarize()
  elapsed = time.monotonic() - began
  assert means['data_share'] >= 0.01 / elapsed
  assert 0.06 / elapsed <= means['checkpoint_share'] < 0.9
  assert means['evaluation_share'] == 0
  assert means['step_seconds'] < elapsed - 0.06
  with window.paused('evaluation'):  # after the last report
    time.sleep(0.03)
  pattern = r'of 0 s, waited (.+) % for data, (.+) % for ch.* and (.+) % for e'
  data, saving, evaluation = map(
    float, re.match(pattern, window.describe_waits()).groups()
  )
  assert 0 < data < evaluation < saving < 70
  assert data + saving + evaluation < 100


def test_steps_left_out_are_counted_and_not_averaged():
  window = meters.Window(32, skip_nonfinite=2)
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
  window = meters.Window(32)
  window.push(1, _scalars(1, stop=0))
  window.push(2, _scalars(1, stop=1))
  assert 'stop' not in window.summarize()
  assert window.stop_requested


def test_pausing_loses_no_step():
  window = meters.Window(images_per_step=32)
  for step in range(1, 8):
    window.push(step, _scalars(step))
    if step in (1, 4):
      with window.paused():
        pass
  assert window.summarize()['loss'] == 4


def test_what_was_forgotten_is_not_timed():
  window = meters.Window(images_per_step=32)
  window.push(1, _scalars(1))
  window.forget_time()
  assert window.summarize() == {'loss': 1, 'grad_norm': 1}


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('name', ['loss', 'grad_norm'])
def test_step_that_is_not_finite_is_named(name, value):
  window = meters.Window(images_per_step=32)
  window.push(11, _scalars(1.0))
  window.push(12, _scalars(**{'loss': 1.0, name: value}))
  with pytest.raises(FloatingPointError, match=f'{name} is {value} at step 12'):
    window.summarize()


def test_a_loss_that_is_too_large_ends_the_run():
  window = meters.Window(32, skip_nonfinite=1, max_loss=20.0)
  window.push(1, _scalars(20.0))
  # What was left out for an infinite loss did no harm.
  window.push(2, _scalars(math.inf, nonfinite=1, nonfinite_in_a_row=1))
  window.push(3, _scalars(20.5))
  with pytest.raises(
    FloatingPointError, match='loss is 20.5 at step 3, above max_loss 20'
  ):
    window.summarize()


def test_step_that_is_not_finite_is_seen_soon():
  window = meters.Window(images_per_step=32)
  with pytest.raises(FloatingPointError, match='loss is nan at step 1'):
    for step in range(1, 10):
      window.push(step, _scalars(np.nan))
  assert step <= 4


def test_compile_times_are_of_what_is_compiled_inside():
  function = jax.jit(lambda x: jnp.sin(x) @ x)
  with meters.CompileTimes() as times:
    function(jnp.ones((3, 3)))
  assert min(times.trace, times.lower, times.compile) > 0
  with meters.CompileTimes() as again:
    function(jnp.ones((3, 3)))
  assert (again.trace, again.compile) == (0, 0)
  before = times.compile
  function(jnp.ones((4, 4)))
  assert times.compile == before  # it listens no more
