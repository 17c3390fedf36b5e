"""What counts as seen, written down before a claim is run at `small`.

`preregistered/NAME.md` says the claim, the setting and why, the seeds and the
statistic, and ends with the same rule in TOML, by which the report judges:

    seeds = 3        # at least, for each side of a comparison
    minutes = 25     # on two idle cores
    paper = ''       # its result, in a few words
    chance = 10.0    # accuracy of a run that diverged, in %
    overfits = {}    # labels of a point that should, whose curve is shown
    [config]         # fields that hold in all runs, by dotted name
    [[hypothesis]]   # the first is the claim's verdict; see `Hypothesis`

Each result keeps the digests of the texts as they were when it was made, so the
report can say that a text has changed since.
"""

import dataclasses
import functools
import math
import re
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scipy import stats

from experiments.reproduce import claim, results

_RULE = re.compile(r'^```toml\n(.*?)^```$', re.DOTALL | re.MULTILINE)

Labels = Mapping[str, Any]


class Interval(NamedTuple):
  """A mean and its 95 % interval; infinitely wide for a single value."""

  mean: float
  low: float
  high: float


def interval(values: Sequence[float]) -> Interval:
  """Returns the mean of independent values and its 95 % t interval.

  Args:
    values: one for each seed; of paired runs, their differences.

  Returns:
    mean ± t · s / √n, with the 97.5 % quantile t of Student's distribution
    with n − 1 degrees of freedom.

  Raises:
    ValueError: if there are no values.

  Example:
    >>> low, high = interval([1.0, 2.0, 3.0])[1:]
    >>> round(low, 2), round(high, 2)
    (-0.48, 4.48)
  """
  if not values:
    raise ValueError('an interval needs at least one value')
  mean = statistics.fmean(values)
  if len(values) == 1:
    return Interval(mean, -math.inf, math.inf)
  error = statistics.stdev(values) / math.sqrt(len(values))
  half = float(stats.t.ppf(0.975, len(values) - 1)) * error
  return Interval(mean, mean - half, mean + half)


class Judgement(NamedTuple):
  """A hypothesis beside the results.

  Attributes:
    verdict: 'seen', 'not seen', 'undecided' or 'incomplete'.
    effect: the mean and its interval, or the runs that fail.
    seeds: number of seeds in it.
  """

  verdict: str
  effect: str
  seeds: int


@dataclasses.dataclass(frozen=True)
class Hypothesis:
  """What should hold, and the rule by which it is seen.

  A comparison has the effect a − b, (a − b) − (c − d) or a alone, by seed. It
  is seen if the whole interval is above `seen_above`, and otherwise not seen if
  the whole interval is below `not_seen_below`. One of failure is seen if all
  runs of `fails`, or none of `trains`, diverge or end below `failed_below`; if
  it is the other way round for all of them, it is not seen.

  Attributes:
    text: what should hold.
    a: labels of a point of the claim; likewise b, c and d.
    seen_above: in points, or in the unit of the claim.
    not_seen_below: likewise.
    fails: labels of the points whose runs should fail.
    trains: labels of those whose runs should not.
    failed_below: test accuracy in %.
    seeds: at least; None is the number of the text.
  """

  text: str
  a: Labels | None = None
  b: Labels | None = None
  c: Labels | None = None
  d: Labels | None = None
  seen_above: float = 0.0
  not_seen_below: float = 0.0
  fails: Labels | None = None
  trains: Labels | None = None
  failed_below: float = 0.0
  seeds: int | None = None

  def __post_init__(self) -> None:
    kinds = [x for x in (self.a, self.fails, self.trains) if x is not None]
    if len(kinds) != 1 or (self.c is None) != (self.d is None):
      raise ValueError(
        f'{self.text!r} needs a (with b, or b, c and d), fails or trains'
      )

  @property
  def rule(self) -> str:
    """The rule in words."""
    if self.a is None:
      verb = 'all fail' if self.fails is not None else 'none fails'
      fail = f'diverge or end below {self.failed_below:g} %'
      return f'{verb}, that is: {fail}'
    return (
      f'seen above {_signed(self.seen_above)}, not seen below '
      f'{_signed(self.not_seen_below)}'
    )

  def judge(
    self, measured: claim.Points, seeds: int, chance: float
  ) -> Judgement:
    """Returns the verdict on the results of a claim.

    Args:
      measured: the results.
      seeds: at least, unless the hypothesis has its own number.
      chance: accuracy of a run that diverged, in %.
    """
    needed = self.seeds or seeds
    if self.a is None:
      return self._judge_failure(measured, needed)
    sides = []
    for labels in (self.a, self.b, self.c, self.d):
      if labels is not None:
        by_seed = measured.at(**labels).by_seed
        sides.append(
          {k: chance if x is None else x for k, x in by_seed.items()}
        )
    common = sorted(set.intersection(*(set(x) for x in sides)))
    if not common:
      return Judgement('incomplete', '', 0)
    signs = (1, -1, -1, 1)
    effects = [
      sum(sign * side[seed] for sign, side in zip(signs, sides, strict=False))
      for seed in common
    ]
    found = interval(effects)
    if len(common) < needed:
      verdict = 'incomplete'
    elif found.low > self.seen_above:
      verdict = 'seen'
    elif found.high < self.not_seen_below:
      verdict = 'not seen'
    else:
      verdict = 'undecided'
    return Judgement(verdict, _effect(found, self.b is not None), len(common))

  def _judge_failure(self, measured: claim.Points, needed: int) -> Judgement:
    points = measured.select(**(self.fails or self.trains or {}))
    counts = [len(x.by_seed) for x in points]
    failed = [
      top_1 is None or top_1 < self.failed_below
      for x in points
      for top_1 in x.by_seed.values()
    ]
    effect = f'{sum(failed)} of {len(failed)} fail' if failed else ''
    if not points or measured.missing or min(counts) < needed:
      verdict = 'incomplete'
    elif all(failed):
      verdict = 'seen' if self.fails is not None else 'not seen'
    elif not any(failed):
      verdict = 'not seen' if self.fails is not None else 'seen'
    else:
      verdict = 'undecided'
    return Judgement(verdict, effect, min(counts, default=0))


@dataclasses.dataclass(frozen=True)
class Protocol:
  """A text of `preregistered`.

  Attributes:
    name: of the claim.
    digest: of the file, 12 hexadecimal digits.
    seeds: at least, of each side of a comparison.
    minutes: the row may take, on two idle cores.
    paper: its result, in a few words.
    hypotheses: the first is the claim's verdict.
    chance: accuracy of a run that diverged, in %.
    overfits: labels of a point that should overfit; empty is none.
    config: fields that hold in all runs.
  """

  name: str
  digest: str
  seeds: int
  minutes: float
  paper: str
  hypotheses: Sequence[Hypothesis]
  chance: float = 0.0
  overfits: Labels = dataclasses.field(default_factory=dict)
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def judge(self, measured: claim.Points) -> list[Judgement]:
    """Returns the verdict on each hypothesis, in order."""
    return [x.judge(measured, self.seeds, self.chance) for x in self.hypotheses]


@functools.cache
def read(name: str) -> Protocol:
  """Reads the text of a claim.

  Args:
    name: of the claim, such as 'batch-size'.

  Raises:
    ValueError: if the text has no rule or a field does not exist.
  """
  path = results.PREREGISTERED / f'{name}.md'
  blocks = _RULE.findall(path.read_text())
  if len(blocks) != 1:
    raise ValueError(f'{path} has {len(blocks)} blocks of TOML, not 1')
  try:
    rule = tomllib.loads(blocks[0])
    hypotheses = [Hypothesis(**x) for x in rule.pop('hypothesis')]
    return Protocol(
      name=name,
      digest=results.digests()[name],
      hypotheses=hypotheses,
      **rule,
    )
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f'{path}: {error}') from error


def _signed(value: float) -> str:
  return f'{value:+.1f}'.replace('-', '−') if value else '0'


def _effect(found: Interval, signed: bool) -> str:
  show = _signed if signed else '{:.2f}'.format
  if math.isinf(found.low):
    return show(found.mean)
  return f'{show(found.mean)} ({show(found.low)} to {show(found.high)})'
