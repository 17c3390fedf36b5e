"""Commands of clusters for tests: sbatch, srun, scontrol and gcloud.

python tests/experiments/launch/cluster.py COMMAND ARGUMENTS

They accept the options that the scripts of experiments/launch use, and reject
all others, as the real ones do. $CLUSTER is a JSON file:

  hosts: the command line that runs a command on each host.
  cpus, gpus: of each host, for `sbatch --test-only`.
  folder: where the pids of tasks, and requeued jobs, are recorded.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

JOB = 4711
_OPTIONS = {
  'job-name': r'\S+',
  'nodes': r'[1-9]\d*',
  'ntasks-per-node': r'[1-9]\d*',
  'gpus-per-node': r'\d+',
  'cpus-per-task': r'[1-9]\d*',
  'time': r'(\d+-)?\d+(:\d\d){0,2}',
  'signal': r'(B:)?[A-Z0-9]+(@\d+)?',
  'requeue': None,
  'open-mode': 'append|truncate',
  'output': r'\S+',
  'test-only': None,
}


def _cluster() -> dict:
  return json.loads(pathlib.Path(os.environ['CLUSTER']).read_text())


def _fail(text: str) -> None:
  sys.exit(f'{sys.argv[1]}: error: {text}')


def _parse(words: list[str], options: dict) -> tuple[dict, list[str]]:
  """Returns the leading options, and what follows them."""
  found = {}
  while words and words[0].startswith('--'):
    name, _, value = words[0][2:].partition('=')
    if name not in options:
      _fail(f'unrecognized option --{name}')
    if not re.fullmatch(options[name] or '', value):
      _fail(f'invalid --{name}={value}')
    found[name] = value
    words = words[1:]
  return found, words


def _directives(script: pathlib.Path) -> dict:
  """Returns the #SBATCH options, which stop at the first command."""
  lines = script.read_text().splitlines()
  if not lines[0].startswith('#!'):
    _fail('this does not look like a batch script: no #!')
  found = {}
  for line in lines[1:]:
    if line.strip() and not line.startswith('#'):
      break
    if line.startswith('#SBATCH '):
      found |= _parse(line.split()[1:], _OPTIONS)[0]
  return found


def sbatch(words: list[str]) -> int:
  """Runs a batch script on this machine, as on the first node of a job."""
  cluster = _cluster()
  given, (name, *arguments) = _parse(words, _OPTIONS)
  script = pathlib.Path(name)
  options = _directives(script) | given
  nodes, tasks = int(options['nodes']), int(options['ntasks-per-node'])
  cpus = tasks * int(options.get('cpus-per-task', 1))
  if (
    nodes > len(cluster['hosts'])
    or cpus > cluster['cpus']
    or int(options.get('gpus-per-node', 0)) > cluster['gpus']
  ):
    _fail('Requested node configuration is not available')
  if 'test-only' in options:
    print(f'sbatch: Job {JOB} to start using {nodes * cpus} processors')
    return 0
  print(f'Submitted batch job {JOB}', flush=True)
  # SLURM runs a copy.
  folder = pathlib.Path(cluster['folder'])
  copy = folder / 'slurm_script'
  copy.write_text(script.read_text())
  environment = {
    **os.environ,
    'SLURM_JOB_ID': str(JOB),
    'SLURM_JOB_NUM_NODES': str(nodes),
    'SLURM_NNODES': str(nodes),
    'SLURM_NTASKS': str(nodes * tasks),
    'SLURM_NTASKS_PER_NODE': str(tasks),
    'SLURM_JOB_NODELIST': f'host[0-{nodes - 1}]',
    'SLURM_SUBMIT_DIR': str(pathlib.Path.cwd()),
  }
  requeued = folder / 'requeued'
  output = options['output'].replace('%j', str(JOB))
  while True:
    requeued.unlink(missing_ok=True)
    with pathlib.Path(output).open('a') as log:
      code = subprocess.run(
        ['bash', copy, *arguments],
        env=environment,
        stdout=log,
        stderr=log,
      ).returncode
    if not requeued.exists():
      return code
    environment['SLURM_RESTART_COUNT'] = '1'


def srun(words: list[str]) -> int:
  """Starts the tasks of a step, and kills those that outlive the first."""
  options = {'label': None, 'kill-on-bad-exit': '0', 'wait': r'\d+'}
  given, command = _parse(words, options)
  cluster = _cluster()
  per_node = int(os.environ['SLURM_NTASKS_PER_NODE'])
  count = int(os.environ['SLURM_NTASKS'])
  tasks, readers = [], []
  for rank in range(count):
    task = subprocess.Popen(
      [*cluster['hosts'][rank // per_node], *command],
      env={
        **os.environ,
        'SLURM_STEP_NODELIST': os.environ['SLURM_JOB_NODELIST'],
        'SLURM_STEP_NUM_TASKS': str(count),
        'SLURM_PROCID': str(rank),
        'SLURM_LOCALID': str(rank % per_node),
        'SLURM_NODEID': str(rank // per_node),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
    )
    label = f'{rank}: ' if 'label' in given else ''
    reader = threading.Thread(target=_copy, args=(label, task))
    reader.start()
    tasks.append(task)
    readers.append(reader)
  pids = json.dumps([task.pid for task in tasks])
  path = pathlib.Path(cluster['folder'], 'tasks')
  path.with_suffix('.new').write_text(pids)
  path.with_suffix('.new').rename(path)
  while all(task.poll() is None for task in tasks):
    time.sleep(0.05)
  deadline = time.monotonic() + int(given['wait'])
  for task in tasks:
    try:
      task.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
      task.kill()
      task.wait()
  for reader in readers:
    reader.join()
  path.unlink()
  return max(x.returncode if x.returncode >= 0 else 137 for x in tasks)


def _copy(label: str, task: subprocess.Popen) -> None:
  for line in task.stdout:
    print(f'{label}{line}', end='', flush=True)


def scontrol(words: list[str]) -> int:
  """Requeues a job: SLURM ends its script and starts it again."""
  if words != ['requeue', str(JOB)]:
    _fail(f'invalid request {words}')
  pathlib.Path(_cluster()['folder'], 'requeued').touch()
  return 0


def gcloud(words: list[str]) -> int:
  """Runs a command on all hosts, in the login shell and home folder of each."""
  start = ['compute', 'tpus', 'tpu-vm', 'ssh']
  if words[:4] != start or words[4:5] == [] or words[4].startswith('-'):
    _fail(f'invalid choice: {words[:5]}')
  options = {'zone': r'\S+', 'worker': 'all', 'command': '(?s:.+)'}
  given, rest = _parse(words[5:], options)
  if rest or given.keys() != options.keys():
    _fail(f'unrecognized arguments: {rest}')
  cluster = _cluster()
  folder = pathlib.Path(cluster['folder'])
  if not (folder / 'connected').exists():
    (folder / 'connected').touch()
    _fail('[/usr/bin/ssh] exited with return code [255].')
  hosts = cluster['hosts']
  processes = [
    subprocess.Popen(
      [*host, 'bash', '-c', given['command']],
      cwd=folder,
      # In place of the metadata server, which tells jax the same.
      env={
        **os.environ,
        'JAX_COORDINATOR_ADDRESS': 'host0:8476',
        'PMI_SIZE': str(len(hosts)),
        'PMI_RANK': str(rank),
      },
      start_new_session=True,
    )
    for rank, host in enumerate(hosts)
  ]
  return max([process.wait() for process in processes])


if __name__ == '__main__':
  commands = {x.__name__: x for x in (sbatch, srun, scontrol, gcloud)}
  sys.exit(commands[sys.argv[1]](sys.argv[2:]))
