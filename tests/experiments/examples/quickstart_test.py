"""The notebook runs from beginning to end, with the installed package alone."""

import base64
import json
import os
import re
import subprocess
import sys

import pytest

from tests.commands import ROOT

NOTEBOOK = ROOT / 'experiments' / 'examples' / 'quickstart.ipynb'


def _code_cells(path):
  cells = json.loads(path.read_text())['cells']
  return [x for x in cells if x['cell_type'] == 'code']


def _outputs(path):
  return [output for cell in _code_cells(path) for output in cell['outputs']]


def _printed(path):
  return ''.join(''.join(x.get('text', [])) for x in _outputs(path))


def test_outputs_are_committed():
  cells = _code_cells(NOTEBOOK)
  counts = [cell['execution_count'] for cell in cells]
  assert counts == [*range(1, len(cells) + 1)], 'run `make notebook`'
  assert not any(x['output_type'] == 'error' for x in _outputs(NOTEBOOK))
  pictures = [
    base64.b64decode(x['data']['image/png'])
    for x in _outputs(NOTEBOOK)
    if 'image/png' in x.get('data', {})
  ]
  assert len(pictures) == 2
  assert all(len(picture) < 100_000 for picture in pictures)
  # Neither paths of a machine nor what differs from run to run.
  assert not re.search(r'/(tmp|home|root)/', NOTEBOOK.read_text())
  assert not any('execution' in cell['metadata'] for cell in cells)


def test_nothing_of_the_repository_is_imported():
  source = ''.join(''.join(x['source']) for x in _code_cells(NOTEBOOK))
  assert not re.search(r'\b(experiments|tests|sys\.path)\b', source)


@pytest.mark.slow
def test_notebook_runs(tmp_path):
  python = os.environ.get('NFNETS_NOTEBOOK_PYTHON') or sys.executable
  environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  environment['HOME'] = str(tmp_path)
  run = {'cwd': tmp_path, 'env': environment, 'capture_output': True}
  probe = [python, '-c', 'import ipykernel, nbconvert, nfnets_jax']
  if subprocess.run(probe, **run).returncode:
    pytest.skip("install the package with its extra 'notebook'")
  notebook = json.loads(NOTEBOOK.read_text())
  (parameters,) = (
    x
    for x in notebook['cells']
    if 'parameters' in x['metadata'].get('tags', ())
  )
  parameters['source'] = (
    'EPOCHS, MODEL, WEIGHTS, WORKDIR = 2, "nfnet_tiny", "random", "runs"'
  )
  path = tmp_path / 'copy.ipynb'
  path.write_text(json.dumps(notebook))
  command = (
    f'{python} -m nbconvert --to notebook --execute --inplace copy.ipynb'
  )
  done = subprocess.run(command.split(), text=True, **run)
  assert done.returncode == 0, done.stderr[-3000:]

  text = _printed(path)
  top_1 = dict(
    re.findall(r'^(fine-tuned|from scratch) +([\d.]+) %', text, re.M)
  )
  assert float(top_1['fine-tuned']) > float(top_1['from scratch'])
  assert 'nfnet_tiny: ' in text
  assert len(re.findall(r'^ *[\d.]+ %  ', text, re.MULTILINE)) == 5
  assert 'largest update' in text
