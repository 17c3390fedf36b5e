"""Rewrites the generated parts of docs/compile.md and the pages of results.

  python -m experiments.figures.results

A page marks each part with the line `<!-- begin KIND NAME -->` before it and
`<!-- end -->` after it, and the rest is left as it is. `gpu NAME` has the
tables of `experiments/gpu/results/NAME.jsonl`; `compiled batch` and `compiled
latency` those of the cells in `experiments/reproduce/cells`.
"""

import argparse
import pathlib
import re

from experiments.benchmarks import compile_table
from experiments.gpu import common
from experiments.gpu import report as gpu_report
from experiments.reproduce import latency_table

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ROOT / 'docs' / 'results'
_GPU = ROOT / 'experiments' / 'gpu' / 'results'
_PART = re.compile(
  r'(<!-- begin (gpu|compiled) (.+?) -->\n).*?(<!-- end -->)', re.S
)


def gpu(name: str) -> str:
  """Returns goals and tables of a file of results of `make gpu`."""
  page = gpu_report.page(common.read(_GPU / f'{name}.jsonl'))
  # Without the heading and the machine, and the unfinished jobs' messages.
  blocks = page.partition('\n\nFailed or not run:')[0].split('\n\n')[2:]
  return '\n\n'.join(blocks).rstrip()


def compiled(name: str) -> str:
  """Returns a table of compiled steps, `batch` or `latency`."""
  if name == 'batch':
    return compile_table.kept_report()
  if name == 'latency':
    return latency_table.compilers()
  raise ValueError(f'compiled {name} is neither batch nor latency')


def pages() -> list[pathlib.Path]:
  """Returns the pages that may have generated parts."""
  return [ROOT / 'docs' / 'compile.md', *sorted(PAGES.glob('*.md'))]


def render(page: str) -> str:
  """Returns a page with its generated parts made anew.

  Example:
    >>> render('no generated part')
    'no generated part'
  """
  return _PART.sub(lambda x: f'{x[1]}\n{_MAKE[x[2]](x[3])}\n\n{x[4]}', page)


_MAKE = {'gpu': gpu, 'compiled': compiled}


def main(argv: list[str] | None = None) -> None:
  argparse.ArgumentParser(
    prog='python -m experiments.figures.results',
    description='Rewrites the generated parts of docs/compile.md and results.',
  ).parse_args(argv)
  for path in pages():
    old = path.read_text()
    if (new := render(old)) != old:
      path.write_text(new)
      print(path.relative_to(ROOT))


if __name__ == '__main__':
  main()
