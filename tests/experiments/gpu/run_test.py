"""The jobs of `run`, and a dry run of them all."""

import json
import os
import subprocess
import sys

import pytest

from experiments.gpu import common, effect, peer, run
from nfnets_jax.models import variants
from tests.commands import ROOT


def test_every_job_is_one_that_its_module_knows(output):
  found = [job.words for part in run.LIMITS for job in run.jobs(part)]
  assert len(set(found)) == len(found)
  for module, *words in found:
    assert (ROOT / 'experiments' / 'gpu' / f'{module}.py').exists()
    if module == 'peer':
      assert words[0] in peer._SIZES
    if module == 'speed' and words != ['peak']:
      variants.get(words[0])
  numbers = [int(words[1]) for words in found if words[0] == 'effect']
  assert numbers == list(range(len(effect.RUNS)))


@pytest.mark.parametrize('parts', ['5', '1,x', ''])
def test_other_parts_are_refused(parts, capsys):
  with pytest.raises(SystemExit):
    run.parse([f'--parts={parts}'])
  assert 'give some of 1,2,3,4' in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run(tmp_path):
  """All four parts on the CPU, on digits where there is no CIFAR-10."""
  environment = {
    **os.environ,
    'GPU_DRY_RUN': '1',
    'GPU_SCRATCH': str(tmp_path / 'scratch'),
    'PYTHONPATH': str(ROOT),
  }
  del environment['XLA_FLAGS']  # eight devices are for the other tests
  done = subprocess.run(
    [
      sys.executable, '-m', 'experiments.gpu.run',
      f'--output={tmp_path / "out"}', '--seconds=1500',
    ],
    env=environment, cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  # So many come back from a machine.
  files = {path.name for path in (tmp_path / 'out').iterdir()}
  assert files == {
    'results.jsonl', 'log.txt', 'report.md', 'cifar10.jsonl',
    'kernels-nfnet_f0.json', 'hlo-nfnet_f0.txt.gz',
  }  # fmt: skip
  found = common.read(tmp_path / 'out' / 'results.jsonl')
  assert {x['part'] for x in found} == {0, 1, 2, 3, 4}
  assert all(x['ok'] for x in found if 'ok' in x)
  forms = {x['form'] for x in found if x['what'] == 'step'}
  assert forms == {'ours', 'released'}
  assert {x['status'] for x in found if x['what'] == 'timm'} <= {
    'absent', 'measured',
  }  # fmt: skip
  (whole,) = [x for x in found if x['what'] == 'cifar10']
  assert whole['status'] == 'finished' and json.dumps(whole['command'])
  page = (tmp_path / 'out' / 'report.md').read_text()
  assert 'A dry run: no number here means anything.' in page
