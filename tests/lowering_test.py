"""The bench of tracing and lowering traces and lowers."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_lowering_bench(tmp_path):
  output = tmp_path / 'figures.json'
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'experiments.benchmarks.lowering',
      '--config=experiments/digits.py',
      '--batch=4',
      '--micro_batches=2',
      f'--output={output}',
    ],
    env={**os.environ, 'TF_CPP_MIN_LOG_LEVEL': '2'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert 'per-device batch 4 in 2 micro-batch(es)' in done.stdout
  figures = json.loads(output.read_text())
  for part in ('shapes', 'trace', 'lower'):
    wall, cpu = figures[part]
    assert wall > 0 and cpu > 0
  assert f'StableHLO text: {figures["size"] / 1e6:.1f} MB' in done.stdout
  assert 1e5 < figures['size'] < 1e7
