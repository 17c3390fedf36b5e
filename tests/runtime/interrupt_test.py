"""Signals are remembered once, and the second one acts."""

import signal
import threading

import pytest

from nfnets_jax.runtime import interrupt


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_remembered_and_second_acts(number):
  before = signal.getsignal(number)
  with interrupt.Signals() as signals:
    assert signals.received is None
    signal.raise_signal(number)
    assert signals.received == number.name
    assert signal.getsignal(number) is before
  assert signal.getsignal(number) is before


def test_handlers_are_put_back():
  before = [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)]
  with interrupt.Signals():
    assert signal.getsignal(signal.SIGINT) is not before[1]
  after = [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)]
  assert after == before


def test_another_thread_handles_no_signals_and_says_so(caplog):
  before = signal.getsignal(signal.SIGTERM)
  seen = []

  def enter():
    with interrupt.Signals() as signals:
      seen.append(signals.received)

  thread = threading.Thread(target=enter)
  with caplog.at_level('WARNING', logger='absl'):
    thread.start()
    thread.join()
  assert seen == [None]
  assert signal.getsignal(signal.SIGTERM) is before
  assert 'not in the main thread' in caplog.text


def test_exit_code_is_the_documented_one(capsys):
  with pytest.raises(SystemExit) as raised, interrupt.exiting():
    raise interrupt.StoppedError('SIGTERM stopped the run after step 7')
  assert raised.value.code == 75
  assert capsys.readouterr().err == 'SIGTERM stopped the run after step 7\n'
