import pathlib

import pytest

from experiments import flax_agc


@pytest.mark.thorough
def test_clipping_bears_a_rate_that_diverges_without():
  plain, accuracy = flax_agc.train(0.128, None, seed=0, steps=60)
  assert flax_agc.diverged(plain)
  clipped, clipped_accuracy = flax_agc.train(0.128, 0.01, seed=0, steps=60)
  assert not flax_agc.diverged(clipped)
  assert clipped[-1] < clipped[0]
  assert clipped_accuracy > accuracy


@pytest.mark.slow
def test_the_command_draws_both_curves(tmp_path: pathlib.Path, capsys):
  output = tmp_path / 'new' / 'curves.png'
  flax_agc.main(['--seeds=1', '--first_rate=0.128', f'--output={output}'])
  assert output.read_bytes().startswith(b'\x89PNG')
  out = capsys.readouterr().out
  assert 'no clipping' in out
  assert '1 of 1 diverged' in out
