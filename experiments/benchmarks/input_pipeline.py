r"""Times the input pipeline beside the same in tensorflow, on photographs.

  python -m experiments.benchmarks.input_pipeline --data_dir=DIR
  python -m experiments.benchmarks.input_pipeline --tar=ILSVRC2012_img_train.tar

Each image that comes out is two photographs, decoded, cropped at random,
resized, flipped and mixed, and then RandAugment 4x10: by the bare pipeline,
through the loader, and by `tf.data` with the same operations. Beside them, one
photograph alone, up to its flip. The JPEGs lie in memory, so that no disk
counts. Then the bare pipeline is timed stage by stage, and what an image of 16
pixels takes that lies in memory, cropped by `pad_2`, flipped and mixed.

All run in turn, and the ratios are taken round by round. In its turn each makes
two batches to get going, and then those that are timed; it stops at the end, so
that nothing it makes ahead is made in another's turn.
"""

import contextlib
import io
import json
import os
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import app, flags

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
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Where data sets are kept.')
_SPLIT = flags.DEFINE_string('split', 'train', 'Which part of it.')
_TAR = flags.DEFINE_string(
  'tar', None, 'Read a tar of JPEGs, or of tars of them, instead.'
)
_IMAGES = flags.DEFINE_integer('images', 256, 'Photographs to use.')
_SIZE = flags.DEFINE_integer('image_size', 224, 'Pixels.')
_BATCH = flags.DEFINE_integer('batch', 32, 'Images in a batch.')
_REPEATS = flags.DEFINE_integer('repeats', 7, 'Timed rounds.')
_THREADS = flags.DEFINE_multi_integer(
  'threads', None, 'Workers on either side; one, and one a core, by default.'
)
_CPU_TIME = flags.DEFINE_bool(
  'cpu_time',
  False,
  'On a busy machine: one thread, and its time on a core, not on the wall.',
)
_TENSORFLOW = flags.DEFINE_bool('tensorflow', True, 'Time tf.data too.')
_OUTPUT = flags.DEFINE_string('output', None, 'A JSON file for the figures.')

_ALPHA = 0.2
_POLICY = '4x10'

Batches = Callable[[], Iterator[Any]]


def read_tar(path: str) -> Iterator[bytes]:
  """Yields the files in a tar; a tar inside is opened too."""
  with tarfile.open(path) as tar:
    for member in tar:
      file = tar.extractfile(member)
      if file is None:
        continue
      if not member.name.endswith('.tar'):
        yield file.read()
        continue
      with tarfile.open(fileobj=io.BytesIO(file.read())) as inner:
        for member in inner:
          if (file := inner.extractfile(member)) is not None:
            yield file.read()


def read_photos() -> list[bytes]:
  """Reads as many JPEGs as the flags ask for."""
  if _TAR.value:
    photos = list(read_tar(_TAR.value))[: _IMAGES.value]
  else:
    dataset = datasets.load(_NAME.value, _SPLIT.value, _DATA_DIR.value)
    count = min(_IMAGES.value, len(dataset))
    photos = [dataset.source[i]['image'] for i in range(count)]
  if not photos or not all(isinstance(x, bytes) for x in photos):
    raise app.UsageError('there are no encoded images in the data set')
  return photos


def contenders(photos: list[bytes], threads: int) -> dict[str, Batches]:
  """Returns what makes batches, by name."""
  whole = transforms.train_transform(
    _SIZE.value, mixup_alpha=_ALPHA, cutmix=True, rand_augment=_POLICY
  )
  plain = transforms.train_transform(_SIZE.value)
  dataset = datasets.Dataset(
    name='photos',
    split='train',
    source=[{'image': photo, 'label': 0} for photo in photos],
    class_names=('photo',),
  )

  def bare(make: transforms.TrainTransform) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    place = 0

    def read(i: int) -> list[transforms.Example]:
      return [transforms.decode_example(dataset.source[i % len(photos)])]

    while True:
      images = []
      for i in range(place, place + _BATCH.value):
        uniform = rng.random((1, transforms.NUM_DRAWS))
        first = read(i)
        second = read(i + 1) if make is whole else first
        images.append(make(first, second, uniform, np.array([i]))['image'])
      place += _BATCH.value
      yield np.concatenate(images)

  def load(worker_type: workers.WorkerType) -> Iterator[Any]:
    return loader.train_batches(
      dataset,
      batch_size=_BATCH.value,
      transform=whole,
      partners=True,
      seed=0,
      num_workers=threads if threads > 1 else 0,
      worker_type=worker_type,
    )

  found: dict[str, Batches] = {}
  if threads == 1:
    found = {
      'photographs alone': lambda: bare(plain),
      'pipeline': lambda: bare(whole),
      'loader': lambda: load('threads'),
    }
  else:
    found['loader, threads'] = lambda: load('threads')
    found['loader, processes'] = lambda: load('processes')
  if _TENSORFLOW.value:
    from experiments.benchmarks import tf_pipeline

    policy = randaugment.parse_policy(_POLICY)

    def released(mixed: bool) -> Iterator[Any]:
      return tf_pipeline.batches(
        photos,
        batch_size=_BATCH.value,
        image_size=_SIZE.value,
        threads=threads,
        mixup_alpha=_ALPHA if mixed else None,
        cutmix=mixed,
        policy=(policy.num_layers, policy.magnitude) if mixed else None,
      )

    if threads == 1:
      found['tf.data, photographs'] = lambda: released(False)
    found['tf.data'] = lambda: released(True)
  return found


def clock() -> float:
  """Seconds, on the wall or on a core."""
  return time.process_time() if _CPU_TIME.value else time.perf_counter()


def rate(make: Batches, num_batches: int, batch_size: int) -> float:
  """Returns images per second, once what works ahead has no more lead."""
  batches = make()
  with contextlib.ExitStack() as stack:
    if hasattr(batches, 'close'):
      stack.callback(batches.close)
    for _ in range(2):
      next(batches)
    began = clock()
    for _ in range(num_batches):
      next(batches)
    return num_batches * batch_size / (clock() - began)


def stages(photos: list[bytes]) -> dict[str, float]:
  """Times the parts of an image, in milliseconds, on average.

  Returns:
    `decode` and `crop, resize, flip` of two photographs, `mix` and
    `RandAugment`.
  """
  rng = np.random.default_rng(0)
  policy = randaugment.parse_policy(_POLICY)
  plain = transforms.train_transform(_SIZE.value)
  times: dict[str, list[float]] = {
    name: [] for name in ('decode', 'crop, resize, flip', 'mix', 'RandAugment')
  }
  for index in range(_REPEATS.value * len(photos)):
    uniform = rng.random((1, transforms.NUM_DRAWS))
    at = [clock()]
    pixels = [
      decode.decode(photos[(index + i) % len(photos)]) for i in range(2)
    ]
    at.append(clock())
    first, second = (
      plain(examples, examples, numbers, np.array([index]))['image']
      for examples, numbers in zip(
        ([{'image': x, 'label': 0}] for x in pixels),
        (uniform, transforms.numbers_of_second(uniform)),
        strict=True,
      )
    )
    at.append(clock())
    numbers = rng.random((1, mixing.NUM_DRAWS))
    images, _ = mixing.mix(
      first, second, numbers, np.array([index]), _ALPHA, True
    )
    at.append(clock())
    randaugment.rand_augment(images[0], uniform[0], policy)
    at.append(clock())
    for name, seconds in zip(times, np.diff(at), strict=True):
      times[name].append(1000 * seconds)
  # Means, as operations differ by a factor of a hundred.
  return {name: statistics.fmean(values) for name, values in times.items()}


def small_images(size: int = 16, count: int = 20_000) -> float:
  """Microseconds of a small image of data in memory, on one core."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(256, size=(1000, size, size, 3), dtype=np.uint8)
  dataset = datasets.keep_in_memory(
    datasets.Dataset(
      name='noise',
      split='train',
      source=[{'image': image, 'label': 0} for image in pixels],
      class_names=('noise',),
    )
  )
  batch_size = 64
  batches = loader.train_batches(
    dataset,
    batch_size=batch_size,
    transform=transforms.train_transform(
      size, 'pad_2', mixup_alpha=_ALPHA, cutmix=True
    ),
    partners=True,
    seed=0,
    num_workers=0,
  )
  with contextlib.closing(batches):
    seconds = []
    for _ in range(count // batch_size):
      began = clock()
      next(batches)
      seconds.append(clock() - began)
  return 1e6 * statistics.median(seconds) / batch_size


def compare(photos: list[bytes], threads: int) -> dict[str, Any]:
  """Times all contenders in turn and prints a table."""
  makers = contenders(photos, threads)
  num_batches = max(1, len(photos) // _BATCH.value)
  rates: dict[str, list[float]] = {name: [] for name in makers}
  for repeat in range(_REPEATS.value + 1):
    for name, make in makers.items():
      speed = rate(make, num_batches, _BATCH.value)
      if repeat:  # the first warms up
        rates[name].append(speed / threads)

  print(
    f'\n{threads} {"threads" if threads > 1 else "thread"}, images/s a core'
  )
  print(f'{"":22}{"median":>9}{"min":>9}{"max":>9}')
  for name, values in rates.items():
    print(
      f'{name:22}{statistics.median(values):9.0f}{min(values):9.0f}'
      f'{max(values):9.0f}'
    )
  ratios: dict[str, list[float]] = {}
  for theirs in rates:
    for ours in rates:
      if theirs.startswith('tf.data') and not ours.startswith('tf.data'):
        pairs = zip(rates[ours], rates[theirs], strict=True)
        values = [a / b for a, b in pairs]
        ratios[f'{ours} / {theirs}'] = values
        print(
          f'{ours} / {theirs}: {statistics.median(values):.2f} '
          f'({min(values):.2f} to {max(values):.2f})'
        )
  return {'images_per_second_per_core': rates, 'ratios': ratios}


def main(argv: list[str]) -> None:
  """Prints the tables."""
  del argv
  photos = read_photos()
  kilobytes = statistics.mean(map(len, photos)) / 1000
  print(
    f'{len(photos)} photographs of {kilobytes:.0f} kB to {_SIZE.value} px, '
    f'batch {_BATCH.value}, {_REPEATS.value} rounds'
  )
  cores = len(os.sched_getaffinity(0))
  counts = _THREADS.value or ([1] if _CPU_TIME.value else sorted({1, cores}))
  if _CPU_TIME.value and counts != [1]:
    raise app.UsageError('--cpu_time is for --threads=1')
  results: dict[Any, Any] = {
    threads: compare(photos, threads) for threads in counts
  }
  parts = results['milliseconds'] = stages(photos)
  total = sum(parts.values())
  print('\nmilliseconds of an image')
  for name, value in parts.items():
    print(f'{name:22}{value:9.3f}{100 * value / total:8.1f} %')
  results['small_microseconds'] = small_images()
  print(
    f'\nin memory, 16 px: {results["small_microseconds"]:.1f} microseconds an '
    'image'
  )
  if _OUTPUT.value:
    paths.expand(_OUTPUT.value, '--output').write_text(
      json.dumps(results, indent=2) + '\n'
    )


if __name__ == '__main__':
  app.run(main)
