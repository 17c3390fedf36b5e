"""The parts of the report, as a page of HTML and as Markdown."""

import base64
import html
import io
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import matplotlib
import matplotlib.figure

from experiments.figures import markdown
from experiments.reproduce import figures

_STYLE = """\
:root { color-scheme: light dark; --fg: #1c2026; --bg: #fff; --dim: #667;
  --line: #d5d9df; --code: #f1f3f5; --yes: #1a7f37; --part: #9a6700;
  --no: #cf222e; --link: #0759c9; }
@media (prefers-color-scheme: dark) { :root { --fg: #d8dce2; --bg: #15181d;
  --dim: #9aa1ab; --line: #363c45; --code: #22272e; --yes: #3fb950;
  --part: #d29922; --no: #f85149; --link: #6cb0ff; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--fg);
  background: var(--bg); max-width: 70em; margin: 2em auto; padding: 0 1em; }
h2 { border-top: 1px solid var(--line); margin-top: 2.5em; padding-top: 1em; }
a { color: var(--link); }
div { overflow-x: auto; }
table { border-collapse: collapse; margin: 1em 0; font-size: 0.9em; }
td, th { border: 1px solid var(--line); padding: 0.25em 0.7em;
  text-align: left; vertical-align: top; }
img { max-width: 100%; }
code { background: var(--code); padding: 0.1em 0.3em; border-radius: 3px; }
figcaption { color: var(--dim); font-size: 0.85em; }
figure { margin: 1em 0; }
summary { cursor: pointer; }
b { font-weight: 600; white-space: nowrap; }
.seen, .reproduced { color: var(--yes); } .partly { color: var(--part); }
.not { color: var(--no); } .undecided, .incomplete { color: var(--dim); }
"""
_SYMBOLS = {
  'seen': '✓',
  'reproduced': '✓',
  'partly': '◐',
  'not': '✗',
  'undecided': '◌',
  'incomplete': '?',
}


class Verdict(str):
  """A verdict: a symbol and a color, by its first word, and the text."""

  @property
  def kind(self) -> str:
    """The first word, such as 'seen' or 'not'."""
    return self.partition(' ')[0].rstrip(',;')

  @property
  def shown(self) -> str:
    """The text after its symbol."""
    return f'{_SYMBOLS[self.kind]} {self}'


class Code(str):
  """A command."""


class Link(NamedTuple):
  """A link to a section, and text below it."""

  name: str
  anchor: str
  text: str


Cell = str | Link


class Text(NamedTuple):
  """A paragraph."""

  cells: Sequence[Cell]


class Table(NamedTuple):
  """A table, headings first, folded under its `summary` if there is one."""

  lines: Sequence[Sequence[Cell]]
  summary: str = ''


class Picture(NamedTuple):
  """A figure: PNG by theme of `figures.THEMES`; the light one is a file."""

  file: str
  images: Mapping[str, bytes]
  caption: str


Block = Text | Table | Picture


class Section(NamedTuple):
  """A claim at a scale."""

  title: str
  blocks: Sequence[Block]

  @property
  def anchor(self) -> str:
    """As GitHub and MyST derive it from the title."""
    return self.title.lower().replace(',', '').replace(' ', '-')


def picture(
  draw: Callable[[], matplotlib.figure.Figure],
  path: pathlib.Path,
  caption: str,
) -> Picture:
  """Draws for a light and a dark page and writes the former to `path`."""
  images = {}
  for theme, settings in figures.THEMES.items():
    image = io.BytesIO()
    with matplotlib.rc_context(settings):
      draw().savefig(image, dpi=120)
    images[theme] = image.getvalue()
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(images['light'])
  return Picture(path.name, images, caption)


def as_html(title: str, sections: Sequence[Section]) -> str:
  """Returns a page that needs no other file."""
  parts = []
  for section in sections:
    parts.append(f'<h2 id="{section.anchor}">{html.escape(section.title)}</h2>')
    parts += map(_html_block, section.blocks)
  return (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    f'<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>'
    + '\n'.join(parts)
    + '</html>\n'
  )


def _html_cell(cell: Cell) -> str:
  if isinstance(cell, Link):
    link = f'<a href="#{cell.anchor}">{html.escape(cell.name)}</a>'
    return f'{link}<br>{html.escape(cell.text)}'
  if isinstance(cell, Verdict):
    return f'<b class="{cell.kind}">{html.escape(cell.shown)}</b>'
  text = html.escape(cell)
  return f'<code>{text}</code>' if isinstance(cell, Code) else text


def _html_block(block: Block) -> str:
  if isinstance(block, Text):
    return f'<p>{" ".join(map(_html_cell, block.cells))}</p>'
  if isinstance(block, Table):
    rows = []
    for number, line in enumerate(block.lines):
      tag = 'td' if number else 'th'
      cells = ''.join(f'<{tag}>{_html_cell(x)}</{tag}>' for x in line)
      rows.append(f'<tr>{cells}</tr>')
    table = '\n'.join(['<div><table>', *rows, '</table></div>'])
    if not block.summary:
      return table
    summary = html.escape(block.summary)
    return f'<details><summary>{summary}</summary>{table}</details>'
  urls = {
    theme: f'data:image/png;base64,{base64.b64encode(image).decode()}'
    for theme, image in block.images.items()
  }
  return (
    '<figure><picture><source media="(prefers-color-scheme: dark)" '
    f'srcset="{urls["dark"]}"><img alt="{block.file}" src="{urls["light"]}">'
    f'</picture><figcaption>{html.escape(block.caption)}</figcaption></figure>'
  )


def as_markdown(title: str, sections: Sequence[Section]) -> str:
  """Returns a page beside the files of its pictures."""
  parts = [f'# {title}']
  for section in sections:
    parts.append(f'## {section.title}')
    parts += map(_markdown_block, section.blocks)
  return '\n\n'.join(parts) + '\n'


def _markdown_cell(cell: Cell) -> str:
  if isinstance(cell, Link):
    return f'[{cell.name}](#{cell.anchor}): {_escaped(cell.text)}'
  if isinstance(cell, Verdict):
    return f'**{cell.shown}**'
  return f'`{cell}`' if isinstance(cell, Code) else _escaped(cell)


def _escaped(text: str) -> str:
  for character in '|*_<':
    text = text.replace(character, f'\\{character}')
  return text


def _markdown_block(block: Block) -> str:
  if isinstance(block, Text):
    return ' '.join(map(_markdown_cell, block.cells))
  if isinstance(block, Table):
    head, *rows = [[_markdown_cell(x) for x in line] for line in block.lines]
    table = markdown.table(head, rows)
    if not block.summary:
      return table
    summary = f'<summary>{html.escape(block.summary)}</summary>'
    return f'<details>{summary}\n\n{table}\n\n</details>'
  return f'![{block.file}]({block.file})\n\n{_escaped(block.caption)}'
