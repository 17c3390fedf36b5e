"""Copies checkpoints to a bucket that Orbax cannot write to."""

import concurrent.futures
import tempfile
from collections.abc import Callable

from etils import epath

from nfnets_jax import paths
from nfnets_jax.runtime import files


class Uploader:
  """Uploads checkpoints in the background and removes old ones.

  Attributes:
    local: temporary folder that the checkpoints are written to.
  """

  def __init__(
    self, target: paths.Path, keep: int, steps: Callable[[], list[int]]
  ):
    """Uploads to `target`, of whose `steps` the newest `keep` are kept."""
    self._target = target
    self._keep = keep
    self._steps = steps
    self._folder = tempfile.TemporaryDirectory(prefix='nfnets_jax-')
    self._executor = concurrent.futures.ThreadPoolExecutor(1)
    self._upload: concurrent.futures.Future | None = None
    self.local = epath.Path(self._folder.name)

  def start(self, step: int, wait_until_written: Callable[[], None]) -> None:
    """Uploads a checkpoint once it is written."""

    def upload() -> None:
      wait_until_written()
      target = self._target / str(step)
      if not files.is_committed(target):
        files.upload(self.local / str(step), target)
      for old in self._steps()[: -self._keep]:
        files.remove(self._target / str(old))

    self._upload = self._executor.submit(upload)

  def is_busy(self) -> bool:
    """Returns whether an upload is running."""
    return self._upload is not None and not self._upload.done()

  def wait(self) -> None:
    """Waits for the upload; raises what it raised."""
    if self._upload is not None:
      self._upload.result()

  def close(self) -> None:
    """Waits for the upload and removes the temporary folder."""
    self._executor.shutdown()
    self._folder.cleanup()
