"""The parts of a claim: its runs, their results, and the verdict on them."""

import dataclasses
import functools
import json
import re
import statistics
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import config_dict

from experiments.reproduce.results import Results
from nfnets_jax.runtime import workdir as workdirs
from nfnets_jax.training import config as defaults

Table = Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Run:
  """One training.

  Attributes:
    name: of its folder; claims that ask for the same run share it.
    labels: what a report groups by, such as `net`, `batch` and `seed`. A run
      with the label `part` only prepares others and is not drawn.
    config: of the training.
    after: name of the run whose weights it starts from, or None.
    held_out: a split to evaluate too, for choosing among runs, or None.
  """

  name: str
  labels: Mapping[str, Any]
  config: config_dict.ConfigDict
  after: str | None = None
  held_out: str | None = None


def run_name(scale: str, folder: str, labels: Mapping[str, Any]) -> str:
  """Returns a run's name: the scale, a folder and the labels."""
  parts = []
  for key, value in labels.items():
    text = f'{value:g}' if isinstance(value, float) else str(value)
    text = re.sub(r'[^\w.-]', '_', text)
    parts.append(f'{key}={text}')
  return '/'.join([scale, folder, ','.join(parts)])


def fingerprint(run: Run, results: Results) -> str:
  """Returns a hash of all that determines a run's result.

  Args:
    run: of a claim.
    results: where the fingerprint of the run that it starts from is looked up.

  Returns:
    Eight hexadecimal digits. The location of the data, the workers and fields
    with their default value do not count, so that a new option that is off
    invalidates no result.
  """
  name = run.config.model.name
  difference = workdirs.changes(_default(name), run.config.to_dict())
  fields = {key: new for key, (_, new) in difference.items()}
  before = results.get(run.after) if run.after else None
  text = json.dumps(
    [name, fields, run.held_out, before and before['fingerprint']]
  )
  return f'{zlib.crc32(text.encode()):08x}'


@functools.cache
def _default(model: str) -> dict[str, Any]:
  config = defaults.get_config()
  config.model = defaults.model(model)
  return config.to_dict()


def find(run: Run, results: Results) -> Mapping[str, Any] | None:
  """Returns a run's result; None if there is none for its config."""
  result = results.get(run.name)
  if result is None or result['fingerprint'] != fingerprint(run, results):
    return None
  return result


def rank(runs: Sequence[Run], results: Results) -> list[Run]:
  """Sorts runs by held-out accuracy, best first; [] until all are there."""
  found = [find(run, results) for run in runs]
  scores = {
    run.name: result.get('held_out_top_1') or 0.0
    for run, result in zip(runs, found, strict=True)
    if result is not None
  }
  if len(scores) < len(runs):
    return []
  return sorted(runs, key=lambda run: -scores[run.name])


@dataclasses.dataclass
class Point:
  """The results that differ in the seed alone.

  Comparisons are None if a side has no result. Between seeds they are strict: a
  net beats another if its worst seed is above the other's best.

  Attributes:
    labels: what the runs share.
    top_1: test accuracy of the runs that finished, in %.
    diverged: the steps at which the others diverged.
    by_seed: the accuracy of each seed, None if it diverged.
    curves: the metrics at each evaluation, for each run that has them.
  """

  labels: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  top_1: list[float] = dataclasses.field(default_factory=list)
  diverged: list[int] = dataclasses.field(default_factory=list)
  by_seed: dict[int, float | None] = dataclasses.field(default_factory=dict)
  curves: list[list[Mapping[str, Any]]] = dataclasses.field(
    default_factory=list
  )

  def add(self, result: Mapping[str, Any], seed: int) -> None:
    """Adds the run of a seed."""
    if curve := result.get('curve'):
      self.curves.append(curve)
    if result['status'] == 'finished':
      self.top_1.append(100 * result['top_1'])
      self.by_seed[seed] = self.top_1[-1]
    else:  # after a run that diverged it does not start
      step = re.search(r'at step (\d+)', result['message'])
      self.diverged.append(int(step[1]) if step else 0)
      self.by_seed[seed] = None

  def keep_best(self, count: int) -> 'Point':
    """Returns the best `count` runs; one that diverged is below all others."""
    top_1 = sorted(self.top_1, reverse=True)[:count]
    diverged = self.diverged[: count - len(top_1)]
    return dataclasses.replace(self, top_1=top_1, diverged=diverged)

  @property
  def mean(self) -> float | None:
    """Mean accuracy of the runs that finished, in %."""
    return statistics.fmean(self.top_1) if self.top_1 else None

  @property
  def trains(self) -> bool | None:
    """Whether no seed diverged."""
    return not self.diverged if self.top_1 or self.diverged else None

  @property
  def fails(self) -> bool | None:
    """Whether a seed diverged."""
    return None if self.trains is None else not self.trains

  def beats(self, other: 'Point') -> bool | None:
    """Whether every seed is above every seed of `other`."""
    return self._compare(other, lambda a, b: min(a) > max(b))

  def matches(self, other: 'Point') -> bool | None:
    """Whether not every seed is below every seed of `other`."""
    return self._compare(other, lambda a, b: max(a) >= min(b))

  def _compare(
    self, other: 'Point', above: Callable[[list[float], list[float]], bool]
  ) -> bool | None:
    if self.trains is None or other.trains is None:
      return None
    return self.trains and (not other.trains or above(self.top_1, other.top_1))

  def __str__(self) -> str:
    """Returns the mean, the range, and how many seeds finished or diverged."""
    text = ''
    if self.top_1:
      text = f'{self.mean:.1f}'
      if len(self.top_1) > 1:
        low, high = min(self.top_1), max(self.top_1)
        text += f' ({low:.1f} to {high:.1f}, {len(self.top_1)} seeds)'
    if self.diverged:
      text += f'{"; " if text else ""}{len(self.diverged)} diverged'
    return text


class Statement(NamedTuple):
  """A part of a claim that results can decide.

  Attributes:
    text: what should hold.
    holds: by the batch, net or the like at which it should; None is unknown.
  """

  text: str
  holds: Mapping[Any, bool | None]

  @property
  def verdict(self) -> str:
    """'reproduced', 'partly reproduced', 'not reproduced' or 'incomplete'."""
    return verdict([self])


def verdict(statements: Iterable[Statement]) -> str:
  """Returns one verdict on several statements, as `Statement.verdict`."""
  holds = [x for statement in statements for x in statement.holds.values()]
  if not holds or None in holds:
    return 'incomplete'
  if all(holds):
    return 'reproduced'
  return 'partly reproduced' if any(holds) else 'not reproduced'


class Curve(NamedTuple):
  """The paper's accuracies, to draw over ours.

  Attributes:
    top_1: in %, None where training fails, by the label along x, that by color
      and, where there are panels, that of the panel.
    note: which nets these are.
  """

  top_1: Mapping[tuple[Any, ...], float | None]
  note: str


class Points:
  """Points, and the number of runs without a result."""

  def __init__(self, points: Iterable[Point], missing: int = 0):
    self.points = list(points)
    self.missing = missing

  def select(self, **labels: Any) -> list[Point]:
    """Returns the points with these labels."""
    return [x for x in self.points if labels.items() <= x.labels.items()]

  def at(self, **labels: Any) -> Point:
    """Returns the only point with these labels, or an empty one."""
    points = self.select(**labels)
    return points[0] if len(points) == 1 else Point(labels)

  def best(self, **labels: Any) -> Point:
    """Returns the most accurate point with these labels that trains."""
    points = [x for x in self.select(**labels) if x.trains]
    return max(points, key=lambda x: x.mean or 0.0, default=Point(labels))


class Measured(Points):
  """The results of a claim at a scale.

  Attributes:
    scale: one of `scales.SCALES`.
    points: what is drawn.
    results: all results of the claim, with those that only prepare others.
    missing: number of runs without a result.
  """

  def __init__(self, claim: 'Claim', scale: str, results: Results):
    self.scale = scale
    self.results: list[Mapping[str, Any]] = []
    missing = 0
    points: dict[tuple, Point] = {}
    for run in claim.runs(scale, results):
      result = find(run, results)
      if result is None:
        missing += 1
        continue
      self.results.append(result)
      if 'part' not in run.labels:
        labels = {k: v for k, v in run.labels.items() if k != 'seed'}
        point = points.setdefault(tuple(labels.items()), Point(labels))
        point.add(result, run.config.seed)
    kept = list(points.values())
    if claim.counted is not None and scale == 'paper':
      kept = [x.keep_best(claim.counted) for x in kept]
    super().__init__(kept, missing)


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim of the paper.

  Attributes:
    name: of its make target, `make reproduce-NAME`.
    text: what the paper says.
    source: where.
    runs: returns the runs at a scale, given the results so far; runs that
      depend on results are added when these are there.
    statements: returns what the results are judged by; at `small` they are by
      protocol.py.
    axes: the labels along x and by color.
    panels: the label with one panel for each value, or None.
    paper: returns the paper's curve beside a scale; None has no numbers.
    counted: at `paper`, how many runs of a point count, the best; None counts
      all.
    words: what the paper says beside its numbers, or instead.
    table: the paper's numbers, headings first.
  """

  name: str
  text: str
  source: str
  runs: Callable[[str, Results], list[Run]]
  statements: Callable[[Measured], list[Statement]]
  axes: tuple[str, str]
  panels: str | None = None
  paper: Callable[[str], Curve] | None = None
  counted: int | None = None
  words: str = ''
  table: Table = ()
