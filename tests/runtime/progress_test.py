import io
import sys

import pytest

from nfnets_jax.runtime import progress


def _show_two_steps():
  bar = progress.Progress(start=10, total=40, batch_size=32)
  bar.advance()
  bar.show(11, 1.1, {'loss': 2.30259, 'images_per_second': 12345.6})
  bar.advance()
  bar.show(12, 1.2, {'eval_top_1': 0.25, 'eval_count': 360})


def test_lines_where_nobody_watches(capsys):
  _show_two_steps()
  out, err = capsys.readouterr()
  first, second = out.splitlines()
  assert first == (
    'step 11/40, epoch 1.1: loss 2.303, images_per_second 12,346'
  )
  assert second.startswith('step 12/40, epoch 1.2: eval_top_1 0.25, ETA ')
  assert err == ''


@pytest.mark.parametrize('start', [0, 10])
def test_compilation_is_left_out_of_the_eta(capsys, monkeypatch, start):
  now = 0.0
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now)
  bar = progress.Progress(start, total=start + 101, batch_size=32)
  now += 300.0  # the first step compiles
  bar.advance()
  bar.show(start + 1, 0.0, {'loss': 1.0})
  for _ in range(10):
    now += 2.0
    bar.advance()
  bar.show(start + 11, 0.1, {'loss': 1.0})
  first, second = capsys.readouterr().out.splitlines()
  assert 'ETA' not in first
  assert second.endswith('ETA 180 s')  # 90 steps of 2 s


def test_bar_where_a_person_watches(capsys, monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  terminal = Terminal()
  monkeypatch.setattr(sys, 'stderr', terminal)
  _show_two_steps()
  shown = capsys.readouterr().out + terminal.getvalue()
  assert 'step 11, epoch 1.1: loss 2.303' in shown
  assert '384/1280 ' in shown  # images, after 12 of 40 steps
  assert ' images/s' in shown
