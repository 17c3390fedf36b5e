r"""Times the input pipeline beside the same in tensorflow, on photographs.

  python -m experiments.benchmarks.input_pipeline --data_dir=DIR
  python -m experiments.benchmarks.input_pipeline --tar=ILSVRC2012_img_train.tar

Decode, random crop, resize and flip, per image that comes out: by the bare
transform, through the loader, by `tf.data`, and by `tf.data` with RandAugment
4x10, which the released pipeline does on the host too, and this one on the
device. The JPEGs lie in memory, so that no disk counts.

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
from nfnets_jax.data import datasets, loader, transforms

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

_POLICY = (4, 10)

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
  transform = transforms.train_transform(_SIZE.value)
  dataset = datasets.Dataset(
    name='photos',
    split='train',
    source=[{'image': photo, 'label': 0} for photo in photos],
    class_names=('photo',),
  )

  def bare() -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    place = 0
    while True:
      images = [
        transform(dataset.source[i % len(photos)], rng)['image']
        for i in range(place, place + _BATCH.value)
      ]
      place += _BATCH.value
      yield np.stack(images)

  def load(worker_type: loader.WorkerType) -> Iterator[Any]:
    return loader.train_batches(
      dataset,
      batch_size=_BATCH.value,
      transform=transform,
      seed=0,
      num_workers=threads if threads > 1 else 0,
      worker_type=worker_type,
    )

  found: dict[str, Batches] = {}
  if threads == 1:
    found = {'transform': bare, 'loader': lambda: load('threads')}
  else:
    found['loader, threads'] = lambda: load('threads')
    found['loader, processes'] = lambda: load('processes')
  if _TENSORFLOW.value:
    from experiments.benchmarks import tf_pipeline

    def released(policy: tuple[int, int] | None) -> Iterator[Any]:
      return tf_pipeline.batches(
        photos,
        batch_size=_BATCH.value,
        image_size=_SIZE.value,
        threads=threads,
        policy=policy,
      )

    found['tf.data'] = lambda: released(None)
    found['tf.data, RandAugment'] = lambda: released(_POLICY)
  return found


def rate(make: Batches, num_batches: int, batch_size: int) -> float:
  """Returns images per second, once what works ahead has no more lead."""
  batches = make()
  with contextlib.ExitStack() as stack:
    if hasattr(batches, 'close'):
      stack.callback(batches.close)
    for _ in range(2):
      next(batches)
    clock = time.process_time if _CPU_TIME.value else time.perf_counter
    began = clock()
    for _ in range(num_batches):
      next(batches)
    return num_batches * batch_size / (clock() - began)


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
  results = {threads: compare(photos, threads) for threads in counts}
  if _OUTPUT.value:
    paths.expand(_OUTPUT.value, '--output').write_text(
      json.dumps(results, indent=2) + '\n'
    )


if __name__ == '__main__':
  app.run(main)
