"""The notebook runs from beginning to end."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / 'experiments' / 'examples' / 'quickstart.ipynb'


def code_cells():
  cells = json.loads(NOTEBOOK.read_text())['cells']
  return [x for x in cells if x['cell_type'] == 'code']


def test_notebook_is_committed_without_outputs():
  for cell in code_cells():
    assert cell['outputs'] == []
    assert cell['execution_count'] is None
    # What only a notebook knows could not be run here.
    assert not re.search(r'^\s*[%!]', ''.join(cell['source']), re.MULTILINE)


@pytest.mark.slow
def test_notebook_runs(tmp_path):
  first, *rest = code_cells()
  assert first['metadata']['tags'] == ['parameters']
  small = 'MODEL, WEIGHTS, EPOCHS = "nfnet_tiny", "random", 2\n'
  small += f'WORKDIR = {str(tmp_path)!r}\n'
  program = tmp_path / 'notebook.py'
  source = small + '\n'.join(''.join(x['source']) for x in rest)
  program.write_text(source)
  done = subprocess.run(
    [sys.executable, str(program)],
    env={'PYTHONPATH': str(ROOT), 'MPLBACKEND': 'agg', 'HOME': str(tmp_path)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = dict(
    re.findall(r'^(fine-tuned|from scratch) +([\d.]+) %', done.stdout, re.M)
  )
  assert float(found['fine-tuned']) > float(found['from scratch'])
  assert 'nfnet_tiny: ' in done.stdout
  assert len(re.findall(r'^ *[\d.]+ %  ', done.stdout, re.MULTILINE)) == 5
  assert 'largest update' in done.stdout
