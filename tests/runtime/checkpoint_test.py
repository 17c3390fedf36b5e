import contextlib
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfnets_jax.runtime import checkpoint, integrity, parallel
from nfnets_jax.training import train_step

# Where files cannot be read or written, Orbax's threads end with the error, and
# what else they were about finds its event loop closed.
pytestmark = [
  pytest.mark.filterwarnings(
    'ignore::pytest.PytestUnhandledThreadExceptionWarning'
  ),
  pytest.mark.filterwarnings(
    'ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning'
  ),
]


def _state(step=0, width=4, seed=0):
  """A state with everything that a state can hold, in random numbers."""
  keys = jax.random.split(jax.random.key(seed), 3)
  params = {
    'net/~/conv': {'w': jax.random.normal(keys[0], (3, width)) * 1e-3},
    'net': {'gain': jnp.asarray(jnp.pi)},
  }
  optimizer = optax.chain(
    optax.masked(optax.identity(), {'net/~/conv': True, 'net': False}),
    optax.trace(0.9),
    optax.scale_by_learning_rate(lambda step: 1.0),
  )
  opt_state = jax.tree.map(
    lambda x: (
      x + jax.random.normal(keys[1], x.shape)
      if jnp.issubdtype(x.dtype, jnp.floating)
      else x + step
    ),
    optimizer.init(params),
  )
  return parallel.replicate(
    train_step.TrainState(
      step=jnp.asarray(step),
      key=jax.random.key_data(keys[2]),
      params=params,
      model_state={'net/~/norm': {'mean': jnp.full(width, 1 / 3)}},
      opt_state=opt_state,
      ema_params=jax.tree.map(lambda x: x / 3, params),
      ema_model_state={'net/~/norm': {'mean': jnp.full(width, 1 / 7)}},
    )
  )


def _save(folder, steps, keep=3):
  """Saves states at `steps` as a run does, and ends it."""
  checkpoints = checkpoint.Checkpointer(folder, keep)
  for step in steps:
    checkpoints.save(step, _state(step), {'next_index': 10 * step})
  checkpoints.close()


def _restore(folder, template):
  checkpoints = checkpoint.Checkpointer(folder, keep=3)
  try:
    return checkpoints.restore(template)
  finally:
    checkpoints.close()


def _assert_identical(tree, expected):
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  for x, y in zip(
    jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_array_equal(x, y, strict=True)


def test_steps_of_complete_checkpoints(tmp_path):
  for name in ('10', '9', '8.corrupt', '11.orbax-checkpoint-tmp-1'):
    (tmp_path / name).mkdir()
  assert checkpoint.steps(tmp_path) == [9, 10]
  assert checkpoint.steps(tmp_path / '9') == []
  assert checkpoint.steps(tmp_path / 'missing') == []


def test_newest_state_comes_back_bit_for_bit_on_every_device(tmp_path):
  _save(tmp_path, [3, 7])
  state, loader_state = _restore(tmp_path, _state(seed=1))
  _assert_identical(state, _state(7))
  assert isinstance(state, train_step.TrainState)
  assert loader_state == {'next_index': 70}
  for x in jax.tree.leaves(state):
    assert x.sharding.device_set == set(jax.devices())
    assert x.is_fully_replicated
  assert parallel.replica_spread(state.params) == 0


def test_restored_state_can_be_trained_on(tmp_path):
  _save(tmp_path, [1])
  state, _ = _restore(tmp_path, _state())
  step = parallel.parallel_train_step(
    lambda state, batch: (state._replace(step=state.step + 1), batch.sum())
  )
  new, _ = step(state, parallel.shard(np.zeros(8, np.float32)))
  _assert_identical(new.params, _state(1).params)
  assert int(new.step) == 2


def test_saving_does_not_see_what_happens_to_the_state_afterwards(tmp_path):
  checkpoints = checkpoint.Checkpointer(tmp_path, keep=1)
  state = _state(1)
  checkpoints.save(1, state, {})
  jax.tree.map(lambda x: x.delete(), state)  # as donation does
  checkpoints.wait()
  restored, _ = checkpoints.restore(_state())
  checkpoints.close()
  _assert_identical(restored, _state(1))


def test_only_the_newest_stay(tmp_path):
  _save(tmp_path, [2, 4, 6, 8], keep=2)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['6', '8']


def test_a_step_that_is_there_is_not_written_again(tmp_path):
  checkpoints = checkpoint.Checkpointer(tmp_path, keep=3)
  checkpoints.save(1, _state(1), {'next_index': 1})
  checkpoints.save(1, _state(1, seed=5), {'next_index': 5})
  checkpoints.wait()
  state, loader_state = checkpoints.restore(_state())
  checkpoints.close()
  _assert_identical(state, _state(1))
  assert loader_state == {'next_index': 1}


def test_what_a_killed_run_was_writing_is_not_taken_for_a_checkpoint(tmp_path):
  _save(tmp_path, [1])
  left = tmp_path / '2.orbax-checkpoint-tmp'
  (left / 'state').mkdir(parents=True)
  checkpoints = checkpoint.Checkpointer(tmp_path, keep=3)
  assert checkpoints.latest_step == 1
  checkpoints.restore(_state())
  assert left.is_dir()  # who only reads removes nothing
  checkpoints.save(2, _state(2), {'next_index': 20})
  checkpoints.close()
  assert sorted(path.name for path in tmp_path.iterdir()) == ['1', '2']


def test_nothing_to_restore(tmp_path):
  checkpoints = checkpoint.Checkpointer(tmp_path / 'new', keep=3)
  assert checkpoints.latest_step is None
  with pytest.raises(FileNotFoundError, match='no checkpoint in .*new'):
    checkpoints.restore(_state())
  checkpoints.close()


def _without(tree, module):
  return {name: x for name, x in tree.items() if name != module}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda params: _state(width=5).params, r'net/~/conv.*3, 4.*3, 5'),
    (lambda params: _without(params, 'net/~/conv'), 'net/~/conv'),
    (lambda params: params | {'net/~/linear': {'w': 1}}, 'net/~/linear'),
  ],
  ids=['shape', 'missing', 'extra'],
)
def test_checkpoint_of_another_net_is_refused(tmp_path, change, message):
  _save(tmp_path, [1])
  template = _state()
  params = parallel.replicate(
    jax.tree.map(jnp.asarray, change(template.params))
  )
  with pytest.raises(ValueError, match=message) as caught:
    _restore(tmp_path, template._replace(params=params))
  assert 'gain' not in str(caught.value)  # which is as it should be


@pytest.mark.parametrize('keep', [0, -1])
def test_no_checkpoint_to_keep(tmp_path, keep):
  message = f'keep_checkpoints must be at least 1, got {keep}'
  with pytest.raises(ValueError, match=message):
    checkpoint.Checkpointer(tmp_path, keep)


def _state_files(folder, step):
  """The files with the arrays, the largest first."""
  files = (folder / str(step) / 'state').rglob('d/*')
  return sorted(files, key=lambda path: -path.stat().st_size)


def _flip_a_bit(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def _zero_a_block(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 3 : len(content) // 2] = bytes(
    len(content) // 2 - len(content) // 3
  )
  path.write_bytes(content)


def _truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _change_position(folder):
  (path,) = (folder / 'loader').glob('metadata')
  content = json.loads(path.read_text())
  path.write_text(json.dumps({**content, 'next_index': 71}))


DAMAGES = {
  'a flipped bit': lambda x: _flip_a_bit(_state_files(x.parent, x.name)[0]),
  'a zeroed block': lambda x: _zero_a_block(_state_files(x.parent, x.name)[0]),
  'half a file': lambda x: _truncate(_state_files(x.parent, x.name)[0]),
  'a missing file': lambda x: _state_files(x.parent, x.name)[0].unlink(),
  'no description': lambda x: (x / 'state' / '_METADATA').unlink(),
  'another dtype': lambda x: (x / 'state' / '_METADATA').write_text(
    (x / 'state' / '_METADATA').read_text().replace('uint32', 'uint16')
  ),
  'another name': lambda x: (x / 'fingerprint' / 'metadata').write_text(
    (x / 'fingerprint' / 'metadata').read_text().replace('gain', 'gaim')
  ),
  'another position': _change_position,
  'no fingerprint': lambda x: shutil.rmtree(x / 'fingerprint'),
  'no state': lambda x: shutil.rmtree(x / 'state'),
  'nothing': lambda x: (shutil.rmtree(x), x.mkdir()),
}


@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES.keys())
def test_corrupt_checkpoint_is_reported_and_skipped(tmp_path, damage, capsys):
  _save(tmp_path, [3, 7])
  damage(tmp_path / '7')
  checkpoints = checkpoint.Checkpointer(tmp_path, keep=2)
  state, loader_state = checkpoints.restore(_state(seed=1))
  _assert_identical(state, _state(3))
  assert loader_state == {'next_index': 30}
  assert checkpoints.latest_step == 3
  said = capsys.readouterr().out
  assert said.startswith('skipped a corrupt checkpoint: ')
  assert str(tmp_path / '7') in said
  assert (tmp_path / '7').is_dir()  # until the run comes to a checkpoint again

  checkpoints.save(7, _state(7), {'next_index': 70})
  checkpoints.close()
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ['3', '7', '7.corrupt']
  assert f'renamed the corrupt checkpoint {tmp_path}/7 to 7.corrupt' in (
    capsys.readouterr().out
  )
  state, loader_state = _restore(tmp_path, _state(seed=1))
  _assert_identical(state, _state(7))
  assert loader_state == {'next_index': 70}


def test_second_damage_to_a_step_keeps_the_first(tmp_path):
  for names in (
    ['3', '7', '7.corrupt'],
    ['3', '7', '7.corrupt', '7.corrupt.2'],
  ):
    _save(tmp_path, [3, 7])
    _truncate(_state_files(tmp_path, 7)[0])
    checkpoints = checkpoint.Checkpointer(tmp_path, keep=2)
    checkpoints.restore(_state())
    checkpoints.save(7, _state(7), {'next_index': 70})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_all_checkpoints_are_corrupt(tmp_path):
  _save(tmp_path, [3, 7])
  for step in (3, 7):
    _truncate(_state_files(tmp_path, step)[0])
  with pytest.raises(ValueError, match='all checkpoints are corrupt') as caught:
    _restore(tmp_path, _state())
  for step in (3, 7):
    assert str(tmp_path / str(step)) in str(caught.value)


def test_checkpoint_of_another_net_is_not_taken_for_a_corrupt_one(tmp_path):
  _save(tmp_path, [3, 7])
  template = _state()._replace(params=_state(width=5).params)
  with pytest.raises(ValueError, match='7 is of another model'):
    _restore(tmp_path, template)


@pytest.mark.parametrize(
  'x',
  [
    np.linspace(-1, 1, 35, dtype=np.float32).reshape(5, 7),
    np.arange(64, dtype=np.int32),
    np.arange(6, dtype=np.uint32),
    np.ones((3, 3), jnp.bfloat16),
    np.zeros(9, np.uint8),
    np.float32(0),
  ],
  ids=lambda x: f'{x.dtype}{list(x.shape)}',
)
def test_fingerprint_changes_with_every_bit(x):
  """Each bit of a few elements, and what leaves a plain sum as it was."""
  mark = integrity.fingerprint_of({'x': x}, {})
  assert mark == integrity.fingerprint_of({'x': parallel.replicate(x)}, {})
  size = x.dtype.itemsize
  places = {0, x.size // 2, x.size - 1}
  for bit in (
    8 * size * place + b for place in places for b in range(8 * size)
  ):
    flipped = bytearray(x.tobytes())
    flipped[bit // 8] ^= 1 << (bit % 8)
    y = np.frombuffer(flipped, x.dtype).reshape(x.shape)
    assert integrity.fingerprint_of({'x': y}, {}) != mark
  assert integrity.fingerprint_of({'y': x}, {}) != mark
  assert integrity.fingerprint_of({'x': x}, {'next_index': 0}) != mark


def test_fingerprint_is_the_same_where_the_sums_are_compiled():
  """Those of small arrays are numpy's, which must not tell them apart."""
  state = [
    *map(np.asarray, jax.tree.leaves(_state())),
    np.array(True),
    np.ones((5, 3), jnp.bfloat16),
    np.zeros((0, 3), np.float32),
    np.linspace(-1, 1, 35, dtype=np.float32).reshape(5, 7).T,
    np.full(9, 2**32 - 1, np.uint32),
  ]
  for x in state:
    assert integrity._sum_of_bits(x) == integrity._compiled_sum_of_bits(x)


@pytest.mark.parametrize('joined', [1, 4, 12, 1 << 16])
def test_arrays_of_any_size_come_back(tmp_path, monkeypatch, joined):
  """Whichever of them are joined."""
  monkeypatch.setattr(integrity, '_SMALL', joined)
  state = _state(3)._replace(
    model_state={
      'half': jnp.linspace(-1, 1, 12, dtype=jnp.bfloat16).reshape(3, 4),
      'flags': np.array([True, False]),
      'none': np.zeros((0, 3), np.float32),
      'counts': np.arange(6, dtype=np.uint8),
    }
  )
  state = parallel.replicate(state)
  checkpoints = checkpoint.Checkpointer(tmp_path, keep=1)
  checkpoints.save(3, state, {})
  checkpoints.close()
  restored, _ = _restore(tmp_path, jax.tree.map(jnp.zeros_like, state))
  _assert_identical(restored, state)


def test_fingerprint_changes_when_elements_change_places():
  x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
  marks = {
    integrity.fingerprint_of([y], {})
    for y in (x, x[::-1], np.roll(x, 8), x.T.reshape(4, 8), x.reshape(8, 4))
  }
  assert len(marks) == 5
  assert integrity.fingerprint_of([x, x + 1], {}) != (
    integrity.fingerprint_of([x + 1, x], {})
  )


@contextlib.contextmanager
def _files_no_larger_than(size):
  """A disk that is full for large files, without a disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _large_state(step):
  """One that does not compress: 4 MB."""
  noise = np.random.default_rng(step).normal(size=1_000_000).astype(np.float32)
  return parallel.replicate(
    train_step.TrainState(
      jnp.asarray(step), jnp.zeros(2, jnp.uint32), {'w': noise}, {}, (), {}, {}
    )
  )


@pytest.mark.parametrize('notices', ['check', 'wait', 'save', 'close'])
def test_checkpoint_that_does_not_fit(tmp_path, notices):
  checkpoints = checkpoint.Checkpointer(tmp_path, keep=2)
  checkpoints.save(1, _large_state(1), {'next_index': 10})
  checkpoints.wait()
  message = (
    rf'cannot write the checkpoint of step 2 into {tmp_path}: (.|\n)*'
    r'takes up to 4.0 MB, and [\d,.]+ MB are free. The checkpoint of step 1 is '
    'intact'
  )
  with (
    _files_no_larger_than(500_000),
    pytest.raises(OSError, match=message),
  ):
    checkpoints.save(2, _large_state(2), {'next_index': 20})
    if notices == 'check':
      deadline = time.monotonic() + 30
      while time.monotonic() < deadline:
        checkpoints.check()
        time.sleep(0.01)
    elif notices == 'save':
      checkpoints.save(3, _large_state(3), {})
    else:
      getattr(checkpoints, notices)()
  checkpoints.close()  # what has been said is not said again
  assert [path.name for path in tmp_path.iterdir()] == ['1']
  state, loader_state = _restore(tmp_path, _large_state(0))
  _assert_identical(state, _large_state(1))
  assert loader_state == {'next_index': 10}


def test_first_checkpoint_does_not_fit(tmp_path):
  checkpoints = checkpoint.Checkpointer(tmp_path / 'new', keep=2)
  with (
    _files_no_larger_than(500_000),
    pytest.raises(OSError, match='There is no earlier checkpoint'),
  ):
    checkpoints.save(1, _large_state(1), {})
    checkpoints.wait()


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 9 MB, where one may mount one."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=9m', 'none', str(folder)]
  try:
    subprocess.run(mount, check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError) as error:
    pytest.skip(f'no file system can be mounted here: {error}')
  yield folder
  subprocess.run(['umount', '--lazy', str(folder)], check=True)


def test_full_disk(small_disk):
  """Two checkpoints of 3 to 4 MB fit into 9 MB, not three."""
  folder = small_disk / 'checkpoints'
  checkpoints = checkpoint.Checkpointer(folder, keep=9)
  message = r'No space left(.|\n)*The checkpoint of step 2 is intact'
  with pytest.raises(OSError, match=message):
    for step in (1, 2, 3):
      checkpoints.save(step, _large_state(step), {'next_index': step})
    checkpoints.wait()
  checkpoints.close()
  assert sorted(path.name for path in folder.iterdir()) == ['1', '2']
  state, _ = _restore(folder, _large_state(0))
  _assert_identical(state, _large_state(2))

  # With room made, it goes on.
  shutil.rmtree(folder / '1')
  checkpoints = checkpoint.Checkpointer(folder, keep=9)
  checkpoints.save(3, _large_state(3), {'next_index': 3})
  checkpoints.close()
  state, _ = _restore(folder, _large_state(0))
  _assert_identical(state, _large_state(3))


_SAVE_FOR_EVER = """
import itertools, pathlib, sys
from tests.runtime import checkpoint_test
from nfnets_jax.runtime import checkpoint

checkpoints = checkpoint.Checkpointer(pathlib.Path(sys.argv[1]), keep=2)
start = checkpoints.latest_step
if start is not None:
  state, _ = checkpoints.restore(checkpoint_test._large_state(0))
  assert int(state.step) == start
for step in itertools.count((start or 0) + 1):
  checkpoints.save(step, checkpoint_test._large_state(step), {'step': step})
  checkpoints.wait()
  print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_while_it_writes(tmp_path):
  """Five times, each time while a checkpoint is half written."""
  root = pathlib.Path(__file__).parents[2]
  printed = 0
  for _ in range(5):
    with subprocess.Popen(
      [sys.executable, '-c', _SAVE_FOR_EVER, str(tmp_path)],
      cwd=root,
      stdout=subprocess.PIPE,
      text=True,
    ) as process:
      try:
        for _ in range(2):
          printed = int(process.stdout.readline())
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob('*.orbax-checkpoint-tmp*')):
          assert time.monotonic() < deadline
      finally:
        process.kill()
      printed = max([printed, *map(int, process.stdout.read().split())])
    assert len(list(tmp_path.glob('*.orbax-checkpoint-tmp*'))) <= 1
    checkpoints = checkpoint.Checkpointer(tmp_path, keep=2)
    assert checkpoints.latest_step in (printed, printed + 1)
    state, loader_state = checkpoints.restore(_large_state(0))
    _assert_identical(state, _large_state(checkpoints.latest_step))
    assert loader_state == {'step': checkpoints.latest_step}
