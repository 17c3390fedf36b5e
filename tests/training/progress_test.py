import io
import sys

from nfnets_jax.training import progress


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
  assert first.startswith(
    'step 11/40, epoch 1.1: loss 2.303, images_per_second 12,346, ETA '
  )
  assert second.startswith('step 12/40, epoch 1.2: eval_top_1 0.25, ETA ')
  assert err == ''


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
