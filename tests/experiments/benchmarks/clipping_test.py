import re

import pytest

from tests import commands


@pytest.mark.slow
def test_clipping_is_timed_beside_optax():
  out = commands.output(
    'experiments.benchmarks.clipping', '--model=nfnet_tiny', '--repeats=2'
  )
  pattern = r'^(none|optax|ours|ours, statistics) +([0-9.]+) .* \([0-9.]+ to'
  rows = re.findall(pattern, out, re.M)
  assert [name for name, _ in rows] == [
    'none',
    'optax',
    'ours',
    'ours, statistics',
  ]
  assert all(float(seconds) > 0 for _, seconds in rows)
