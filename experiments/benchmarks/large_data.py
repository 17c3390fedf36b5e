"""Measures how the loader starts on hundreds of millions of examples.

    python -m experiments.benchmarks.large_data
    python -m experiments.benchmarks.large_data --workers 1 --batches 8

Each row is a new process that opens the data and reads some batches, from the
start or resumed in the middle of epoch 3, with partners as for mixing. The data
are ArrayRecord files that are links to one file of tiny images: opened, indexed
and read like real ones, but always in the page cache.

Memory is the sum of the peaks of the process and its workers, and what that
adds to the peaks with a single file.
"""

import argparse
import concurrent.futures
import io
import json
import multiprocessing
import os
import pathlib
import re
import tempfile
import time
from typing import Any

import numpy as np
import psutil
import tensorflow_datasets as tfds
from PIL import Image

from experiments.figures import markdown
from nfnets_jax.data import datasets, loader, transforms

_BATCH = 256


class Tiny(tfds.core.GeneratorBasedBuilder):
  """PNGs of eight pixels."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, *, size: int, **kwargs: Any):
    self._size = size
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      'image': tfds.features.Image(shape=(8, 8, 3)),
      'label': tfds.features.ClassLabel(num_classes=10),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager: Any) -> Any:
    del dl_manager
    return {'train': self._generate_examples()}

  def _generate_examples(self) -> Any:
    for i in range(self._size):
      pixels = np.full((8, 8, 3), i % 256, np.uint8)
      Image.fromarray(pixels).save(file := io.BytesIO(), 'PNG')
      yield i, {'image': io.BytesIO(file.getvalue()), 'label': i % 10}


def write(data_dir: pathlib.Path, num_files: int, num_records: int) -> str:
  """Writes a data set of `num_files` equal files, and returns its folder."""
  builder = Tiny(data_dir=data_dir, size=num_records)
  builder.download_and_prepare(file_format='array_record')
  folder = pathlib.Path(builder.data_dir)
  (file,) = folder.glob('*array_record*')
  shard = file.rename(folder / 'shard')
  for i in range(num_files):
    name = f'tiny-train.array_record-{i:05d}-of-{num_files:05d}'
    os.link(shard, folder / name)
  path = folder / 'dataset_info.json'
  info = json.loads(path.read_text())
  info['splits'][0]['shardLengths'] = [str(num_records)] * num_files
  path.write_text(json.dumps(info))
  return str(folder)


def labels(
  first: transforms.Examples, second: transforms.Examples, *numbers: Any
) -> transforms.Batch:
  """A transform that returns the labels alone."""
  del numbers
  pairs = zip(first, second, strict=True)
  return {'label': np.array([[x['label'], y['label']] for x, y in pairs])}


def measure(
  folder: str, num_workers: int, epoch: float, num_batches: int, small: str
) -> dict[str, float]:
  """Reads batches in this process, and returns seconds and bytes.

  Args:
    folder: folder of a data set.
    num_workers: number of threads if 1, else of processes.
    epoch: epoch at which to start.
    num_batches: number of batches.
    small: folder of a small data set, opened first for the imports of TFDS.
  """
  datasets.load(small, 'train')
  began, cpu = time.perf_counter(), time.process_time()
  dataset = datasets.load(folder, 'train')
  opened, opened_cpu = time.perf_counter(), time.process_time()
  batches = loader.train_batches(
    dataset,
    batch_size=_BATCH,
    transform=labels,
    seed=0,
    partners=True,
    num_workers=num_workers,
    worker_type='threads' if num_workers == 1 else 'processes',
  )
  first_batch = int(epoch * len(dataset)) // _BATCH
  batches.set_state({'next_index': first_batch * _BATCH})
  next(batches)
  first = time.perf_counter()
  workers = multiprocessing.active_children()
  processes = [psutil.Process(pid) for pid in (None, *(x.pid for x in workers))]

  def cpu_seconds() -> float:
    times = [x.cpu_times() for x in processes]
    return sum(x.user + x.system for x in times)

  used = cpu_seconds()
  for _ in range(num_batches - 1):
    next(batches)
  used = cpu_seconds() - used
  result = {
    'open': opened - began,
    'open_cpu': opened_cpu - cpu,
    'first_batch': first - opened,
    'read': used / (2 * _BATCH * (num_batches - 1)),
    'peak': sum(map(_peak_bytes, processes)),
    'files': max(x.num_fds() for x in processes),
  }
  batches.close()
  return result


def _peak_bytes(process: psutil.Process) -> int:
  """Returns the peak resident memory of a process."""
  text = pathlib.Path(f'/proc/{process.pid}/status').read_text()
  match = re.search(r'VmHWM:\s+(\d+) kB', text)
  assert match is not None, text
  return 1024 * int(match[1])


def report(args: argparse.Namespace, data_dir: pathlib.Path) -> str:
  """Measures and prints all rows, and returns the table."""
  small = write(data_dir / 'small', 1, args.records)
  large = write(data_dir / 'large', args.files, args.records)
  context = multiprocessing.get_context('spawn')
  rows = []
  for workers in args.workers:
    base = 0.0
    for folder, epoch in [(small, 0.0), *((large, x) for x in args.epochs)]:
      # A new process for each, as peaks do not go down.
      with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        found = pool.submit(
          measure, folder, workers, epoch, args.batches, small
        ).result()
      base = base or found['peak']
      rows.append(
        (
          f'{args.records * (1 if folder == small else args.files):,}',
          workers,
          f'{epoch:g}',
          f'{found["open"]:.2f} ({found["open_cpu"]:.2f})',
          f'{found["first_batch"]:.2f}',
          f'{1000 * found["read"]:.2f}',
          f'{found["peak"] / 2**20:,.0f}',
          f'{(found["peak"] - base) / 2**20:+,.0f}',
          found['files'],
        )
      )
      print(*rows[-1], flush=True)
  head = ['examples', 'workers', 'epoch', 'open (CPU), s', 'first batch, s']
  head += ['CPU ms a read', 'peak, MiB', 'added, MiB', 'open files']
  return markdown.table(head, rows)


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog='python -m experiments.benchmarks.large_data',
    description='Start of the loader on hundreds of millions of examples.',
  )
  parser.add_argument('--files', type=int, default=30_000)
  parser.add_argument(
    '--records', type=int, default=10_000, help='examples in a file'
  )
  parser.add_argument('--workers', type=int, nargs='+', default=[1, 16])
  parser.add_argument(
    '--epochs', type=float, nargs='+', default=[0.0, 3.5], help='where to start'
  )
  parser.add_argument(
    '--batches', type=int, default=40, help=f'batches of {_BATCH}, at least 2'
  )
  args = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as folder:
    print(report(args, pathlib.Path(folder)))


if __name__ == '__main__':
  main()
