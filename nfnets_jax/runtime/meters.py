"""Metrics of the training steps, fetched late, and times of compilations."""

import collections
import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Self

import jax

# Steps whose metrics may still be on their way. The host runs ahead of the
# devices by this much and no further, so a NaN is seen two steps later.
_IN_FLIGHT = 2

# What depends on the machine's speed, and so differs between equal runs.
SPEEDS = ('images_per_second', 'step_seconds', 'data_wait_seconds')

# Metrics whose sum over the steps counts.
_COUNTS = ('skipped', 'nonfinite')


class CompileTimes:
  """Measures how long jax takes to compile what is called while it is entered.

  Attributes:
    trace: seconds of the longest trace, which holds those inside it.
    lower: seconds from there to the compiler's input.
    compile: seconds of the compiler, or of reading what it made before.

  Example:
    >>> with CompileTimes() as times:
    ...   _ = jax.jit(lambda x: x + 1)(1.0)
    >>> times.compile > 0
    True
  """

  def __init__(self) -> None:
    """Has measured nothing yet."""
    self.trace = self.lower = self.compile = 0.0

  def __enter__(self) -> Self:
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def __exit__(self, *exception: object) -> None:
    jax.monitoring.unregister_event_duration_listener(self._listen)

  def _listen(
    self, event: str, duration_secs: float, **kwargs: str | int
  ) -> None:
    del kwargs
    if event.endswith('jaxpr_trace_duration'):
      self.trace = max(self.trace, duration_secs)
    elif event.endswith('jaxpr_to_mlir_module_duration'):
      self.lower += duration_secs
    elif event.endswith('backend_compile_duration'):
      self.compile += duration_secs

  def __str__(self) -> str:
    return (
      f'compiled in {self.compile:.1f} s, after tracing for {self.trace:.1f} '
      f'and lowering for {self.lower:.1f}'
    )


class Window:
  """Collects the metrics of the steps since the last report.

  Fetching a metric waits for its step, so the newest stay on the device until
  the next steps have been started.
  """

  def __init__(
    self,
    images_per_step: int,
    skip_nonfinite: int = 0,
    max_loss: float | None = None,
  ):
    """Starts the clock.

    Args:
      images_per_step: global batch size.
      skip_nonfinite: how many steps in a row may have been left out because
        their gradient was not finite.
      max_loss: the loss of a step above which the run has diverged.
    """
    self._images_per_step = images_per_step
    self._max_loss = math.inf if max_loss is None else max_loss
    self._skip_nonfinite = skip_nonfinite
    self._stop_requested = False
    self._pending: collections.deque = collections.deque()
    self._fetched: list[dict[str, float]] = []
    self._clock = time.monotonic()
    self._seconds = 0.0
    self._waited = 0.0
    self._timed_steps = 0

  @property
  def stop_requested(self) -> bool:
    """Whether a step that was fetched says that a process asks to stop.

    It is the same in all processes, for they fetch the same steps.
    """
    return self._stop_requested

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts what happens inside as waiting for data."""
    began = time.monotonic()
    try:
      yield
    finally:
      self._waited += time.monotonic() - began

  def push(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Adds the metrics of `step` and fetches those that are due.

    Args:
      step: number of updates made.
      metrics: scalars on the device, `loss` and `grad_norm` among them.

    Raises:
      FloatingPointError: if the loss or the gradient norm of a step is not
        finite, and it was not left out, or the loss is too large; it names the
        step.
    """
    self._pending.append((step, metrics))
    self._timed_steps += 1
    while len(self._pending) > _IN_FLIGHT:
      self._fetch()

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Waits for all steps, and leaves what follows out of the speed.

    Raises:
      FloatingPointError: as `push`.
    """
    self._stop()
    try:
      yield
    finally:
      self._clock = time.monotonic()

  def forget_time(self) -> None:
    """Leaves all steps so far out of the speed; raises as `push`."""
    self._stop()
    self._seconds, self._waited, self._timed_steps = 0.0, 0.0, 0
    self._clock = time.monotonic()

  def summarize(self) -> dict[str, float]:
    """Returns the means and the speed since the last call.

    Returns:
      The mean of each metric over the steps, without those that were left out;
      but the newest learning rate, and the number of examples `skipped` and of
      steps left out as `nonfinite`. If any step was timed, also
      `images_per_second`, `step_seconds` and, of these, `data_wait_seconds`.

    Raises:
      FloatingPointError: as `push`.
    """
    self._stop()
    means: dict[str, float] = {}
    for name in self._fetched[0] if self._fetched else {}:
      values = [metrics[name] for metrics in self._fetched]
      if name in _COUNTS:
        means[name] = round(sum(values))
      elif name == 'learning_rate':  # a mean of it belongs to no step
        means[name] = values[-1]
      elif finite := [x for x in values if math.isfinite(x)]:
        means[name] = sum(finite) / len(finite)
    if self._timed_steps:
      step_seconds = self._seconds / self._timed_steps
      means['images_per_second'] = self._images_per_step / step_seconds
      means['step_seconds'] = step_seconds
      means['data_wait_seconds'] = self._waited / self._timed_steps
    self._fetched = []
    self.forget_time()
    return means

  def _stop(self) -> None:
    while self._pending:
      self._fetch()
    self._seconds += time.monotonic() - self._clock

  def _fetch(self) -> None:
    step, on_device = self._pending.popleft()
    metrics = {k: float(v) for k, v in jax.device_get(on_device).items()}
    self._stop_requested |= metrics.pop('stop', 0.0) > 0
    in_a_row = metrics.pop('nonfinite_in_a_row', None)
    for name in ('loss', 'grad_norm'):
      if not math.isfinite(metrics[name]):
        if in_a_row is None:
          raise FloatingPointError(f'{name} is {metrics[name]} at step {step}')
        if in_a_row > self._skip_nonfinite:
          raise FloatingPointError(
            f'{name} is {metrics[name]} at step {step}, number {in_a_row:.0f} '
            f'in a row; optimizer.skip_nonfinite allows '
            f'{self._skip_nonfinite}'
          )
    # An infinite one is here only if its step was left out.
    if self._max_loss < metrics['loss'] < math.inf:
      raise FloatingPointError(
        f'loss is {metrics["loss"]:g} at step {step}, above max_loss '
        f'{self._max_loss:g}'
      )
    self._fetched.append(metrics)
