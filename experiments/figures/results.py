"""Rewrites the generated parts of the pages in docs/results.

  python -m experiments.figures.results

A page marks each part with the line `<!-- begin gpu NAME -->` before it and
`<!-- end -->` after it, and the rest is left as it is. The part has the tables
of `experiments/gpu/results/NAME.jsonl`.
"""

import pathlib
import re

from experiments.gpu import common
from experiments.gpu import report as gpu_report

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ROOT / 'docs' / 'results'
_GPU = ROOT / 'experiments' / 'gpu' / 'results'
_PART = re.compile(r'(<!-- begin gpu (.+?) -->\n).*?(<!-- end -->)', re.S)


def gpu(name: str) -> str:
  """Returns goals and tables of a file of results of `make gpu`."""
  page = gpu_report.page(common.read(_GPU / f'{name}.jsonl'))
  # Without the heading and the machine, and the unfinished jobs' messages.
  blocks = page.partition('\n\nFailed or not run:')[0].split('\n\n')[2:]
  return '\n\n'.join(blocks).rstrip()


def render(page: str) -> str:
  """Returns a page with its generated parts made anew.

  Example:
    >>> render('no generated part')
    'no generated part'
  """
  return _PART.sub(lambda x: f'{x[1]}\n{gpu(x[2])}\n\n{x[3]}', page)


def main() -> None:
  for path in sorted(PAGES.glob('*.md')):
    old = path.read_text()
    if (new := render(old)) != old:
      path.write_text(new)
      print(path.relative_to(ROOT))


if __name__ == '__main__':
  main()
