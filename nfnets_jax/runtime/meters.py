"""Asynchronously fetched training metrics, and compilation times."""

import collections
import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Self

import jax

# Steps whose metrics are not fetched yet. The host runs at most this far ahead
# of the devices, so a NaN is detected two steps late.
_IN_FLIGHT = 2

# What a run waits for besides its steps.
_WAITS = ('data', 'checkpoint', 'evaluation')

# Metrics that differ between otherwise identical runs.
SPEEDS = (
  'images_per_second',
  'step_seconds',
  'data_wait_seconds',
  *(f'{name}_share' for name in _WAITS),
)

# Metrics that are summed over steps.
_COUNTS = ('skipped', 'nonfinite')


class CompileTimes:
  """Measures jax compilation time while it is entered.

  Attributes:
    trace: seconds of the longest trace, including nested ones.
    lower: seconds of lowering to the compiler's input.
    compile: seconds of compilation, or of loading from the cache.

  Example:
    >>> with CompileTimes() as times:
    ...   _ = jax.jit(lambda x: x + 1)(1.0)
    >>> times.compile > 0
    True
  """

  def __init__(self) -> None:
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

  Fetching blocks on a step, so the newest metrics stay on the device.
  """

  def __init__(
    self,
    images_per_step: int,
    skip_nonfinite: int = 0,
    max_loss: float | None = None,
  ):
    """Starts the clock.

    `images_per_step` is the global batch size, `skip_nonfinite` the maximum
    consecutive skipped steps, `max_loss` the loss above which a run diverged.
    """
    self._images_per_step = images_per_step
    self._max_loss = math.inf if max_loss is None else max_loss
    self._skip_nonfinite = skip_nonfinite
    self._stop_requested = False
    self._pending: collections.deque = collections.deque()
    self._fetched: list[dict[str, float]] = []
    # Since the last report, and since the first.
    self._waits = dict.fromkeys(_WAITS, 0.0)
    self._all_waits = dict.fromkeys(_WAITS, 0.0)
    self._clock = self._reported = self._began = time.monotonic()
    self._seconds = 0.0
    self._timed_steps = 0

  @property
  def stop_requested(self) -> bool:
    """Whether a fetched step asks to stop; the same in all processes."""
    return self._stop_requested

  @contextlib.contextmanager
  def waiting(self, name: str = 'data') -> Iterator[None]:
    """Counts the time inside as waiting for `name`, one of `_WAITS`."""
    began = time.monotonic()
    try:
      yield
    finally:
      self._waits[name] += time.monotonic() - began

  def push(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Adds the metrics of a step and fetches those that are due.

    `metrics` are scalars on the device, including `loss` and `grad_norm`.
    Raises a FloatingPointError that names the step if either is not finite in a
    step that was not skipped, or the loss exceeds `max_loss`.
    """
    self._pending.append((step, metrics))
    self._timed_steps += 1
    while len(self._pending) > _IN_FLIGHT:
      self._fetch()

  @contextlib.contextmanager
  def paused(self, name: str | None = None) -> Iterator[None]:
    """Waits for all steps and stops the clock; raises like `push`.

    The time inside counts as waiting for `name`, if given.
    """
    self._stop()
    try:
      with self.waiting(name) if name else contextlib.nullcontext():
        yield
    finally:
      self._clock = time.monotonic()

  def forget_time(self) -> None:
    """Excludes all steps so far from the speed; raises like `push`."""
    self._stop()
    self._restart()
    self._all_waits = dict.fromkeys(_WAITS, 0.0)
    self._began = self._clock

  def _restart(self) -> None:
    self._clock = self._reported = time.monotonic()
    self._seconds, self._timed_steps = 0.0, 0
    for name in _WAITS:
      self._all_waits[name] += self._waits[name]
      self._waits[name] = 0.0

  def summarize(self) -> dict[str, float]:
    """Returns mean metrics and speed since the last call; raises like `push`.

    Returns:
      The mean of each metric over the finite steps, except: the latest
      `learning_rate`; the number of examples `skipped`; the number of skipped
      `nonfinite` steps. If any step was timed, also `images_per_second`,
      `step_seconds`, `data_wait_seconds`, a part of `step_seconds`, and the
      fractions of the time since the last call that the run waited for data,
      checkpoints and evaluations: `data_share`, `checkpoint_share` and
      `evaluation_share`.
    """
    self._stop()
    means: dict[str, float] = {}
    for name in self._fetched[0] if self._fetched else {}:
      values = [metrics[name] for metrics in self._fetched]
      if name in _COUNTS:
        means[name] = round(sum(values))
      elif name == 'learning_rate':  # a mean belongs to no step
        means[name] = values[-1]
      elif finite := [x for x in values if math.isfinite(x)]:
        means[name] = sum(finite) / len(finite)
    if self._timed_steps:
      step_seconds = self._seconds / self._timed_steps
      means['images_per_second'] = self._images_per_step / step_seconds
      means['step_seconds'] = step_seconds
      means['data_wait_seconds'] = self._waits['data'] / self._timed_steps
      elapsed = time.monotonic() - self._reported
      for name, seconds in self._waits.items():
        means[f'{name}_share'] = seconds / elapsed
    self._fetched = []
    self._restart()
    return means

  def describe_waits(self) -> str:
    """Returns the shares since `forget_time`, as text."""
    elapsed = time.monotonic() - self._began
    shares = {
      name: 100 * (self._all_waits[name] + self._waits[name]) / elapsed
      for name in _WAITS
    }
    return (
      f'of {elapsed:,.0f} s, waited {shares["data"]:.1f} % for data, '
      f'{shares["checkpoint"]:.1f} % for checkpoints and '
      f'{shares["evaluation"]:.1f} % for evaluation'
    )

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
    # An infinite loss here means that the step was skipped.
    if self._max_loss < metrics['loss'] < math.inf:
      raise FloatingPointError(
        f'loss is {metrics["loss"]:g} at step {step}, above max_loss '
        f'{self._max_loss:g}'
      )
    self._fetched.append(metrics)
