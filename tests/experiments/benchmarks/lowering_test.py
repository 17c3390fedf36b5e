"""The bench of tracing and lowering traces and lowers."""

import json

import pytest

from tests import commands


@pytest.mark.slow
def test_lowering_bench(tmp_path):
  output = tmp_path / 'figures.json'
  printed = commands.output(
    'experiments.benchmarks.lowering',
    '--config=experiments/digits.py',
    '--batch=4',
    '--micro_batches=2',
    f'--output={output}',
  )
  assert 'per-device batch 4 in 2 micro-batch(es)' in printed
  figures = json.loads(output.read_text())
  for part in ('shapes', 'trace', 'lower'):
    wall, cpu = figures[part]
    assert wall > 0 and cpu > 0
  assert f'StableHLO text: {figures["size"] / 1e6:.1f} MB' in printed
  assert 1e5 < figures['size'] < 1e7
