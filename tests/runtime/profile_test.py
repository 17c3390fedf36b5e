import gzip
import json
import re

import jax
import jax.numpy as jnp
import pytest

from nfnets_jax.runtime import meters, profile


def _run(workdir, steps, end):
  """Five steps after the tenth, the last of which may not be reached."""
  window = meters.Window(images_per_step=8)
  function = jax.jit(lambda x: {'loss': x, 'grad_norm': x})
  last = 11 + profile.WARM_UP + 1
  with profile.Profile(workdir, 10, last, steps, window) as profiler:
    for step in range(11, end + 1):
      with profiler.step(step):
        window.push(step, function(jnp.ones(())))


def _traced(workdir):
  """The numbers of the steps in the only trace."""
  (path,) = workdir.glob('tensorboard/plugins/profile/*/*.trace.json.gz')
  events = json.loads(gzip.decompress(path.read_bytes()))['traceEvents']
  steps = [x for x in events if x.get('name') == 'train']
  return [int(x['args']['step_num']) for x in steps]


def test_the_steps_are_in_the_trace(tmp_path, capsys):
  first = 11 + profile.WARM_UP
  _run(tmp_path, 2, first + 1)
  assert _traced(tmp_path) == [first, first + 1]
  (plane,) = tmp_path.glob('tensorboard/plugins/profile/*/*.xplane.pb')
  assert b'train' in plane.read_bytes()
  said = capsys.readouterr().out
  folder = re.escape(str(plane.parent))
  assert re.match(f'profile of steps {first} to {first + 1} in {folder}', said)


def test_a_run_that_ends_early_keeps_its_trace(tmp_path, capsys):
  first = 11 + profile.WARM_UP
  _run(tmp_path, 2, first)
  assert _traced(tmp_path) == [first]
  assert f'profile of steps {first} to {first} in' in capsys.readouterr().out


def test_nothing_is_traced_unasked(tmp_path):
  _run(tmp_path, 0, 11 + profile.WARM_UP)
  assert not list(tmp_path.iterdir())


def test_too_short_runs_are_not_traced(tmp_path, capsys):
  _run(tmp_path, 3, 11 + profile.WARM_UP)  # the last command, once more
  assert not list(tmp_path.iterdir())
  assert 'no profile: only 7 steps are left' in capsys.readouterr().out
  message = 'a profile of 13 steps takes 18, and the run has 17; lower'
  with pytest.raises(ValueError, match=message):
    _run(tmp_path, 13, 0)
