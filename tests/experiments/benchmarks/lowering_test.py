"""The bench of tracing and lowering traces and lowers."""

import re

import pytest

from tests import commands


@pytest.mark.slow
def test_lowering_bench():
  printed = commands.output(
    'experiments.benchmarks.lowering',
    '--config=experiments/digits.py',
    '--batch=4',
    '--micro_batches=2',
  )
  assert 'per-device batch 4 in 2 micro-batch(es)' in printed
  for part in ('shapes of the state', 'trace of the step', 'lowering'):
    times = re.search(rf'^{part} +([0-9.]+) +([0-9.]+)$', printed, re.M)
    assert times and float(times[1]) > 0 and float(times[2]) > 0
  size = re.search(r'StableHLO text: ([0-9.]+) MB', printed)
  assert size and 0.1 < float(size[1]) < 10
