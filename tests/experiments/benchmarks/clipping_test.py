import json

import pytest

from tests import commands


@pytest.mark.slow
def test_clipping_is_timed_beside_optax():
  out = commands.output(
    'experiments.benchmarks.clipping', '--model=nfnet_tiny', '--repeats=2'
  )
  rows = [line for line in out.splitlines() if line.startswith('ours')]
  assert len(rows) == 2
  args = ('--model=nfnet_tiny', '--repeats=2', '--json')
  result = json.loads(commands.output('experiments.benchmarks.clipping', *args))
  assert {*result['temporaries']} == {*result['seconds']}
  assert all(len(times) == 2 for times in result['seconds'].values())
