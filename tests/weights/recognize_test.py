"""What is not weights is called what it is."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile

import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from nfnets_jax import weights
from nfnets_jax.weights import recognize

CONFIG = {'model': {'name': 'nfnet_tiny'}, 'data': {}, 'optimizer': {}}


def zipped(*names):
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w') as archive:
    for name in names:
      archive.writestr(name, b'x')
  return buffer.getvalue()


def tarred():
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w') as archive:
    archive.addfile(tarfile.TarInfo('F0_haiku.npz'))
  return buffer.getvalue()


def array():
  buffer = io.BytesIO()
  np.save(buffer, np.zeros(3))
  return buffer.getvalue()


def savez():
  buffer = io.BytesIO()
  np.savez(buffer, x=np.zeros(99))
  return buffer.getvalue()


ONE = safetensors.numpy.save({'x': np.zeros(300, np.float32)})
# Written as PyTorch does with _use_new_zipfile_serialization=False.
OLD_PYTORCH = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
LFS = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n'


@pytest.mark.parametrize(
  ('name', 'data', 'message'),
  [
    ('a.npz', LFS, 'git-lfs pointer.*git lfs pull'),
    ('a.npz', b'/annex/objects/MD5-s3--ab.npz\n', 'git-annex pointer'),
    ('a.npz', b'<!DOCTYPE html><html>', 'a web page or XML.*a login'),
    ('a.npz', b'\xef\xbb\xbf\r\n <HTML><body>', 'a web page or XML'),
    ('a.npz', '<html>Sign in</html>'.encode('utf-16'), 'a web page or XML'),
    (
      'a.safetensors',
      b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>',
      'a web page or XML',
    ),
    ('a.npz', b'{"error": {"code": 404}}', 'this is JSON: .*404'),
    ('a.safetensors', b'[{"message": "rate limit"}]', 'this is JSON'),
    ('a.npz', b'', 'is empty; download it again'),
    ('a.npz', b'Not found\n', "this is text: 'Not found'"),
    ('a.npz', 'größer als\n'.encode(), 'this is text'),
    ('a.npz', bytes(range(64)), 'not a recognized weights format'),
    ('a.npz', savez()[:-50], 'this .npz is truncated or corrupt'),
    ('a.safetensors', ONE[:-10], '.safetensors is truncated or corrupt'),
    ('a.safetensors', ONE[:40], '.safetensors is truncated or corrupt'),
    ('a.pth', zipped('net/data.pkl'), 'PyTorch checkpoint.*save_file'),
    ('a.pt', OLD_PYTORCH + b'x', 'PyTorch checkpoint.*save_file'),
    ('a.keras', zipped('config.json', 'model.weights.h5'), 'Keras model'),
    ('a.zip', zipped('F0_haiku.npz'), 'zip archive of F0_haiku.npz; unpack'),
    ('a.h5', b'\x89HDF\r\n\x1a\n\0\0', 'HDF5'),
    ('a.tflite', b'\x1c\0\0\0TFL3\x14\0', 'TensorFlow Lite'),
    ('a.onnx', b'\x08\x07\x12\x07pytorch\x1a\x052.0.0', 'ONNX model'),
    ('model', b'\x08\x07\x12\x07pytorch\x1a\x052.0.0', 'ONNX or TensorFlow'),
    ('saved_model.pb', b'\x08\x01\x12\xe5\x01\0', 'TensorFlow graph'),
    ('m.ckpt.data-00000-of-00001', bytes(99), 'part of a TensorFlow check'),
    ('flax.msgpack', b'\x81\xa6params\x80', 'Flax checkpoint'),
    ('f0.stablehlo', b'<\0\0\x008\0`\0', 'an exported program'),
    ('a.npz.gz', gzip.compress(savez()), 'gzip; unpack it'),
    ('a.npz', bz2.compress(b'x'), 'bzip2; unpack it'),
    ('a.npz', lzma.compress(b'x'), 'xz; unpack it'),
    ('a.tar', tarred(), 'a tar archive; unpack it'),
    ('a.npy', array(), 'a single NumPy array.*numpy.savez'),
    ('a.jpg', b'\xff\xd8\xff\xe0\0\x10JFIF', 'an image'),
  ],
)
def test_other_files(tmp_path, name, data, message):
  path = tmp_path / name
  path.write_bytes(data)
  for take in (weights.locate, weights.read, weights.load):
    with pytest.raises(ValueError, match=message) as error:
      take(path)
    assert str(error.value).startswith(f'{path}: ')


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_are_let_through(tmp_path, protocol):
  path = tmp_path / 'F0_haiku.npz'
  path.write_bytes(pickle.dumps({'net': {'w': np.zeros(2)}}, protocol))
  recognize.check_file(path)
  path.write_bytes(pickle.dumps({}, protocol))
  recognize.check_file(path)


def test_what_is_no_regular_file():
  with pytest.raises(ValueError, match='not a regular file'):
    weights.locate('/dev/null')


def make_run(folder, *steps):
  for step in steps:
    for part in ('state', 'loader', 'fingerprint'):
      (folder / 'checkpoints' / step / part).mkdir(parents=True)
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(CONFIG))
  return folder


def test_folder_of_a_run(tmp_path, monkeypatch):
  run = make_run(tmp_path / 'run', '100')
  assert weights.locate(run) == run
  monkeypatch.chdir(run)
  weights.locate('.')
  with pytest.raises(IsADirectoryError, match='is the folder of a run'):
    weights.read(run)
  for part in ('checkpoints', 'checkpoints/100', 'checkpoints/100/state'):
    with pytest.raises(FileNotFoundError, match=f'part of the run in {run}; '):
      weights.locate(part)
  begun = make_run(tmp_path / 'begun', '1.orbax-checkpoint-tmp')
  with pytest.raises(FileNotFoundError, match='has no checkpoint yet'):
    weights.locate(begun)
  with pytest.raises(FileNotFoundError, match='give one, such as begun, run'):
    weights.locate(tmp_path)
  (run / 'config.json').write_text('{"model": ')
  with pytest.raises(ValueError, match=r'config\.json is corrupt'):
    weights.locate(run)
  with pytest.raises(ValueError, match=r"SRC=.*lr=\[1\] has '\['"):
    weights.locate(make_run(tmp_path / 'lr=[1]', '1'), option='SRC')


@pytest.mark.parametrize(
  ('names', 'message'),
  [
    ([], 'it is empty'),
    (['config.json', 'model.safetensors'], 'weights model.safetensors; '),
    (['F0.npz', 'F1.npz', 'F2.npz', 'F3.npz'], 'F2.npz and 1 more; give the'),
    (['config.json', 'pytorch_model.bin'], 'PyTorch model.*save_file'),
    (['last.ckpt', 'hparams.yaml'], 'PyTorch model'),
    (['saved_model.pb', 'variables/variables.index'], 'SavedModel'),
    (
      ['checkpoint', 'm.index', 'm.data-00000-of-00001'],
      'TensorFlow checkpoint',
    ),
    (['_METADATA', 'manifest.ocdbt', 'd/0'], 'Orbax checkpoint of another'),
    (
      ['0/_CHECKPOINT_METADATA', '0/default/_METADATA'],
      'Orbax checkpoint of another',
    ),
    (['state/a', 'loader/a', 'fingerprint/a'], 'without the config.json of'),
    (['7/state/a', '7/loader/a', '7/fingerprint/a'], 'without the config.json'),
    (['train/cat/1.jpg', 'test/cat/2.jpg'], 'it is a data set'),
    (['cifar10-train.array_record-00000-of-00001'], 'it is a data set'),
    (['config.json'], 'no config.json of a run, but config.json'),
    (['notes.txt'], 'no config.json of a run, but notes.txt'),
  ],
)
def test_other_folders(tmp_path, names, message):
  folder = tmp_path / 'given'
  folder.mkdir()
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"model_type": "x"}')
  for take in (weights.locate, weights.read):
    with pytest.raises(FileNotFoundError, match=message) as error:
      take(folder)
    assert f'{folder} holds no run' in str(error.value)


def test_folder_of_orbax(tmp_path):
  folder = tmp_path / 'params'
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder, {'w': np.zeros(3)})
  with pytest.raises(FileNotFoundError, match='Orbax checkpoint of another'):
    weights.locate(folder)
