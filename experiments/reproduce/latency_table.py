"""The report's table of latencies: measured, published, and estimated."""

import json
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

from experiments.benchmarks import timing
from experiments.figures import markdown
from experiments.reproduce import claim, cost, paper
from experiments.reproduce.claims import latency


def estimated_ms(
  model: str, topology: str, cells: pathlib.Path = cost.CELLS
) -> float | None:
  """Returns the compiler's estimate of a step, in ms; None without one.

  By the compiler's cycles if it gives them, as for TPUs.
  """
  result = _cell(model, topology, cells)
  if not result or not result['fits']:
    return None
  step = result['training']
  return 1e3 * (step['cycle_seconds'] or step['seconds'])


def compilers(cells: pathlib.Path = cost.CELLS) -> str:
  """Returns the table of the compilers' estimates, in Markdown.

  A net has a row if it is compiled for the TPU and fits.
  """
  head = (
    'net',
    'pixels',
    "paper's on v3, ms",
    'by cycles, ms',
    '`optimal_seconds`, ms',
    'GiB',
    'H100, ms',
  )
  rows = []
  for model in latency.COMPILED:
    result = _cell(model, latency.TOPOLOGIES[0], cells)
    if result is None or not result['fits']:
      continue
    step, parts = result['training'], result['micro_batches']
    known = paper.LATENCY.get(model)
    gpu = estimated_ms(model, latency.TOPOLOGIES[1], cells)
    rows.append(
      (
        f'`{model}`' + f', in {parts} micro-batches' * (parts > 1),
        result['image_size'],
        f'{known.tpu_ms:,}' if known else '',
        f'{1e3 * step["cycle_seconds"]:,.1f}',
        f'{1e3 * step["seconds"]:,.1f}',
        f'{step["total"] / 2**30:.2f}',
        '' if gpu is None else f'{gpu:.1f}',
      )
    )
  return markdown.table(head, rows)


def _cell(
  model: str, topology: str, cells: pathlib.Path
) -> dict[str, Any] | None:
  path = cost.cell_file(cells / 'latency', model, topology)
  return json.loads(path.read_text())['result'] if path.exists() else None


def table(
  scale: str,
  used: Mapping[str, Mapping[str, Any]],
  cells: pathlib.Path = cost.CELLS,
) -> claim.Table:
  """Returns the table of the report, headings first.

  Args:
    scale: one of `scales.SCALES`.
    used: results by net.
    cells: folder of `compile_table`; need not exist.
  """
  head = (
    'net',
    "parameters, M (paper's)",
    "GMACs at test size (paper's)",
    'pixels',
    'step, s' if scale in latency.STEPS else 'forward and backward, s',
    '÷ F1, range',
    *(['forward and backward alone, s'] if scale in latency.STEPS else []),
    "paper's ÷ F1 (TPUv3, ms)",
    *(f'compiler for {x}, ÷ F1 (ms)' for x in latency.TOPOLOGIES),
    "paper's top-1, %",
  )
  return [head, *(_line(scale, x, used[x], cells) for x in used)]


def _line(
  scale: str, model: str, result: Mapping[str, Any], cells: pathlib.Path
) -> tuple[str, ...]:
  known = paper.LATENCY.get(model)
  seconds, ratio = result.get('message', ''), ''
  if 'ratios' in result:
    seconds = f'{statistics.median(result["step_seconds"]):.3g}'
    if parts := result.get('micro_batches', 1) - 1:
      seconds += f', in {parts + 1} micro-batches'
    ratio = timing.spread(result['ratios'], digits=2)
  passes = result.get('gradient_seconds')
  params, gmacs = result['params'] / 1e6, result['gmacs_test']
  theirs = latency.published_ratio(model)
  return (
    model,
    f'{params:.2f}' + (f' ({known.params})' if known else ''),
    f'{gmacs:.2f}' + (f' ({known.gmacs})' if known else ''),
    str(result['size']),
    seconds,
    ratio,
    *(
      [f'{statistics.median(passes):.3g}' if passes else '']
      * (scale in latency.STEPS)
    ),
    f'{theirs:.2f} ({known.tpu_ms})' if known else '',
    *(_estimate(model, topology, cells) for topology in latency.TOPOLOGIES),
    f'{known.top_1}' if known else '',
  )


def _estimate(model: str, topology: str, cells: pathlib.Path) -> str:
  ours = estimated_ms(model, topology, cells)
  reference = estimated_ms(latency.REFERENCE, topology, cells)
  if ours is None:
    return ''
  return (f'{ours / reference:.2f} ' if reference else '') + f'({ours:.1f})'
