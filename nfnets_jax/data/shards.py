"""Random access to ArrayRecord files, with bounded memory and open files.

An open file holds 8 bytes for each record and a file descriptor. TFDS keeps all
files open, so 300 million examples need 2.4 GB in every worker, and more files
than most systems allow. Here a process keeps the files that it used last.
"""

import collections
import concurrent.futures
import os
import pathlib
import resource
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

# Memory of all open files of a host. Measured with array_record 0.8.6.
_HOST_BYTES = 768 << 20
_FILE_BYTES = 16 << 10
_RECORD_BYTES = 8

_max_bytes = _HOST_BYTES  # of this process


class Examples:
  """The examples of some ranges of splits; thread-safe, can be pickled."""

  def __init__(
    self,
    info: tfds.core.DatasetInfo,
    parts: Sequence[tuple[str, range]],
    decoders: Mapping[str, Any],
  ):
    """Opens no file.

    Args:
      info: of a data set in ArrayRecord files.
      parts: names of splits and ranges of their examples.
      decoders: of features, as in `tfds.load`.
    """
    self._features = info.features
    self._decoders = decoders
    selected = [_select(info.splits[name], part) for name, part in parts]
    self.files: list[str] = [file for files, _, _ in selected for file in files]
    starts = np.concatenate([starts for _, starts, _ in selected])
    counts = np.concatenate([counts for _, _, counts in selected])
    self._ends = np.cumsum(counts)
    # Add to an index for the record in its file.
    self._shifts = starts + counts - self._ends
    self._readers = _Readers()

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index: int, /) -> dict[str, Any]:
    if not 0 <= index < len(self):
      raise IndexError(f'index {index} is not in [0, {len(self)})')
    file = int(np.searchsorted(self._ends, index, side='right'))
    reader = self._readers.get(self.files[file])
    (record,) = reader.read([index + int(self._shifts[file])])
    return self._features.deserialize_example_np(
      record, decoders=self._decoders
    )

  def check_files(self) -> None:
    """Checks that all files exist, and opens the first and the last.

    Raises a ValueError if one is missing, empty or corrupt.
    """
    files = list(dict.fromkeys(self.files))
    chunks = [files[i : i + 500] for i in range(0, len(files), 500)]
    # In parallel, as a network file system takes a millisecond for each.
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
      bad = [file for some in pool.map(_find_bad, chunks) for file in some]
    if bad:
      raise ValueError(
        f'{len(bad):,} of {len(files):,} files are missing or empty in '
        f'{bad[0].parent}: {", ".join(file.name for file in bad[:3])}'
        f'{", ..." * (len(bad) > 3)}'
      )
    for file in dict.fromkeys([files[0], files[-1]]):
      try:
        self._readers.get(file)
      except Exception as error:  # of types that are not documented
        raise ValueError(f'cannot read {file}: {error}') from error


def _find_bad(files: Sequence[str]) -> list[pathlib.Path]:
  """Returns the files that are missing or empty."""
  bad = []
  for path in map(pathlib.Path, files):
    try:
      size = path.stat().st_size
    except FileNotFoundError:
      size = 0
    if not size:
      bad.append(path)
  return bad


def _select(
  split: tfds.core.SplitInfo, part: range
) -> tuple[list[str], np.ndarray, np.ndarray]:
  """Returns files, their first selected record, and numbers of records."""
  lengths = np.asarray(split.shard_lengths, np.int64)
  begins = np.cumsum(lengths) - lengths
  starts = np.maximum(part.start - begins, 0)
  counts = np.minimum(part.stop - begins, lengths) - starts
  (used,) = np.nonzero(counts > 0)
  template = split.filename_template
  folder, total = os.fspath(template.data_dir), lengths.size
  files = [
    # Much faster than `sharded_filepath`.
    f'{folder}/{template.relative_filepath(shard_index=i, num_shards=total)}'
    for i in used.tolist()
  ]
  return files, starts[used], counts[used]


class _Readers:
  """The open files of a process, the least recently used first."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._bytes = 0
    self._readers: collections.OrderedDict[str, tuple[Any, int]] = (
      collections.OrderedDict()
    )

  def __reduce__(self) -> tuple[type, tuple[()]]:
    return _Readers, ()  # each process opens its own

  def get(self, file: str) -> Any:
    """Returns the reader of a file."""
    with self._lock:
      if file in self._readers:
        self._readers.move_to_end(file)
        return self._readers[file][0]
    reader = array_record_module.ArrayRecordReader(
      file, options='readahead_buffer_size:0', file_reader_buffer_size=32768
    )
    if not reader.ok():
      # If the system refuses it, an OSError: the example is not corrupt.
      pathlib.Path(file).open('rb').close()
      reader.close()  # raises the error of the format
    size = _FILE_BYTES + _RECORD_BYTES * reader.num_records()
    max_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
    with self._lock:
      # Another thread may have opened it too.
      self._bytes += size - self._readers.pop(file, (None, 0))[1]
      self._readers[file] = reader, size
      while len(self._readers) > 1 and (
        self._bytes > _max_bytes or len(self._readers) > max_files
      ):
        # It is closed when the last thread has read from it.
        self._bytes -= self._readers.popitem(last=False)[1][1]
    return reader


def begin_worker(count: int) -> None:
  """Sets the limits of one of `count` worker processes."""
  global _max_bytes
  _max_bytes = _HOST_BYTES // count
  _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
