"""Files of weights: what is written comes back, and what is refused."""

import dataclasses
import json
import os
import pickle
import resource
import subprocess
import sys
import threading
import zipfile

import dill
import haiku as hk
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from nfnets_jax import models, weights
from nfnets_jax.weights import table, writing
from tests import golden as reference


def make(name, num_classes=10, **overrides):
  params, state = table.shapes(name, num_classes, overrides)
  filled = {
    module: {
      leaf: np.asarray(3, np.int32)
      if leaf == 'counter'
      else np.abs(reference.fill(module, leaf, x.shape))
      for leaf, x in leaves.items()
    }
    for module, leaves in state.items()
  }
  params = reference.fill_tree(params)
  return weights.Weights(name, params, filled, overrides)


@pytest.fixture(scope='module', autouse=True)
def traced_once():
  """Traces each net once: that is most of the time of reading a file."""
  shapes, known = table.shapes, {}

  def trace(*arguments):
    key = repr(arguments)
    if key not in known:
      known[key] = shapes(*arguments)
    return jax.tree.map(lambda x: x, known[key])  # a copy

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(table, 'shapes', trace)
    yield


@pytest.fixture(scope='module')
def tiny():
  return make('nfnet_tiny')


def assert_same(a, b):
  assert a.name == b.name
  assert a.overrides == b.overrides
  for x, y in ((a.params, b.params), (a.state, b.state)):
    assert x.keys() == y.keys()
    for module, leaves in x.items():
      assert leaves.keys() == y[module].keys()
      for leaf, value in leaves.items():
        found = y[module][leaf]
        assert found.dtype == (np.int32 if leaf == 'counter' else np.float32)
        np.testing.assert_array_equal(found, value)


def rewritten(path, change):
  """Changes the tensors of a file, and returns them."""
  with safetensors.safe_open(path, 'numpy') as file:
    about = file.metadata()
  tensors = change(safetensors.numpy.load_file(path))
  path.unlink()
  safetensors.numpy.save_file(tensors, path, about)
  return tensors


@pytest.mark.parametrize(
  ('form', 'ending'),
  [('haiku', 'npz'), ('haiku', 'safetensors'), ('released', 'npz')],
)
@pytest.mark.parametrize('name', [None, 'nfnet_tiny'])
def test_comes_back_to_the_bit(tmp_path, tiny, form, ending, name):
  path = tmp_path / f'new/tiny.{ending}'
  weights.write(path, tiny, form)
  assert_same(weights.read(path, name), tiny)
  assert not list(path.parent.glob('*.part'))
  params = weights.load(path, name)
  np.testing.assert_array_equal(
    params['NFNet/~/linear']['w'], tiny.params['NFNet/~/linear']['w']
  )


@pytest.mark.parametrize('ending', ['npz', 'safetensors'])
def test_state_and_overrides_come_back(tmp_path, ending):
  small = make('resnet50', depth=(1,), width=(8,), strides=(1,))
  assert small.state
  path = tmp_path / f'small.{ending}'
  weights.write(path, small)
  assert_same(weights.read(path), small)
  with pytest.raises(ValueError, match='has state'):
    weights.load(path)


NAMES = ('cat', 'Hund – größer', 'line\u2028separator', *'0123456')


@pytest.mark.parametrize(
  ('form', 'ending'),
  [
    ('haiku', 'npz'),
    ('haiku', 'safetensors'),
    pytest.param('timm', 'safetensors', marks=pytest.mark.thorough),
  ],
)
def test_images_and_classes_come_back(tmp_path, tiny, form, ending):
  facts = {'image_size': 48, 'crop': 'crop_resize', 'class_names': NAMES}
  path = tmp_path / f'tiny.{ending}'
  weights.write(path, dataclasses.replace(tiny, **facts), form)
  found = weights.read(path)
  assert_same(found, tiny)
  assert {k: getattr(found, k) for k in facts} == facts
  path = tmp_path / f'plain.{ending}'
  weights.write(path, tiny, form)
  found = weights.read(path)
  assert (found.image_size, found.crop, found.class_names) == (None,) * 3


@pytest.mark.parametrize(
  ('facts', 'message'),
  [
    ({'class_names': ('cat', 'dog')}, 'are 2 class names, but 10 classes'),
    ({'class_names': ('cat', '', *NAMES[2:])}, 'must hold strings'),
    ({'class_names': (*range(10),)}, 'must hold strings'),
    ({'image_size': 0}, 'image_size is 0'),
    ({'image_size': '48'}, "image_size is '48'"),
    ({'crop': ''}, "crop is ''"),
  ],
)
def test_impossible_facts_are_refused(tmp_path, tiny, facts, message):
  path = tmp_path / 'tiny.npz'
  with pytest.raises(ValueError, match=message):
    weights.write(path, dataclasses.replace(tiny, **facts))
  about = {'model': 'nfnet_tiny', 'overrides': '{}'}
  about |= {k: v if k == 'crop' else json.dumps(v) for k, v in facts.items()}
  np.savez(
    path,
    __nfnets_jax__=np.asarray(json.dumps(about).encode()),
    **flat(tiny.params),
  )
  with pytest.raises(ValueError, match=message) as error:
    weights.read(path)
  assert str(path) in str(error.value)


def test_metadata_of_others_are_not_ours(tmp_path, tiny):
  path = tmp_path / 'tiny.safetensors'
  about = {'image_size': '(3, 48, 48)', 'crop': '0.9', 'class_names': 'many'}
  safetensors.numpy.save_file(flat(tiny.params), path, about)
  assert weights.read(path).image_size is None


@pytest.mark.parametrize('mask', [0o022, 0o027, 0o077])
@pytest.mark.parametrize('ending', ['npz', 'safetensors'])
def test_permissions_follow_the_umask(tmp_path, tiny, ending, mask):
  before = os.umask(mask)
  try:
    path = tmp_path / f'tiny.{ending}'
    weights.write(path, tiny)
  finally:
    os.umask(before)
  assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_of_two_writers_one_wins(tmp_path):
  path = tmp_path / 'x'
  barrier, outcomes = threading.Barrier(2), []

  def write(content):
    try:
      with writing.new_file(path) as partial:
        barrier.wait(10)
        partial.write_bytes(content)
        barrier.wait(10)
      outcomes.append(content)
    except FileExistsError as error:
      outcomes.append(str(error))

  threads = [threading.Thread(target=write, args=[x]) for x in (b'1', b'22')]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert path.read_bytes() in outcomes
  assert f'{path} already exists; choose another name' in outcomes
  assert list(tmp_path.iterdir()) == [path]


def test_where_there_are_no_links(tmp_path, tiny, monkeypatch):
  def link(source, target):
    raise PermissionError

  monkeypatch.setattr(os, 'link', link)
  path = tmp_path / 'tiny.npz'
  weights.write(path, tiny)
  assert_same(weights.read(path), tiny)
  other = tmp_path / 'other'

  def comes_first():
    with writing.new_file(other):
      other.write_text('mine')

  with pytest.raises(FileExistsError, match='choose another name'):
    comes_first()
  assert other.read_text() == 'mine'
  assert sorted(tmp_path.iterdir()) == [other, path]


@pytest.mark.parametrize(
  'name', ['lr=[0.1].npz', 'a*b?.safetensors', 'back\\slash.npz', 'ä ö.npz']
)
def test_any_name_of_a_file(tmp_path, tiny, name):
  weights.write(tmp_path / name, tiny)
  assert_same(weights.read(tmp_path / name), tiny)


def test_paths_of_users(tmp_path, tiny, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  weights.write('~/tiny.npz', tiny)
  assert_same(weights.read('~/tiny.npz'), tiny)
  assert 'NFNet/~/linear' in weights.load('~/tiny.npz')
  for path, message in (('', 'path is empty'), ('https://x/y.npz', 'bucket')):
    for do in (weights.read, lambda x: weights.write(x, tiny)):
      with pytest.raises(ValueError, match=message):
        do(path)


@pytest.mark.thorough
@pytest.mark.parametrize('name', ['nfnet_tiny', 'nf_regnet_b0', 'nf_resnet50'])
def test_to_timm_and_back(tmp_path, name):
  from nfnets_jax.weights import timm

  ours = make(name, **timm.overrides(name))
  path = tmp_path / 'timm.safetensors'
  weights.write(path, ours, 'timm')
  assert_same(weights.read(path, name), ours)
  # What has been made something else since is read as it is.
  gain = 'stages.0.0.conv3.gain'
  tensors = rewritten(path, lambda x: {**x, gain: x[gain] + 1})
  changed = weights.read(path, name)
  module = next(m for m in ours.params if m.endswith('block/~/conv2'))
  assert np.all(changed.params[module]['gain'] > ours.params[module]['gain'])
  back = timm.to_timm(changed.params, changed.state, name)
  for key, x in tensors.items():
    np.testing.assert_allclose(back[key], x, rtol=2e-7, err_msg=key)


def test_what_timm_does_not_compute_names_the_fields(tmp_path, tiny):
  changes = {'activation': 'relu', 'strides': (1, 2, 1), 'drop_rate': 0.9}
  net = dataclasses.replace(tiny, overrides={**tiny.overrides, **changes})
  path = tmp_path / 'tiny.safetensors'
  fields = "'--config.model.strides=.1, 2, 2.' --config.model.activation=gelu$"
  with pytest.raises(ValueError, match=f'another net .* train with {fields}'):
    weights.write(path, net, 'timm')
  assert not path.exists()


@pytest.mark.thorough
def test_folded_is_plain_convolutions(tmp_path, tiny):
  path = tmp_path / 'folded.npz'
  weights.write(path, tiny, folded=True)
  with np.load(path) as file:
    arrays = {k: file[k] for k in file.files if not k.startswith('__')}
  params = {}
  for key, x in arrays.items():
    module, _, leaf = key.rpartition('/')
    params.setdefault(module, {})[leaf] = x
    assert leaf != 'gain'

  def forward(images, standardized=False):
    net = models.create('nfnet_tiny', 10, standardized=standardized)
    return net(images, is_training=False)

  net = hk.transform(forward)
  images = reference.image(2, 32)
  folded = net.apply(params, None, images, standardized=True)['logits']
  plain = jax.jit(net.apply)(tiny.params, None, images)['logits']
  np.testing.assert_allclose(folded, plain, atol=1e-5)
  with pytest.raises(ValueError, match='these are folded weights'):
    weights.read(path)


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize('ending', ['npz', 'safetensors', 'pickle'])
def test_half_precision_is_widened(tmp_path, tiny, dtype, ending):
  half = {
    m: {k: np.asarray(x, dtype) for k, x in v.items()}
    for m, v in tiny.params.items()
  }
  flat = {f'{m}/{k}': x for m, v in half.items() for k, x in v.items()}
  path = tmp_path / f'half.{ending}'
  match ending:
    case 'npz':
      np.savez_compressed(path, **flat)
    case 'safetensors':
      safetensors.numpy.save_file(flat, path)
    case 'pickle':
      path.write_bytes(dill.dumps(half))
  found = weights.load(path, 'nfnet_tiny')
  for module, leaves in half.items():
    for leaf, x in leaves.items():
      assert found[module][leaf].dtype == np.float32
      np.testing.assert_array_equal(found[module][leaf], x.astype(np.float32))


def flat(tree):
  return {
    f'{m}/{k}': np.asarray(x) for m, v in tree.items() for k, x in v.items()
  }


def save(path, tree):
  if path.suffix == '.npz':
    np.savez(path, **flat(tree))
  elif path.suffix == '.safetensors':
    safetensors.numpy.save_file(flat(tree), path)
  else:
    path.write_bytes(pickle.dumps(tree, protocol=4))


def edited(tree, module, **leaves):
  return {**tree, module: {**tree[module], **leaves}}


@pytest.mark.parametrize('ending', ['npz', 'safetensors', 'pickle'])
@pytest.mark.parametrize(
  ('leaves', 'message'),
  [
    ({'b': np.full(10, np.nan, np.float32)}, '10 of 10 numbers .* not finite'),
    ({'b': np.zeros(10)}, 'float64; weights are .*astype'),
    ({'b': np.zeros(10, np.int32)}, 'int32; weights are'),
    (
      {'w': np.zeros((3, 10), np.float32)},
      r'(?s)wrong shape: .*linear w \(3, 10\)',
    ),
    ({'x': np.zeros(1, np.float32)}, '(?s)surplus: .*linear x'),
  ],
)
@pytest.mark.parametrize('name', [None, 'nfnet_tiny'])
def test_wrong_content(tmp_path, tiny, ending, leaves, message, name):
  path = tmp_path / f'wrong.{ending}'
  save(path, edited(tiny.params, 'NFNet/~/linear', **leaves))
  with pytest.raises(ValueError, match=message) as error:
    weights.read(path, name)
  assert str(error.value).startswith(str(path))


def test_missing_and_wrong_variant(tmp_path, tiny):
  path = tmp_path / 'tiny.pickle'
  save(path, tiny.params)
  with pytest.raises(
    ValueError, match=r'(?s)those of nfnet_f0:.*wrong shape: parameter'
  ):
    weights.load(path, 'nfnet_f0')
  with pytest.raises(ValueError, match="'nfnet_f9'"):
    weights.load(path, 'nfnet_f9')
  less = {m: v for m, v in tiny.params.items() if 'final_conv' not in m}
  save(path, less)
  with pytest.raises(ValueError, match=r'missing: .*final_conv bias \(512,\)'):
    weights.load(path)
  save(path, {'Other/~/linear': {'w': np.zeros(3, np.float32)}})
  with pytest.raises(ValueError, match=r"of no known family.*'Other'"):
    weights.load(path)
  save(path, {'NFNet/~/linear': {'w': np.zeros(3, np.float32)}})
  with pytest.raises(ValueError, match='0 blocks'):
    weights.load(path)


def test_a_failed_write_leaves_nothing(tmp_path, tiny, monkeypatch):
  described = dataclasses.replace(tiny, image_size=48, crop='crop_resize')
  path = tmp_path / 'tiny.npz'

  def dump(*arguments, **options):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(pickle, 'dump', dump)
    with pytest.raises(OSError, match='No space'):
      weights.write(path, described, 'released')
  assert not list(tmp_path.iterdir())
  weights.write(path, described, 'released')
  assert weights.read(path).image_size == 48


def test_nothing_is_overwritten(tmp_path, tiny):
  path = tmp_path / 'tiny.npz'
  path.write_text('mine')
  with pytest.raises(FileExistsError, match='choose another name'):
    weights.write(path, tiny)
  assert path.read_text() == 'mine'
  with pytest.raises(ValueError, match='must end in .safetensors'):
    weights.write(tmp_path / 'tiny.npz', tiny, 'timm')
  with pytest.raises(ValueError, match='is none of'):
    weights.write(tmp_path / 'tiny.npz', tiny, 'other')


def test_unreadable(tmp_path):
  with pytest.raises(FileNotFoundError):
    weights.load(tmp_path / 'none.npz')
  path = tmp_path / 'empty.npz'
  path.touch()
  with pytest.raises(ValueError, match='is empty; download it again'):
    weights.load(path)


@pytest.mark.parametrize(
  'about',
  [
    b'[]',
    b'"x"',
    b'{',
    b'{"model": "nfnet_tiny"}',
    b'{"model": "nfnet_tiny", "overrides": "[]"}',
    b'{"model": "nfnet_tiny", "overrides": "{\\"width\\": 3}"}',
    b'{"model": 7, "overrides": "{}"}',
  ],
)
def test_damaged_description(tmp_path, tiny, about):
  path = tmp_path / 'tiny.npz'
  arrays = flat(tiny.params)
  np.savez(path, __nfnets_jax__=np.asarray(about), **arrays)
  try:
    found = weights.read(path)
  except ValueError as error:
    assert str(path) in str(error)
  else:  # it said nothing, and the arrays speak for themselves
    assert about in (b'[]', b'"x"')
    assert_same(found, tiny)


def test_checkpoint_of_pytorch(tmp_path):
  path = tmp_path / 'net.pth'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('net/data.pkl', b'\x80\x02.')
  with pytest.raises(ValueError, match='safetensors.torch.save_file'):
    weights.load(path)


def bomb(path):
  """250 MB of zeros in each of four members, compressed to one."""
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    for i in range(4):
      with archive.open(f'NFNet/~/linear/{"wbcd"[i]}.npy', 'w') as file:
        header = {
          'descr': '<f4',
          'fortran_order': False,
          'shape': (62_500_000,),
        }
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(250):
          file.write(bytes(1_000_000))


def lying(path):
  """A header that asks for 4 TB."""
  header = {'descr': '<f4', 'fortran_order': False, 'shape': (10**12,)}
  with (
    zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive,
    archive.open('NFNet/~/linear/b.npy', 'w') as file,
  ):
    np.lib.format.write_array_header_1_0(file, header)


@pytest.mark.thorough
@pytest.mark.parametrize(
  ('make_file', 'message'),
  [(bomb, '0 blocks'), (lying, 'and its header says 4000000000128')],
)
def test_bombs_in_bounded_memory_and_time(tmp_path, make_file, message):
  path = tmp_path / 'bomb.npz'
  make_file(path)
  code = (
    'import sys, time; from nfnets_jax import weights\n'
    'start = time.process_time()\n'
    'try: weights.load(sys.argv[1])\n'
    'except ValueError as error: print(error)\n'
    'status = open("/proc/self/status").read()\n'
    'print(status.split("VmHWM:")[1].split()[0], '
    'time.process_time() - start)'
  )
  argv = [sys.executable, '-c', code, str(path)]
  done = subprocess.run(argv, capture_output=True, text=True, check=True)
  *error, figures = done.stdout.splitlines()
  assert message in '\n'.join(error)
  kilobytes, seconds = map(float, figures.split())
  assert kilobytes < 2**20
  assert seconds < 5


@pytest.mark.parametrize('ending', ['npz', 'safetensors', 'pickle'])
def test_mutations_are_refused_or_harmless(tmp_path, ending, monkeypatch):
  """Never anything but weights or a ValueError, and never a call."""
  small = {'width': (8,), 'depth': (1,), 'strides': (1,), 'group_width': (4,)}
  small |= {'stem_width': (4,), 'stem_strides': (1,)}
  net = make('nfnet_tiny', 3, **small)
  original = tmp_path / f'valid.{ending}'
  save(original, net.params)
  valid = original.read_bytes()
  rng = np.random.default_rng(0)
  calls = []
  monkeypatch.setattr('os.system', calls.append)
  path = tmp_path / f'mutated.{ending}'
  outcomes = {'read': 0, 'refused': 0}
  limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + 2**19
  for _ in range(700):
    data = bytearray(valid)
    match rng.integers(4):
      case 0:
        for at in rng.integers(len(data), size=rng.integers(1, 9)):
          data[at] = rng.integers(256)
      case 1:  # where the structure is
        for at in rng.integers(min(400, len(data)), size=2):
          data[at] = rng.integers(256)
      case 2:
        del data[rng.integers(len(data)) :]
      case 3:
        start, stop = sorted(rng.integers(len(data), size=2))
        data[start:stop] = data[start : start + (stop - start) // 2]
    path.write_bytes(data)
    try:
      weights.read(path, 'nfnet_tiny', **small)
      outcomes['read'] += 1
    except ValueError:
      outcomes['refused'] += 1
  assert outcomes['refused'] > 350
  assert not calls
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < limit


def test_released_digests_are_of_the_table(golden):
  """What `table` expects is what the released files hold."""
  families = json.loads((golden / 'families.json').read_text())
  params, _ = table.shapes('nfnet_f0', 1000, {})
  assert reference.digest(params) in json.dumps(families)
