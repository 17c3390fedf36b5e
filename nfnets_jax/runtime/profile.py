"""A trace of some training steps, for TensorBoard's profiler.

`pip install tensorboard xprof`, then `tensorboard --logdir=WORKDIR/tensorboard`
and its tab Profile. Process 0 traces its own devices.
"""

import contextlib
import datetime
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Self

import jax

from nfnets_jax import paths
from nfnets_jax.runtime import meters, progress

# Steps before the trace: the first loads the program, and the host needs some
# until it runs ahead of the devices.
WARM_UP = 5


class Profile:
  """Names the steps of a run and, in process 0, traces some of them."""

  def __init__(
    self,
    workdir: paths.Path,
    start: int,
    total_steps: int,
    steps: int,
    window: meters.Window,
  ):
    """Chooses the steps to trace, after `WARM_UP` others.

    Args:
      workdir: the run, whose `tensorboard/plugins/profile` gets the trace.
      start: steps made before.
      total_steps: steps of the whole run.
      steps: number of steps to trace; 0 is off.
      window: of the run, to wait for the last of them.

    Raises:
      ValueError: if the whole run is shorter. A resumed run that is too short
      is not traced.
    """
    if steps and total_steps < WARM_UP + steps:
      raise ValueError(
        f'a profile of {steps} steps takes {WARM_UP + steps}, and the run has '
        f'{total_steps}; lower --profile'
      )
    if steps and total_steps - start < WARM_UP + steps:
      progress.say(f'no profile: only {total_steps - start} steps are left')
      steps = 0
    first = start + WARM_UP + 1
    self._steps = range(first, first + steps)
    self._workdir, self._window = workdir, window
    self._number = start
    self._stack = contextlib.ExitStack()

  @contextlib.contextmanager
  def step(self, number: int) -> Iterator[None]:
    """Names one step, and traces it if it was chosen."""
    traced = jax.process_index() == 0 and number in self._steps
    if traced and number == self._steps[0]:
      with self._window.paused():
        self._stack.enter_context(self._trace())
    self._number = number
    with jax.profiler.StepTraceAnnotation('train', step_num=number):
      yield
    if traced and number == self._steps[-1]:
      with self._window.paused():
        self._stack.close()

  @contextlib.contextmanager
  def _trace(self) -> Iterator[None]:
    """Traces to a local folder, since jax cannot write to a bucket."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # its events would fill the trace
    with tempfile.TemporaryDirectory() as local:
      with jax.profiler.trace(local, profiler_options=options):
        yield
      now = datetime.datetime.now().strftime('%Y_%m_%d_%H_%M_%S')
      folder = self._workdir / 'tensorboard' / 'plugins' / 'profile' / now
      folder.mkdir(parents=True, exist_ok=True)
      for path in pathlib.Path(local).glob('plugins/profile/*/*'):
        (folder / path.name).write_bytes(path.read_bytes())
    progress.say(
      f'profile of steps {self._steps[0]} to {self._number} in {folder}; '
      f'to look at it: pip install tensorboard xprof; tensorboard '
      f'--logdir={self._workdir / "tensorboard"}'
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self._stack.close()  # keeps what a run that ends early has traced
