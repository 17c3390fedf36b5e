"""Writes `report.html`: a verdict, a figure and the numbers of each claim.

  python -m experiments.reproduce.report --output=runs/reproduce

The page needs no other file; each figure is also written as a PNG.
"""

import argparse
import base64
import collections
import html
import io
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import matplotlib.figure

from experiments.reproduce import claim as claims_lib
from experiments.reproduce import figures, latency_table, results, scales
from experiments.reproduce.claims import CLAIMS, latency
from nfnets_jax import paths

_STYLE = """\
:root { color-scheme: light dark; --fg: #1c2026; --bg: #fff; --dim: #667;
  --line: #d5d9df; --code: #f1f3f5; --yes: #1a7f37; --part: #9a6700;
  --no: #cf222e; --link: #0759c9; }
@media (prefers-color-scheme: dark) { :root { --fg: #d8dce2; --bg: #15181d;
  --dim: #9aa1ab; --line: #363c45; --code: #22272e; --yes: #3fb950;
  --part: #d29922; --no: #f85149; --link: #6cb0ff; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--fg);
  background: var(--bg); max-width: 58em; margin: 2em auto; padding: 0 1em; }
h2 { border-top: 1px solid var(--line); margin-top: 2.5em; padding-top: 1em; }
a { color: var(--link); }
div { overflow-x: auto; }
table { border-collapse: collapse; margin: 1em 0; font-size: 0.9em; }
td, th { border: 1px solid var(--line); padding: 0.25em 0.7em;
  text-align: left; }
img { max-width: 100%; }
code { background: var(--code); padding: 0.1em 0.3em; border-radius: 3px; }
small, figcaption { color: var(--dim); font-size: 0.85em; }
figure { margin: 1em 0; }
summary { cursor: pointer; }
ul.statements { list-style: none; padding-left: 0; }
b { font-weight: 600; white-space: nowrap; }
.reproduced { color: var(--yes); } .partly { color: var(--part); }
.not { color: var(--no); } .incomplete { color: var(--dim); }
"""
_SYMBOLS = {'reproduced': '✓', 'partly': '◐', 'not': '✗', 'incomplete': '?'}
_INTRODUCTION = (
  '<p>Brock et al. 2021, <a href="https://arxiv.org/abs/2102.06171">'
  'arXiv:2102.06171</a>. Each claim is split into statements that results can '
  'decide. A net <em>beats</em> another if its worst seed is above the '
  "other's best, and <em>matches</em> it if their ranges overlap. Below the "
  "scale <em>paper</em> the nets and the data are not the paper's: compare "
  'effects, not accuracies.</p>'
)


class Section(NamedTuple):
  """A claim at a scale: what the contents say, and the part of the page."""

  name: str
  scale: str
  text: str
  statements: Sequence[claims_lib.Statement]
  body: str


def _badge(verdict: str) -> str:
  kind = verdict.partition(' ')[0]
  return f'<b class="{kind}">{_SYMBOLS[kind]} {verdict}</b>'


def _where(holds: Mapping[Any, bool | None]) -> str:
  """Returns where a statement holds, unless it is the same everywhere."""
  if len(set(holds.values())) < 2:
    return ''
  parts = []
  for value, word in ((True, 'holds'), (False, 'fails'), (None, 'not run')):
    names = [str(x) for x, hold in holds.items() if hold is value]
    if names:
      parts.append(f'{word}: {", ".join(names)}')
  return f' <small>({html.escape("; ".join(parts))})</small>'


def _list(statements: Sequence[claims_lib.Statement]) -> str:
  items = [
    f'<li>{_badge(x.verdict)}: {html.escape(x.text)}{_where(x.holds)}</li>'
    for x in statements
  ]
  return '\n'.join(['<ul class="statements">', *items, '</ul>'])


def _table(lines: claims_lib.Table, summary: str = '') -> str:
  """Returns a table, folded under its `summary` if there is one."""
  rows = []
  for line, tag in zip(lines, ['th', *['td'] * len(lines)], strict=False):
    cells = ''.join(f'<{tag}>{html.escape(x)}</{tag}>' for x in line)
    rows.append(f'<tr>{cells}</tr>')
  table = '\n'.join(['<div><table>', *rows, '</table></div>'])
  if not summary:
    return table
  return f'<details><summary>{summary}</summary>{table}</details>'


def _figure(
  draw: Callable[[], matplotlib.figure.Figure],
  path: pathlib.Path,
  caption: str,
) -> str:
  """Draws for a light and a dark page; only the former is kept as a file."""
  images = {}
  for theme, settings in figures.THEMES.items():
    image = io.BytesIO()
    with matplotlib.rc_context(settings):
      draw().savefig(image, dpi=120)
    encoded = base64.b64encode(image.getvalue()).decode()
    images[theme] = f'data:image/png;base64,{encoded}'
    if theme == 'light':
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(image.getvalue())
  return (
    '<figure><picture><source media="(prefers-color-scheme: dark)" '
    f'srcset="{images["dark"]}"><img alt="{path.stem}" src="{images["light"]}">'
    f'</picture><figcaption>{html.escape(caption)}</figcaption></figure>'
  )


def _machines(used: Sequence[Mapping[str, Any]]) -> str:
  machines = collections.Counter(
    f'{x["device"]}, {x["cores"]} cores, jax {x["jax"]}, Python {x["python"]}, '
    f'{x["date"]}'
    for x in used
  )
  minutes = sum(x['seconds'] for x in used) / 60
  runs = '; '.join(f'{count} runs on {x}' for x, count in machines.items())
  return f'{runs}; {minutes:.0f} minutes summed over all runs.'


def _section(
  name: str,
  scale: str,
  text: str,
  source: str,
  statements: Sequence[claims_lib.Statement],
  parts: Sequence[str],
) -> Section:
  head = [
    f'<h2 id="{name}-{scale}">{name}, {scale}</h2>',
    f'<p>{html.escape(text)} <em>({html.escape(source)})</em></p>',
    f'<p>{_badge(claims_lib.verdict(statements))}</p>',
    _list(statements),
    f'<p><code>make reproduce-{name} SCALE={scale}</code></p>',
  ]
  body = '\n'.join([*head, *parts])
  return Section(name, scale, text, statements, body)


def claim_section(
  claim: claims_lib.Claim,
  scale: str,
  found: results.Results,
  output: pathlib.Path,
) -> Section | None:
  """Returns a claim's section and writes its figure; None without results."""
  measured = claims_lib.Measured(claim, scale, found)
  if not measured.points:
    return None
  labels = list(dict.fromkeys(k for x in measured.points for k in x.labels))
  lines = [
    (*labels, 'test top-1, %'),
    *(
      (*(str(x.labels.get(k, '')) for k in labels), str(x))
      for x in measured.points
    ),
  ]
  caption = 'Points are means over seeds, bars their range.'
  curve = claim.paper(scale) if claim.paper else None
  if curve and curve.top_1:
    caption += f' Dashed: the paper, {curve.note}'
    caption += '.' if scale == 'paper' else ', in the units of the right axis.'
    if None in curve.top_1.values():
      caption += ' ▽: it fails.'
  missing = f' {measured.missing} runs are missing.' if measured.missing else ''
  parts = [
    _figure(
      lambda: figures.draw(claim, measured),
      output / f'{claim.name}-{scale}.png',
      caption,
    ),
    _table(lines, 'Results'),
    f'<p>{html.escape(_machines(measured.results))}{missing}</p>',
    '<h3>The paper</h3>',
    f'<p>{html.escape(claim.words)}</p>' if claim.words else '',
    _table(claim.table) if claim.table else '',
  ]
  return _section(
    claim.name,
    scale,
    claim.text,
    claim.source,
    claim.statements(measured),
    parts,
  )


def latency_section(
  scale: str, found: results.Results, output: pathlib.Path
) -> Section | None:
  """Returns the section of `latency` and writes its figure, or None."""
  names = {x: latency.name_of(scale, x) for x in latency.MODELS}
  used = {model: found[x] for model, x in names.items() if x in found}
  if not used:
    return None
  ratios = {
    model: statistics.median(x['ratios'])
    for model, x in used.items()
    if 'ratios' in x
  }
  results_used = list(used.values())
  batch = results_used[0]['labels']['batch']
  parts = [
    _figure(
      lambda: figures.draw_latency(ratios, scale),
      output / f'latency-{scale}.png',
      'Dashed: the latencies of the paper. All accuracies are its own.',
    ),
    _table(latency_table.table(scale, used)),
    f'<p>{html.escape(_machines(results_used))} Batches of {batch}.</p>',
  ]
  statements = latency.statements(scale, found)
  return _section(
    'latency', scale, latency.TEXT, latency.SOURCE, statements, parts
  )


def _contents(sections: Sequence[Section]) -> str:
  rows = ['<tr><th>claim</th><th>scale</th><th>verdict</th></tr>']
  for x in sections:
    badge = _badge(claims_lib.verdict(x.statements))
    rows.append(
      f'<tr><td><a href="#{x.name}-{x.scale}">{x.name}</a><br>'
      f'<small>{html.escape(x.text)}</small></td><td>{x.scale}</td>'
      f'<td>{badge}</td></tr>'
    )
  return '\n'.join(['<nav><table>', *rows, '</table></nav>'])


def write(output: pathlib.Path) -> pathlib.Path:
  """Writes the page and the figures.

  Args:
    output: folder with results.

  Returns:
    The page.

  Raises:
    FileNotFoundError: if the folder has no results.
  """
  found = results.read(output)
  sections = []
  for scale in scales.SCALES:
    if not any(name.startswith(f'{scale}/') for name in found):
      continue
    sections += [
      claim_section(claim, scale, found, output) for claim in CLAIMS.values()
    ]
    sections.append(latency_section(scale, found, output))
  drawn = [section for section in sections if section is not None]
  if not drawn:
    raise FileNotFoundError(
      f'no results in {output}; make some with make reproduce-batch-size '
      'SCALE=small'
    )
  page = output / 'report.html'
  page.write_text(
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    '<title>NFNets: the claims of the paper, reproduced</title>'
    f'<style>{_STYLE}</style><h1>The claims of the paper, reproduced</h1>'
    + '\n'.join([_INTRODUCTION, _contents(drawn), *(x.body for x in drawn)])
    + '</html>\n'
  )
  return page


def main(argv: list[str] | None = None) -> None:
  """Writes the page of the results that the command line, or `argv`, names."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.reproduce.report',
    description='Write report.html: every claim that has results.',
  )
  parser.add_argument(
    '--output', type=paths.argument, default=pathlib.Path('runs/reproduce')
  )
  args = parser.parse_args(argv)
  try:
    print(write(args.output))
  except (FileNotFoundError, ValueError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  main()
