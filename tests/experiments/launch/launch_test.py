"""The scripts of experiments/launch are valid, and what they start exists.

`rehearsal_test.py` runs them.
"""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from absl import flags
from ml_collections import config_flags

from tests.commands import ROOT
from tests.experiments.launch import cluster, jobset_schema

LAUNCH = ROOT / 'experiments' / 'launch'
SCRIPTS = ['slurm.sbatch', 'tpu_pod.sh']
# Bash puts in what the user would; the commands that it takes are faked.
SHELL = """
set -euo pipefail
srun() { printf 'srun %s\\n' "${*@Q}" >> "$LOG"; }
gcloud() { printf 'gcloud %s\\n' "${*@Q}" >> "$LOG"; }
scontrol() { printf 'scontrol %s\\n' "${*@Q}" >> "$LOG"; }
sleep() { :; }
export -f srun gcloud scontrol sleep
bash "$@"
"""


def test_every_file_is_tested_here():
  names = {path.name for path in LAUNCH.iterdir()}
  assert names == {*SCRIPTS, 'jobset.yaml', 'README.md'}


def _run(script, tmp_path, *arguments, **variables):
  """Runs a script without a cluster; returns the commands that it gave."""
  log = tmp_path / 'log'
  environment = {'PATH': '/usr/bin:/bin', 'HOME': '/home/me', 'LOG': str(log)}
  subprocess.run(
    ['bash', '-c', SHELL, 'bash', LAUNCH / script, *arguments],
    cwd=ROOT,
    env={**environment, **variables},
    check=True,
  )
  return [shlex.split(line) for line in log.read_text().splitlines()]


def _check_command(words, monkeypatch):
  """Checks a command `PYTHON -m MODULE FLAGS`: its module, flags and fields."""
  python, option, module, *arguments = words
  assert (python, option) == ('.venv/bin/python', '-m')
  assert module == 'nfnets_jax.main'
  source = pathlib.Path(importlib.util.find_spec(module).origin).read_text()
  defined = re.findall(r"DEFINE_(\w+)\(\s*'(\w+)'", source)
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    'config', lock_config=True, flag_values=values
  )
  for kind, name in defined:
    if kind == 'integer':
      flags.DEFINE_integer(name, None, '', flag_values=values)
    elif kind == 'string':
      flags.DEFINE_string(name, None, '', flag_values=values)
  absolute = [
    re.sub(r'^--config=', f'--config={ROOT}/', word) for word in arguments
  ]
  monkeypatch.setattr(sys, 'argv', ['main', *absolute])
  assert values(sys.argv) == ['main']
  assert values.workdir
  assert values.config.data.data_dir
  return values


loads_configs = pytest.mark.filterwarnings(
  'ignore:the load_module:DeprecationWarning'
)


@loads_configs
def test_slurm(tmp_path, monkeypatch):
  (words,) = _run(
    'slurm.sbatch', tmp_path, '--num_processes=1', WORKDIR='/shared/a run'
  )
  assert words[0] == 'srun'
  values = _check_command(words[words.index('.venv/bin/python') :], monkeypatch)
  assert values.workdir == '/shared/a run'
  assert values.num_processes == 1  # passed on
  text = (LAUNCH / 'slurm.sbatch').read_text()
  lines = text.splitlines()
  directives = [x for x in lines if x.startswith('#SBATCH')]
  # sbatch reads no further than the first command.
  first = next(i for i, x in enumerate(lines) if x and not x.startswith('#'))
  assert lines[0] == '#!/bin/bash'
  assert len(directives) == len([x for x in lines[:first] if '#SBATCH' in x])
  assert '#SBATCH --gpus-per-node=8' in directives


def test_slurm_goes_on_in_a_new_job_after_a_signal(tmp_path):
  log = tmp_path / 'log'
  stopped = SHELL.replace('srun() {', 'srun() { return 75;')
  done = subprocess.run(
    ['bash', '-c', stopped, 'bash', LAUNCH / 'slurm.sbatch'],
    cwd=ROOT,
    env={'PATH': '/usr/bin:/bin', 'HOME': '/', 'LOG': log, 'SLURM_JOB_ID': '7'},
  )
  assert done.returncode == 75
  assert log.read_text() == "scontrol 'requeue' '7'\n"


def test_sbatch_takes_its_options(tmp_path):
  """With the options and resources that `sbatch --test-only` checks."""
  path = tmp_path / 'cluster.json'
  path.write_text(json.dumps({'hosts': [[], []], 'cpus': 96, 'gpus': 8}))

  def submit(*words):
    return subprocess.run(
      [sys.executable, cluster.__file__, 'sbatch', '--test-only', *words],
      env={**os.environ, 'CLUSTER': str(path)},
      capture_output=True,
      text=True,
    )

  script = LAUNCH / 'slurm.sbatch'
  done = submit(script)
  assert done.returncode == 0, done.stderr
  assert '192 processors' in done.stdout
  assert 'not available' in submit('--nodes=3', script).stderr
  typed = tmp_path / 'typed.sbatch'
  typed.write_text(script.read_text().replace('--requeue', '--requeued'))
  assert 'unrecognized option --requeued' in submit(typed).stderr


@pytest.mark.parametrize('script', SCRIPTS)
def test_shellcheck(script):
  path = f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'
  if shutil.which('shellcheck', path=path) is None:
    pytest.skip('no shellcheck; make install brings it')
  done = subprocess.run(
    ['shellcheck', LAUNCH / script],
    env={'PATH': path},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout


@loads_configs
def test_tpu_pod(tmp_path, monkeypatch):
  (words,) = _run(
    'tpu_pod.sh',
    tmp_path,
    '--config.seed=1',
    "--coordinator_address=it's",
    TPU='slice',
    ZONE='zone',
    WORKDIR='/mnt/a run',
  )
  assert words[:6] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', 'slice']
  assert {'--zone=zone', '--worker=all'} <= set(words)
  (command,) = [x for x in words if x.startswith('--command=')]
  remote = shlex.split(command.removeprefix('--command='))
  assert remote[:3] == ['cd', 'nfnets_jax', '&&']
  values = _check_command(remote[3:], monkeypatch)
  assert values.workdir == '/mnt/a run'
  assert values.coordinator_address == "it's"


def test_tpu_pod_asks_for_what_it_needs(tmp_path):
  with pytest.raises(subprocess.CalledProcessError):
    _run('tpu_pod.sh', tmp_path, TPU='slice', ZONE='zone')


@pytest.mark.parametrize('script', SCRIPTS)
def test_script_tries_again_and_gives_up(tmp_path, script):
  log = tmp_path / 'log'
  failing = SHELL.replace('"$LOG"; }', '"$LOG"; return 3; }')
  done = subprocess.run(
    ['bash', '-c', failing, 'bash', LAUNCH / script],
    cwd=ROOT,
    env={
      'PATH': '/usr/bin:/bin',
      'HOME': '/home/me',
      'LOG': str(log),
      **{'TPU': 'slice', 'ZONE': 'zone', 'WORKDIR': '/mnt/run'},
    },
    check=False,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  assert 'attempt 5 failed' in done.stderr
  assert len(log.read_text().splitlines()) == 5


def test_jobset_is_valid():
  jsonschema = pytest.importorskip('jsonschema')
  kubernetes_validate = pytest.importorskip('kubernetes_validate')
  jobset = yaml.safe_load((LAUNCH / 'jobset.yaml').read_text())
  jsonschema.validate(jobset, jobset_schema.JOBSET)
  (workers,) = jobset['spec']['replicatedJobs']
  job = {
    'apiVersion': 'batch/v1',
    'kind': 'Job',
    'metadata': {'name': f'{jobset["metadata"]["name"]}-{workers["name"]}-0'},
    'spec': workers['template']['spec'],
  }
  kubernetes_validate.validate(job, '1.35', strict=True)
  # Mistyped fields are found on both levels.
  jobset['spec']['network']['enableDnsHostnames'] = True
  with pytest.raises(jsonschema.ValidationError, match='enableDnsHostnames'):
    jsonschema.validate(jobset, jobset_schema.JOBSET)
  job['spec']['template']['spec']['restartpolicy'] = 'Never'
  with pytest.raises(kubernetes_validate.ValidationError, match='restartp'):
    kubernetes_validate.validate(job, '1.35', strict=True)


@pytest.mark.parametrize('file', ['Dockerfile', 'Dockerfile.cuda'])
def test_image_has_what_the_jobset_runs(file):
  text = (ROOT / file).read_text().replace('\\\n', ' ')
  (folder,) = re.findall(r'^WORKDIR (\S+)$', text, re.M)
  jobset = yaml.safe_load((LAUNCH / 'jobset.yaml').read_text())
  (workers,) = jobset['spec']['replicatedJobs']
  pod = workers['template']['spec']['template']['spec']
  (container,) = pod['containers']
  assert container['workingDir'] == folder
  assert f'{container["command"][0]} -m pip install' in text
  # The build sees what it copies, and nothing else.
  lines = (ROOT / '.dockerignore').read_text().splitlines()
  seen = {line[1:] for line in lines if line.startswith('!')}
  copied = [x.split()[:-1] for x in re.findall(r'^COPY (.+)$', text, re.M)]
  names = [name for names in copied for name in names]
  assert {name.split('/')[0] for name in names} == seen
  assert all((ROOT / name).exists() for name in names)
  assert 'experiments' in seen  # where the configs are


@loads_configs
def test_jobset(monkeypatch):
  (jobset,) = yaml.safe_load_all((LAUNCH / 'jobset.yaml').read_text())
  assert (jobset['apiVersion'], jobset['kind']) == (
    'jobset.x-k8s.io/v1alpha2',
    'JobSet',
  )
  (workers,) = jobset['spec']['replicatedJobs']
  job = workers['template']['spec']
  pod = job['template']['spec']
  (container,) = pod['containers']
  command = [
    word.replace('$(JOB_COMPLETION_INDEX)', '0')
    for word in container['command']
  ]
  values = _check_command(command, monkeypatch)
  assert values.num_processes == job['parallelism'] == job['completions']
  assert job['completionMode'] == 'Indexed'
  assert values.process_id == 0
  # JOBSET-JOB-REPLICA-POD.SUBDOMAIN, and the subdomain is the set's name.
  name = jobset['metadata']['name']
  port = container['ports'][0]['containerPort']
  assert values.coordinator_address == (
    f'{name}-{workers["name"]}-0-0.{name}:{port}'
  )
  assert [x['name'] for x in container['env']] == ['JOB_COMPLETION_INDEX']
  mounted = {mount['name'] for mount in container['volumeMounts']}
  assert mounted == {volume['name'] for volume in pod['volumes']}


@loads_configs
def test_commands_of_the_page(monkeypatch):
  text = (LAUNCH / 'README.md').read_text()
  blocks = re.findall(r'^```bash\n(.*?)^```', text, re.M | re.S)
  checked = 0
  for block in blocks:
    for line in block.replace('\\\n', ' ').splitlines():
      words = shlex.split(line)
      if '.venv/bin/python' in words:
        start = words.index('.venv/bin/python')
        with monkeypatch.context() as patch:
          _check_page_command(words[start:], patch)
        checked += 1
      elif words[0] == 'docker':
        assert (ROOT / words[words.index('--file') + 1]).exists()
      else:
        (script,) = [x for x in words if x.startswith('experiments/launch/')]
        assert (ROOT / script).exists()
  assert checked == 3


def _check_page_command(words, monkeypatch):
  _check_command([*words, '--config.data.data_dir=/data'], monkeypatch)
