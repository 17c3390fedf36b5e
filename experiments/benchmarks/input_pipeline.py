r"""Compares the input pipeline with the same in tensorflow, on photographs.

  python -m experiments.benchmarks.input_pipeline --data_dir=DIR
  python -m experiments.benchmarks.input_pipeline --tar=ILSVRC2012_img_train.tar

An image is two photographs, each decoded, cropped, resized and flipped, then
mixed and augmented by RandAugment 4x10: by the bare pipeline, through the
loader, and by `tf.data` with the same operations. Also timed are a single
photograph up to its flip, each stage of the bare pipeline, and an image of 16
pixels in memory (`pad_2`, flip, mix). JPEGs are in memory, so no disk counts.

All alternate, and ratios are taken per round. Each starts with two batches to
warm up, and prefetches nothing beyond its own time.
"""

import contextlib
import functools
import itertools
import json
import os
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np
from absl import app, flags

from experiments.benchmarks import timing
from nfnets_jax import paths
from nfnets_jax.data import (
  datasets,
  decode,
  loader,
  mixing,
  randaugment,
  transforms,
  workers,
)

_NAME = flags.DEFINE_string('name', 'imagenet2012', 'A prepared data set.')
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Folder of the data sets.')
_TAR = flags.DEFINE_string(
  'tar', None, 'A tar of JPEGs, or of tars of JPEGs, instead of a data set.'
)
_IMAGES = flags.DEFINE_integer('images', 256, 'Number of photographs.')
_SIZE = flags.DEFINE_integer('image_size', 224, 'Pixels.')
_BATCH = flags.DEFINE_integer('batch', 32, 'Batch size.')
_REPEATS = flags.DEFINE_integer('repeats', 7, 'Timed rounds.')
_THREADS = flags.DEFINE_multi_integer(
  'threads', None, 'Numbers of workers (default: 1 and the number of cores).'
)
_CPU_TIME = flags.DEFINE_bool(
  'cpu_time', False, 'CPU time of one thread, for a busy machine.'
)
_TENSORFLOW = flags.DEFINE_bool('tensorflow', True, 'Time tf.data too.')
_OUTPUT = flags.DEFINE_string('output', None, 'A JSON file for the figures.')

_ALPHA = 0.2
_POLICY = '4x10'

Batches = Callable[[], Iterator[Any]]


def read_tar(file: IO[bytes]) -> Iterator[bytes]:
  """Yields the files in a tar and in the tars in it."""
  with tarfile.open(fileobj=file) as tar:
    for member in tar:
      if (inner := tar.extractfile(member)) is not None:
        if member.name.endswith('.tar'):
          yield from read_tar(inner)
        else:
          yield inner.read()


def read_photos() -> list[bytes]:
  """Reads the JPEGs that the flags choose."""
  if _TAR.value:
    with paths.existing(_TAR.value, '--tar', 'file').open('rb') as file:
      photos = list(read_tar(file))[: _IMAGES.value]
  else:
    dataset = datasets.load(_NAME.value, 'train', _DATA_DIR.value)
    count = min(_IMAGES.value, len(dataset))
    photos = [dataset.source[i]['image'] for i in range(count)]
  if not photos or not all(isinstance(x, bytes) for x in photos):
    raise app.UsageError('the data set has no encoded images')
  return photos


def bare_batches(photos: list[bytes], mixed: bool) -> Iterator[np.ndarray]:
  """Yields batches of mixed images, or of photographs up to their flip."""
  plain = transforms.train_transform(_SIZE.value)
  make = _mixed_transform() if mixed else plain
  rng = np.random.default_rng(0)

  def read(index: int) -> list[transforms.Example]:
    example = {'image': photos[index % len(photos)], 'label': 0}
    return [transforms.decode_example(example)]

  def image(index: int) -> np.ndarray:
    first = read(index)
    second = read(index + 1) if mixed else first
    uniform = rng.random((1, transforms.NUM_DRAWS))
    return make(first, second, uniform, np.array([index]))['image']

  for start in itertools.count(step=_BATCH.value):
    indices = range(start, start + _BATCH.value)
    yield np.concatenate([image(index) for index in indices])


def _mixed_transform() -> transforms.TrainTransform:
  return transforms.train_transform(
    _SIZE.value, mixup_alpha=_ALPHA, cutmix=True, rand_augment=_POLICY
  )


def loader_batches(
  photos: list[bytes], threads: int, worker_type: workers.WorkerType
) -> loader.Batches:
  """Returns the loader's batches of images."""
  return loader.train_batches(
    _dataset(photos),
    batch_size=_BATCH.value,
    transform=_mixed_transform(),
    partners=True,
    seed=0,
    num_workers=threads if threads > 1 else 0,
    worker_type=worker_type,
  )


def _dataset(images: Any) -> datasets.Dataset:
  source = [{'image': image, 'label': 0} for image in images]
  return datasets.Dataset('images', 'train', source, ('image',))


def tensorflow_batches(
  photos: list[bytes], threads: int, mixed: bool
) -> Iterator[np.ndarray]:
  """Yields the same as `bare_batches`, by tf.data."""
  from experiments.benchmarks import tf_pipeline

  policy = randaugment.parse_policy(_POLICY)[:2]
  return tf_pipeline.batches(
    photos,
    batch_size=_BATCH.value,
    image_size=_SIZE.value,
    threads=threads,
    mixup_alpha=_ALPHA if mixed else None,
    cutmix=mixed,
    policy=policy if mixed else None,
  )


def contenders(photos: list[bytes], threads: int) -> dict[str, Batches]:
  """Returns functions that create batches, by name."""
  load = functools.partial(loader_batches, photos, threads)
  peer = functools.partial(tensorflow_batches, photos, threads)
  if threads > 1:
    result: dict[str, Batches] = {
      'loader, threads': lambda: load('threads'),
      'loader, processes': lambda: load('processes'),
      'tf.data': lambda: peer(True),
    }
  else:
    result = {
      'photographs alone': lambda: bare_batches(photos, False),
      'pipeline': lambda: bare_batches(photos, True),
      'loader': lambda: load('threads'),
      'tf.data, photographs': lambda: peer(False),
      'tf.data': lambda: peer(True),
    }
  if not _TENSORFLOW.value:
    return {k: v for k, v in result.items() if not k.startswith('tf.data')}
  return result


def clock() -> float:
  """Returns wall or CPU seconds."""
  return time.process_time() if _CPU_TIME.value else time.perf_counter()


def rate(make: Batches, num_batches: int, threads: int) -> float:
  """Returns images per second and core, after two batches to warm up."""
  batches = make()
  with contextlib.ExitStack() as stack:
    if hasattr(batches, 'close'):  # not those of tf.data
      stack.callback(batches.close)
    for _ in range(2):
      next(batches)
    began = clock()
    for _ in range(num_batches):
      next(batches)
    return num_batches * _BATCH.value / (clock() - began) / threads


def compare(photos: list[bytes], threads: int) -> dict[str, Any]:
  """Times all contenders alternately and prints a table."""
  num_batches = max(1, len(photos) // _BATCH.value)
  measures = {
    name: functools.partial(rate, make, num_batches, threads)
    for name, make in contenders(photos, threads).items()
  }
  rates = timing.in_turn(measures, _REPEATS.value)
  print(f'\n{threads} thread{"s" * (threads > 1)}, images/s a core')
  print(f'{"":22}{"median":>10}{"min":>9}{"max":>9}')
  for name, values in rates.items():
    print(f'{name:22}{timing.columns(values, 0)}')
  ratios = {
    f'{ours} / {theirs}': timing.ratios(rates[ours], rates[theirs])
    for theirs in rates
    for ours in rates
    if theirs.startswith('tf.data') and not ours.startswith('tf.data')
  }
  for name, values in ratios.items():
    print(f'{name}: {timing.spread(values, 2)}')
  return {'images_per_second_per_core': rates, 'ratios': ratios}


def stages(photos: list[bytes]) -> dict[str, float]:
  """Returns the mean milliseconds of each stage of a mixed image."""
  rng = np.random.default_rng(0)
  policy = randaugment.parse_policy(_POLICY)
  plain = transforms.train_transform(_SIZE.value)
  times = []
  for i in range(_REPEATS.value * len(photos)):
    index = np.array([i])
    uniform = rng.random((1, transforms.NUM_DRAWS))
    draws = (uniform, transforms.numbers_of_second(uniform))
    at = [clock()]
    pixels = [decode.decode(photos[(i + j) % len(photos)]) for j in range(2)]
    at.append(clock())
    examples = ([{'image': x, 'label': 0}] for x in pixels)
    first, second = (
      plain(example, example, numbers, index)['image']
      for example, numbers in zip(examples, draws, strict=True)
    )
    at.append(clock())
    numbers = rng.random((1, mixing.NUM_DRAWS))
    images, _ = mixing.mix(first, second, numbers, index, _ALPHA, True)
    at.append(clock())
    randaugment.rand_augment(images[0], uniform[0], policy)
    at.append(clock())
    times.append(np.diff(at))
  # Means, as the times of operations differ by a factor of a hundred.
  names = ('decode', 'crop, resize, flip', 'mix', 'RandAugment')
  return dict(zip(names, (1000 * np.mean(times, 0)).tolist(), strict=True))


def small_images(size: int = 16, count: int = 20_000) -> float:
  """Returns the median microseconds of a small image in memory."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(256, size=(1000, size, size, 3), dtype=np.uint8)
  batch_size = 64
  batches = loader.train_batches(
    datasets.keep_in_memory(_dataset(pixels)),
    batch_size=batch_size,
    transform=transforms.train_transform(
      size, 'pad_2', mixup_alpha=_ALPHA, cutmix=True
    ),
    partners=True,
    seed=0,
    num_workers=0,
  )
  seconds = []
  with contextlib.closing(batches):
    for _ in range(count // batch_size):
      began = clock()
      next(batches)
      seconds.append(clock() - began)
  return 1e6 * statistics.median(seconds) / batch_size


def main(argv: list[str]) -> None:
  del argv
  cores = len(os.sched_getaffinity(0))
  counts = _THREADS.value or ([1] if _CPU_TIME.value else sorted({1, cores}))
  if _CPU_TIME.value and counts != [1]:
    raise app.UsageError('--cpu_time is for --threads=1')
  photos = read_photos()
  kilobytes = statistics.mean(map(len, photos)) / 1000
  print(
    f'{len(photos)} photographs of {kilobytes:.0f} kB to {_SIZE.value} px, '
    f'batch {_BATCH.value}, {_REPEATS.value} rounds'
  )
  results: dict[Any, Any] = {x: compare(photos, x) for x in counts}
  parts = results['milliseconds'] = stages(photos)
  print('\nmilliseconds of an image')
  for name, value in parts.items():
    percent = 100 * value / sum(parts.values())
    print(f'{name:22}{value:9.3f}{percent:8.1f} %')
  small = results['small_microseconds'] = small_images()
  print(f'\nin memory, 16 px: {small:.1f} microseconds an image')
  if _OUTPUT.value:
    path = paths.local(_OUTPUT.value, '--output')
    path.write_text(json.dumps(results, indent=2) + '\n')


if __name__ == '__main__':
  app.run(main)
