"""The input bench runs, in processes of its own for its flags."""

import io
import json
import tarfile

import numpy as np
import pytest

from tests import commands
from tests.experiments.benchmarks import photographs


def write_tar(path, files):
  with tarfile.open(path, 'w') as tar:
    for name, content in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def photo_tar(tmp_path):
  """A tar of a photograph and of a tar of five."""
  first, *others = photographs.make()
  write_tar(
    tmp_path / 'class.tar', {f'{i}.JPEG': x for i, x in enumerate(others)}
  )
  inner = (tmp_path / 'class.tar').read_bytes()
  write_tar(tmp_path / 'all.tar', {'0.JPEG': first, 'class.tar': inner})
  return tmp_path / 'all.tar'


def input_bench(photo_tar, *args):
  output = photo_tar.parent / 'figures.json'
  printed = commands.output(
    'experiments.benchmarks.input_pipeline',
    f'--tar={photo_tar}',
    f'--output={output}',
    '--image_size=32',
    '--batch=2',
    '--repeats=2',
    *args,
  )
  return printed, json.loads(output.read_text())


def check_rates(figures, names):
  assert list(figures['images_per_second_per_core']) == names
  for rates in figures['images_per_second_per_core'].values():
    assert len(rates) == 2 and min(rates) > 0


def test_input_bench_without_tensorflow(photo_tar):
  printed, figures = input_bench(photo_tar, '--notensorflow', '--threads=1')
  assert printed.startswith('6 photographs of')
  assert list(figures) == ['1', 'milliseconds', 'small_microseconds']
  check_rates(figures['1'], ['photographs alone', 'pipeline', 'loader'])
  assert min(figures['milliseconds'].values()) > 0
  assert figures['small_microseconds'] > 0


@pytest.mark.slow
def test_input_bench_with_several_workers(photo_tar):
  _, figures = input_bench(
    photo_tar, '--notensorflow', '--threads=1', '--threads=2'
  )
  check_rates(figures['2'], ['loader, threads', 'loader, processes'])


def test_input_bench_beside_tensorflow(photo_tar):
  pytest.importorskip('tensorflow')
  printed, figures = input_bench(photo_tar, '--threads=1')
  assert 'pipeline / tf.data:' in printed
  rates, ratios = figures['1'].values()
  for ours in 'photographs alone', 'pipeline', 'loader':
    for theirs in 'tf.data', 'tf.data, photographs':
      expected = np.divide(rates[ours], rates[theirs])
      np.testing.assert_allclose(ratios[f'{ours} / {theirs}'], expected)
