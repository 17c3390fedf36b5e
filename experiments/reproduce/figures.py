"""Figures of the report: accuracy with the paper's curve, and latency."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
from matplotlib import axes as axes_lib
from matplotlib import lines as lines_lib

from experiments.reproduce import claim as claims_lib
from experiments.reproduce import paper
from experiments.reproduce.claims import latency

_DARK = {
  **dict.fromkeys(('figure.facecolor', 'axes.facecolor'), '#15181d'),
  **dict.fromkeys(('text.color', 'axes.labelcolor'), '#d8dce2'),
  **dict.fromkeys(('xtick.color', 'ytick.color', 'axes.edgecolor'), '#9aa1ab'),
  'legend.facecolor': '#15181d',
  'legend.edgecolor': '#444a53',
}
THEMES: Mapping[str, Any] = {'light': {}, 'dark': _DARK}


def draw(
  claim: claims_lib.Claim, measured: claims_lib.Measured
) -> matplotlib.figure.Figure:
  """Draws a claim's points, and below them the steps at which runs diverged.

  Args:
    claim: its `axes` are the labels along x and by color.
    measured: its results, with at least one point.

  Returns:
    The figure. Bars are from the worst to the best seed; a hollow point is the
    mean of the seeds that did not diverge. Dashed is the paper's curve.
  """
  points = measured.points
  panels = list(dict.fromkeys(x.labels.get(claim.panels or '') for x in points))
  series = list(dict.fromkeys(x.labels[claim.axes[1]] for x in points))
  colors = {
    name: matplotlib.colormaps['tab10'](i % 10) for i, name in enumerate(series)
  }
  diverged = any(x.diverged for x in points)
  figure = matplotlib.figure.Figure(
    figsize=(max(7.0, 2.0 + 4.2 * len(panels)), 5.0 if diverged else 4.0),
    layout='constrained',
  )
  grid = figure.subplots(
    2 if diverged else 1,
    len(panels),
    sharex='col',
    sharey='row',
    squeeze=False,
    height_ratios=[4, 1] if diverged else [1],
  )
  curve = claim.paper(measured.scale) if claim.paper else None
  leads = _leads(claim, points, curve) if curve else []
  # Whole points by which the paper's curve is lowered onto ours.
  lowered = leads and measured.scale != 'paper'
  shift = round(statistics.median(leads)) if lowered else 0
  for column, panel in enumerate(panels):
    inside = [x for x in points if x.labels.get(claim.panels or '') == panel]
    _draw_panel(
      list(grid[:, column]), claim, panel, inside, colors, curve, shift
    )
  grid[0, 0].set_ylabel('test top-1, %')
  if diverged:
    last = max(step for x in points for step in x.diverged)
    grid[1, 0].set(ylabel='diverged\nat step', ylim=(0, 1.3 * last + 1))
  if shift:
    right = grid[0, -1].secondary_yaxis(
      'right', functions=(lambda y: y + shift, lambda y: y - shift)
    )
    right.set_ylabel("the paper's top-1, %")
  _add_legend(figure, claim.axes[1], colors, points, bool(leads))
  figure.suptitle(f'{claim.name}, {measured.scale}')
  return figure


def _key(claim: claims_lib.Claim, point: claims_lib.Point) -> tuple[Any, ...]:
  """Returns the key of a point in a `Curve`."""
  names = (*claim.axes, *([claim.panels] if claim.panels else []))
  return tuple(point.labels[name] for name in names)


def _leads(
  claim: claims_lib.Claim,
  points: Sequence[claims_lib.Point],
  curve: claims_lib.Curve,
) -> list[float]:
  """Returns the paper's lead over each point of which it has a number."""
  pairs = [(curve.top_1.get(_key(claim, x)), x.mean) for x in points]
  return [a - b for a, b in pairs if a is not None and b is not None]


def _draw_panel(
  axes: Sequence[axes_lib.Axes],
  claim: claims_lib.Claim,
  panel: Any,
  points: Sequence[claims_lib.Point],
  colors: Mapping[Any, Any],
  curve: claims_lib.Curve | None,
  shift: int,
) -> None:
  along, by = claim.axes
  xs = list(dict.fromkeys(x.labels[along] for x in points))
  if all(isinstance(x, int | float) for x in xs):
    xs.sort()
  for index, (name, color) in enumerate(colors.items()):
    offset = 0.06 * (index - (len(colors) - 1) / 2)  # as series may coincide
    at = {x: i + offset for i, x in enumerate(xs)}
    line = [x for x in points if x.labels[by] == name]
    line.sort(key=lambda x: xs.index(x.labels[along]))
    _draw_series(axes, line, at, along, color)
    if curve is not None:
      _draw_paper(axes[0], curve, name, panel, at, shift, color)
  ticks = axes[-1].set_xticks(range(len(xs)), [str(x) for x in xs])
  if max(len(str(x)) for x in xs) > 8:
    for tick in ticks:
      tick.label1.set(rotation=30, ha='right', rotation_mode='anchor')
  axes[-1].set_xlabel(along)
  for axis in axes:
    axis.grid(alpha=0.3)
  if claim.panels is not None:
    axes[0].set_title(f'{claim.panels} {panel}', fontsize=10)


def _draw_series(
  axes: Sequence[axes_lib.Axes],
  line: Sequence[claims_lib.Point],
  at: Mapping[Any, float],
  along: str,
  color: Any,
) -> None:
  finished = [x for x in line if x.mean is not None]
  xs = [at[x.labels[along]] for x in finished]
  means = [x.mean or 0.0 for x in finished]
  below = [y - min(x.top_1) for y, x in zip(means, finished, strict=True)]
  above = [max(x.top_1) - y for y, x in zip(means, finished, strict=True)]
  ordered = all(isinstance(x, int | float) for x in at)
  axes[0].errorbar(
    xs,
    means,
    yerr=[below, above],
    linestyle='-' if ordered else 'none',
    capsize=2,
    color=color,
  )
  for x, y, point in zip(xs, means, finished, strict=True):
    fill = axes[0].get_facecolor() if point.diverged else color
    axes[0].plot(x, y, 'o', ms=5, color=color, mfc=fill)
  for point in line:
    for step in point.diverged:
      axes[1].plot(at[point.labels[along]], step, 'x', ms=7, mew=2, color=color)


def _draw_paper(
  axis: axes_lib.Axes,
  curve: claims_lib.Curve,
  name: Any,
  panel: Any,
  at: Mapping[Any, float],
  shift: int,
  color: Any,
) -> None:
  """Draws the paper's curve; where it fails, a triangle at the bottom."""
  key = (name,) if panel is None else (name, panel)
  known = {x: curve.top_1[x, *key] for x in at if (x, *key) in curve.top_1}
  found = {x: y - shift for x, y in known.items() if y is not None}
  style: dict[str, Any] = {'mfc': 'none', 'alpha': 0.8, 'color': color}
  axis.plot([at[x] for x in found], list(found.values()), 'D--', ms=4, **style)
  failed = [at[x] for x in known if x not in found]
  bottom = axis.get_xaxis_transform()
  axis.plot(failed, [0.03] * len(failed), 'v', transform=bottom, **style)


def _add_legend(
  figure: matplotlib.figure.Figure,
  title: str,
  colors: Mapping[Any, Any],
  points: Sequence[claims_lib.Point],
  has_curve: bool,
) -> None:
  gray = '#888888'

  def handle(label: str, **style: Any) -> lines_lib.Line2D:
    return lines_lib.Line2D([], [], label=label, **style)

  handles = [
    handle(str(name), color=color, marker='o', ms=5)
    for name, color in colors.items()
  ]
  if has_curve:
    handles.append(
      handle('the paper', color=gray, ls='--', marker='D', ms=4, mfc='none')
    )
  if any(x.diverged and x.top_1 for x in points):
    style = {'color': gray, 'ls': 'none', 'marker': 'o', 'mfc': 'none'}
    handles.append(handle('a seed diverged', ms=5, **style))
  if any(x.diverged for x in points):
    handles.append(handle('diverged', color=gray, ls='none', marker='x'))
  figure.legend(
    handles=handles, loc='outside right upper', title=title, fontsize=8
  )


def draw_latency(
  ratios: Mapping[str, float], scale: str
) -> matplotlib.figure.Figure:
  """Draws the paper's accuracy by latency, here and in the paper.

  Args:
    ratios: median time over that of F1, by net.
    scale: one of `scales.SCALES`.

  Returns:
    The figure, with labels that do not overlap.
  """
  figure = matplotlib.figure.Figure(figsize=(8, 5), layout='constrained')
  axis = figure.subplots()
  labels = {}
  for prefix, name, color in (
    ('nfnet_', 'NFNet', 'tab:blue'),
    ('efficientnet_', 'EfficientNet', 'tab:orange'),
    ('', 'ResNet-50, SENet-50', 'tab:green'),
  ):
    nets = [
      x
      for x in ratios
      if x in paper.LATENCY and x not in labels and x.startswith(prefix)
    ]
    top_1 = [paper.LATENCY[x].top_1 for x in nets]
    axis.plot([ratios[x] for x in nets], top_1, 'o-', color=color, label=name)
    theirs = [latency.published_ratio(x) or math.nan for x in nets]
    axis.plot(theirs, top_1, 'D--', color=color, ms=4, mfc='none', alpha=0.8)
    for net in nets:
      short = {'resnet50': 'ResNet-50', 'senet50': 'SENet-50'}
      labels[net] = short.get(net, net.removeprefix(prefix).upper())
  axis.plot([], [], 'D--', color='#888888', ms=4, mfc='none', label='the paper')
  timed = 'forward and backward pass' if scale == 'small' else 'step'
  axis.set(
    xscale='log',
    xlabel=f"{timed} over NFNet-F1's",
    ylabel="the paper's top-1, %",
    title=f'latency, {scale}',
  )
  axis.grid(alpha=0.3)
  axis.margins(0.08)
  axis.legend(loc='lower right')
  at = {
    text: (ratios[net], paper.LATENCY[net].top_1)
    for net, text in labels.items()
  }
  _place_labels(figure, axis, at)
  return figure


def _place_labels(
  figure: matplotlib.figure.Figure,
  axis: axes_lib.Axes,
  labels: Mapping[str, tuple[float, float]],
) -> None:
  """Labels points, each on the first side that no line or label covers."""
  figure.draw_without_rendering()  # fixes the layout
  pieces = [np.zeros((0, 2))]
  for line in axis.lines:
    ends = axis.transData.transform(line.get_xydata())
    pieces += [np.linspace(*pair, 30) for pair in itertools.pairwise(ends)]
  points = np.concatenate(pieces)
  # Left, bottom, right and top, in pixels.
  taken = np.concatenate([points - 3, points + 3], axis=1)
  sides = [
    ((0, 7), 'center', 'bottom'),
    ((0, -7), 'center', 'top'),
    ((7, 0), 'left', 'center'),
    ((-7, 0), 'right', 'center'),
    *(((0, y), 'center', 'center') for y in range(20, 200, 10)),
  ]
  for text, point in labels.items():
    label = axis.annotate(
      text, point, (0, 7), textcoords='offset points', fontsize=8
    )
    for offset, ha, va in sides:
      label.set(position=offset, ha=ha, va=va)
      box = label.get_window_extent().extents
      apart = (taken[:, 2:] <= box[:2]) | (taken[:, :2] >= box[2:])
      if apart.any(axis=1).all():
        break
    taken = np.concatenate([taken, [box]])
