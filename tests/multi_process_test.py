"""Runs of several processes, each a real one, on devices of the CPU."""

import collections
import contextlib
import json
import math
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from nfnets_jax.runtime import logbook

ROOT = pathlib.Path(__file__).parents[1]

HEARTBEAT = 10  # seconds


@pytest.fixture(scope='module')
def folders(digits_dir, tmp_path_factory):
  """Prepared digits and a folder of compiled steps."""
  return digits_dir, tmp_path_factory.mktemp('compiled')


def free_port():
  with socket.socket() as listener:
    listener.bind(('localhost', 0))
    return listener.getsockname()[1]


@contextlib.contextmanager
def started(arguments, devices, compiled=None, on=lambda index, words: words):
  """Starts processes that write to pipes; none is left when it ends.

  Args:
    arguments: of Python, one list for each process.
    devices: of each process.
    compiled: where compiled functions are kept, unless the environment says.
    on: maps the index and the command line of a process to that which starts
      it, elsewhere.
  """
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    # The last of two equal flags counts.
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} '
    f'--xla_force_host_platform_device_count={devices}',
  }
  if compiled:
    environment.setdefault('JAX_COMPILATION_CACHE_DIR', str(compiled))
  processes = []
  try:
    for index, words in enumerate(arguments):
      processes.append(
        subprocess.Popen(
          on(index, [sys.executable, *words]),
          cwd=ROOT,
          env=environment,
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          text=True,
          # As on hosts of their own, none waits for another's processor time.
          start_new_session=True,
        )
      )
    yield processes
  finally:
    for process in processes:
      process.kill()
      process.communicate()


def outputs(processes, timeout=200):
  """What each has printed when all have ended."""
  deadline = time.monotonic() + timeout
  return [
    process.communicate(timeout=max(1, deadline - time.monotonic()))[0]
    for process in processes
  ]


def cluster(count, first='localhost'):
  """The flags of each of `count` processes, of which host `first` has one."""
  if count == 1:
    return [[]]
  address = f'--coordinator_address={first}:{free_port()}'
  return [
    [address, f'--num_processes={count}', f'--process_id={i}']
    for i in range(count)
  ]


def main(folders, workdir, count, first='localhost', **changes):
  """Arguments of `count` processes of a run of a small net; 10 steps an epoch.

  All that is random is on: crops, MixUp, CutMix, dropout, stochastic depth.
  """
  fields = {
    'model.width': '(64,)',
    'model.depth': '(2,)',
    'model.strides': '(1,)',
    'model.group_width': '(16,)',
    'model.stem_width': '(32,)',
    'model.stem_strides': '(2,)',
    'model.drop_rate': 0.2,
    'model.stochdepth_rate': 0.2,
    'data.data_dir': folders[0],
    'data.train_split': 'train[:160]',
    'data.test_split': 'test[:101]',
    'data.image_size': 8,
    'data.eval_image_size': 8,
    'data.crop': 'pad_1',
    'data.num_workers': 1,
    'batch_size': 16,
    'eval_batch_size': 16,
    'epochs': 1.0,
    'optimizer.warmup_epochs': 0.0,
    'log_every_steps': 1,
    'eval_every_epochs': 100.0,
    'checkpoint_every_epochs': 1.0,
    **changes,
  }
  return [
    [
      '-m',
      'nfnets_jax.main',
      '--config=experiments/digits.py',
      f'--workdir={workdir}',
      f'--heartbeat_timeout={HEARTBEAT}',
      *flags,
      *(f'--config.{name}={value}' for name, value in fields.items()),
    ]
    for flags in cluster(count, first)
  ]


def run(folders, workdir, count, devices, **changes):
  """Runs all processes to their end; returns what each printed."""
  arguments = main(folders, workdir, count, **changes)
  with started(arguments, devices, folders[1]) as processes:
    printed = outputs(processes)
    for process, text in zip(processes, printed, strict=True):
      assert process.returncode == 0, text
  return printed


def evaluate(workdir, count, devices, *flags):
  """Evaluates a run; returns what is recorded of it and of its classes."""
  before = set(workdir.glob('evaluation-*'))
  words = ['-m', 'nfnets_jax.main', '--mode=evaluate', f'--workdir={workdir}']
  words += ['--per_class', *flags]
  with started([words + x for x in cluster(count)], devices) as processes:
    printed = outputs(processes)
    for process, text in zip(processes, printed, strict=True):
      assert process.returncode == 0, text
  assert 'top-1' in printed[0] and not any('top-1' in x for x in printed[1:])
  files = {x.suffix: x for x in set(workdir.glob('evaluation-*')) - before}
  assert files.keys() == {'.json', '.csv', '.png'}
  return json.loads(files['.json'].read_text()), files['.csv'].read_text()


def stored_state(workdir, step):
  """Reads a checkpoint's arrays, `{part: {name: array}}`, with Orbax alone."""
  folder = workdir / 'checkpoints' / str(step)
  packed = ocp.StandardCheckpointHandler().restore(folder / 'state')
  fingerprint = ocp.JsonCheckpointHandler().restore(folder / 'fingerprint')
  state, read = {}, collections.Counter()
  for name, (dtype, shape) in fingerprint['arrays'].items():
    part, _, rest = name.partition('.')
    if name in packed:
      state.setdefault(part, {})[rest] = packed[name]
    else:
      start, size = read[dtype], math.prod(shape)
      array = packed[f'small {dtype}'][start : start + size].reshape(shape)
      state.setdefault(part, {})[rest] = array
      read[dtype] += size
  return state


_LIBRARY = """
import pathlib, shutil, sys
import jax, numpy as np
from absl import logging
from nfnets_jax.runtime import checkpoint, integrity, parallel, processes
from nfnets_jax.training import train_step

logging.set_verbosity(logging.WARNING)
folder, address = pathlib.Path(sys.argv[1]), sys.argv[2]
process = int(sys.argv[3])
processes.initialize(address, 2, process, start_timeout=60)
devices, local = jax.devices(), jax.local_devices()
assert (len(devices), len(local)) == (4, 2)

# Copies are compared across processes, also those of one process alone.
def copies(odd):
  like = parallel.replicate(np.zeros(3, np.float32))
  return jax.make_array_from_single_device_arrays(like.shape, like.sharding, [
    jax.device_put(np.float32([1, 2, 3 + (devices.index(d) == odd) / 4]), d)
    for d in local])

assert parallel.replica_spread({'w': copies(None)}) == 0
for odd in range(4):
  assert parallel.replica_spread({'w': copies(odd)}) == 0.25

# Each gives its part of the batch; the sum is over all.
step = parallel.parallel_train_step(
  lambda state, batch: (
    state._replace(step=state.step + 1), jax.lax.psum(batch.sum(), 'devices')))
state = parallel.replicate(train_step.TrainState(
  np.int32(0), np.zeros(2, np.uint32), {'w': np.arange(9, dtype=np.float32)},
  {}, (), {}, {}))
for number in (1, 2):
  part = np.arange(4, dtype=np.float32) + 4 * process
  state, total = step(state, parallel.shard(part))
  assert float(total) == 28 and int(state.step) == number
assert parallel.replica_spread(state.params) == 0

# So does what was compiled before, with an input.
def scaled(state, batch, scale):
  return (state._replace(step=state.step + 1),
          jax.lax.psum(scale * batch.sum(), 'devices'))

state = parallel.replicate(jax.tree.map(parallel.local_copy, state))
lowered = parallel.lower_train_step(
  scaled, state, jax.ShapeDtypeStruct((2, 2), np.float32), np.float32(3))
program = parallel.Program(lowered.compile(), np.float32(3))
for number in (3, 4):
  state, total = program(state, parallel.shard(part))
  assert float(total) == 3 * 28 and int(state.step) == number
assert parallel.replica_spread(state) == 0

# One writes, both read, and both see the same damage.
checkpoints = checkpoint.Checkpointer(folder / 'checkpoints', keep=3)
for number in (1, 2):
  state = state._replace(step=state.step.at[()].set(number))
  checkpoints.save(number, state, {'next_index': 8 * number})
checkpoints.close()
processes.agree('the fingerprint', integrity.fingerprint_of(state, {}))
if process == 0:
  (folder / 'checkpoints' / '2' / 'state' / '_METADATA').write_text('{')
processes.all_agree(True)
checkpoints = checkpoint.Checkpointer(folder / 'checkpoints', keep=3)
assert checkpoints.latest_step == 2
state, loader_state = checkpoints.restore(state)
assert int(state.step) == 1 and loader_state == {'next_index': 8}
state, total = step(state, parallel.shard(part))
assert int(state.step) == 2
np.testing.assert_array_equal(state.params['w'], np.arange(9))
checkpoints.save(2, state, {'next_index': 16})
checkpoints.close()

# What one does not see yet is skipped by both.
processes.all_agree(True)
seen = checkpoint.steps
checkpoint.steps = lambda path: seen(path)[: None if process else 1]
reader = checkpoint.Checkpointer(folder / 'checkpoints', keep=3)
assert reader.latest_step == (2 if process else 1)
assert int(reader.restore(state)[0].step) == 1
checkpoint.steps = seen
alone = folder / f'alone {process}' / 'checkpoints'
if process == 0:
  shutil.copytree(folder / 'checkpoints' / '1', alone / '1')
processes.all_agree(True)
try:
  checkpoint.Checkpointer(alone, keep=3).restore(state)
  raise SystemExit('read what process 1 does not see')
except FileNotFoundError as error:
  assert 'that can be read; train first' in str(error)
assert process == 0 or not alone.exists()

# What differs is refused in both.
def refusal(function, *arguments):
  try:
    function(*arguments)
  except ValueError as error:
    return str(error)

processes.agree('the config', {'seed': 1})
text = refusal(processes.agree, 'the config', {'seed': process})
assert 'the config is not the same in all processes: [1] differ' in text, text
processes._SHARED_TIMEOUT = 1.0
text = refusal(processes.check_shared, folder / f'own {process}')
assert 'is not one folder for all processes' in text and '[1] do not' in text
assert processes.all_agree(True) and not processes.all_agree(process == 0)
print('all is well')
"""


@pytest.mark.thorough
def test_two_processes_share_sums_checkpoints_and_refusals(tmp_path):
  address = f'localhost:{free_port()}'
  arguments = [
    ['-c', _LIBRARY, str(tmp_path), address, str(i)] for i in range(2)
  ]
  with started(arguments, devices=2) as processes:
    printed = outputs(processes, timeout=100)
    for process, text in zip(processes, printed, strict=True):
      assert process.returncode == 0, text
      assert 'all is well' in text
  assert 'process 0 of 2, 2 local of 4 devices' in printed[0]
  assert 'a corrupt checkpoint' in printed[0]
  assert 'a corrupt checkpoint' not in printed[1]
  names = sorted(path.name for path in (tmp_path / 'checkpoints').iterdir())
  assert names == ['1', '2', '2.corrupt']
  assert not list(tmp_path.rglob('.shared-*'))


@pytest.mark.slow
def test_layouts_make_the_same_run(folders, tmp_path):
  """1 process of 8 devices = 2 processes of 4 = 1 device, after ten steps.

  Every image is cropped, mixed and dropped alike wherever it lies, so the runs
  differ by the order of float32 sums alone: over 16 images at once, or 8 times
  over 2 and then over the devices. Such a difference is of a few 2^-24 relative
  to the largest number in a sum, and the parameters take ten updates of it.
  Sums of both signs, as of a bias's gradient, are smaller than their terms, so
  5e-5 of an array's largest number is allowed (1.1e-5 was seen). That the
  parameters move by more than five times as much is asserted as well.
  """
  layouts = {'1 x 1': (1, 1), '1 x 8': (1, 8), '2 x 4': (2, 4)}
  states, reports, lines = {}, {}, {}
  for name, (count, devices) in layouts.items():
    workdir = tmp_path / name
    printed = run(folders, workdir, count, devices)
    states[name] = stored_state(workdir, 10)
    reports[name] = json.loads((workdir / 'report.json').read_text())
    lines[name] = logbook.read(workdir)
    if count == 2:
      assert 'process 0 of 2, 4 local of 8 devices' in printed[0]
      assert 'eval_top_1' not in printed[1]  # one prints and writes
  assert len(list((tmp_path / '2 x 4' / 'tensorboard').iterdir())) == 1

  one = jax.tree.leaves_with_path(states['1 x 1'])
  for name in ('1 x 8', '2 x 4'):
    for (path, x), y in zip(one, jax.tree.leaves(states[name]), strict=True):
      scale = np.max(np.abs(x), initial=0)
      np.testing.assert_allclose(
        y, x, rtol=0, atol=5e-5 * scale, err_msg=jax.tree_util.keystr(path)
      )
    assert reports[name]['eval_count'] == 101  # 6 batches of 16 and 5 images
    for field, value in reports['1 x 1'].items():
      if field.endswith(('top_1', 'top_5')):
        assert reports[name][field] == value
      elif field.endswith('loss'):
        assert reports[name][field] == pytest.approx(value, rel=1e-5)
    for ours, theirs in zip(lines[name], lines['1 x 1'], strict=True):
      assert ours['step'] == theirs['step']
      for field in {'loss', 'top_1', 'grad_norm'} & ours.keys():
        assert ours[field] == pytest.approx(theirs[field], rel=1e-4)
  # Whoever evaluates the same run, each image counts once, in its class.
  found, classes = evaluate(tmp_path / '2 x 4', 2, 4)
  assert evaluate(tmp_path / '2 x 4', 1, 8)[1] == classes
  for field in found.keys() & reports['2 x 4'].keys():
    if field.startswith(('eval_', 'ema_eval_')):
      assert found[field] == pytest.approx(reports['2 x 4'][field], rel=1e-6)
  assert found['images'] == 101
  # Ten steps move the parameters away from their averages (5.5e-4 was seen).
  params, ema = states['1 x 1']['params'], states['1 x 1']['ema_params']
  moved = [
    np.max(np.abs(x - y)) / np.max(np.abs(x))
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(ema), strict=True)
    if np.any(x)
  ]
  assert np.median(moved) > 5 * 5e-5


def wait_for_checkpoint(processes, workdir, step, timeout=150):
  deadline = time.monotonic() + timeout
  while not (workdir / 'checkpoints' / str(step)).is_dir():
    assert time.monotonic() < deadline
    for process in processes:
      assert process.poll() is None, process.communicate()[0]
    time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_dead_process_ends_the_others_and_the_run_goes_on(
  folders, tmp_path, victim
):
  """With nothing but SIGKILL, and the same command again."""
  changes = {'epochs': 6.0}
  workdir = tmp_path / 'killed'
  arguments = main(folders, workdir, 2, **changes)
  with started(arguments, 1, folders[1]) as processes:
    wait_for_checkpoint(processes, workdir, 20)
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    survivor = processes[1 - victim]
    (text,) = outputs([survivor], timeout=HEARTBEAT + 20)
    seconds = time.monotonic() - killed
  print(f'process {1 - victim} ended {seconds:.1f} s after {victim}')
  assert survivor.returncode != 0
  assert re.search('another task died|ends, and the others with it', text), text
  assert not (workdir / 'report.json').exists()

  printed = run(folders, workdir, 2, 1, **changes)
  resumed = re.search(r'resumed after step (\d+)', printed[0])
  assert resumed and 20 <= int(resumed[1]) < 60
  straight = tmp_path / 'straight'
  run(folders, straight, 2, 1, **changes)
  ours, theirs = stored_state(workdir, 60), stored_state(straight, 60)
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_signal_to_one_process_stops_all_of_them(folders, tmp_path):
  """As a scheduler sends it to a node: all save one checkpoint and exit 75."""
  changes = {'epochs': 1000.0, 'checkpoint_every_epochs': 1000.0}
  workdir = tmp_path / 'run'
  stopped = []
  for _ in range(2):
    before = len(logbook.read(workdir))
    arguments = main(folders, workdir, 2, **changes)
    with started(arguments, 1, folders[1]) as processes:
      deadline = time.monotonic() + 150
      while len(logbook.read(workdir)) < before + 5:
        assert time.monotonic() < deadline
        time.sleep(0.05)
      processes[1].send_signal(signal.SIGTERM)
      printed = outputs(processes, timeout=60)
    assert [process.returncode for process in processes] == [75, 75], printed
    message = r'another process stopped the run after step (\d+)'
    step = re.search(message, printed[0])
    assert step, printed[0]
    stopped.append(int(step[1]))
    assert (workdir / 'checkpoints' / step[1]).is_dir()
  assert f'resumed after step {stopped[0]}' in printed[0]
  assert stopped[0] < stopped[1]


@pytest.mark.thorough
def test_flags_that_are_not_all_there(tmp_path):
  (arguments,) = main((tmp_path, None), tmp_path / 'run', 1)
  with started([[*arguments, '--num_processes=2']], 1) as processes:
    (text,) = outputs(processes, timeout=60)
  assert processes[0].returncode != 0
  assert '--coordinator_address, --process_id is missing: give' in text
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_different_configs_are_refused(folders, tmp_path):
  """Two that were given different configs say so, and neither waits."""
  arguments = main(folders, tmp_path / 'run', 2)
  arguments[1] = [
    word.replace(f'data_dir={folders[0]}', f'data_dir={tmp_path}')
    for word in arguments[1]
  ]
  with started(arguments, 1, folders[1]) as processes:
    printed = outputs(processes, timeout=60 + HEARTBEAT)
  for process, text in zip(processes, printed, strict=True):
    assert process.returncode != 0
    assert 'the config is not the same in all processes: [1]' in text


@pytest.mark.thorough
def test_others_that_never_come(tmp_path):
  flags = cluster(2)[1]
  arguments = [
    '-m',
    'nfnets_jax.main',
    '--config=experiments/digits.py',
    f'--workdir={tmp_path / "run"}',
    '--start_timeout=2',
    *flags,
  ]
  with started([arguments], 1) as processes:
    (text,) = outputs(processes, timeout=60)
  assert processes[0].returncode == 1
  assert 'process 1 of 2, with process 0 at localhost:' in text
  assert 'has waited 2 s for the others' in text
  assert not (tmp_path / 'run').exists()
