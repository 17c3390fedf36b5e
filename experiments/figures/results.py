"""Rewrites the generated parts of the pages in docs/results.

  python -m experiments.figures.results

A page marks each part with the line `<!-- begin KIND ARGUMENTS -->` before it
and `<!-- end -->` after it. The rest of the page is left as it is. The parts
are made from `experiments/gpu/results`.
"""

import pathlib
import re
from collections.abc import Callable, Mapping

from experiments.gpu import common
from experiments.gpu import report as gpu_report

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ROOT / 'docs' / 'results'
_GPU = ROOT / 'experiments' / 'gpu' / 'results'
_PART = re.compile(r'(<!-- begin (.+?) -->\n).*?(<!-- end -->)', re.S)


def gpu(name: str) -> str:
  """Returns goals and tables of a file of results of `make gpu`."""
  page = gpu_report.page(common.read(_GPU / f'{name}.jsonl'))
  # Without the heading and the machine, and the unfinished jobs' messages.
  blocks = page.partition('\n\nFailed or not run:')[0].split('\n\n')[2:]
  return '\n\n'.join(blocks).rstrip()


_KINDS: Mapping[str, Callable[..., str]] = {'gpu': gpu}


def render(page: str) -> str:
  """Returns a page with its generated parts made anew.

  Example:
    >>> render('no generated part')
    'no generated part'
  """

  def make(match: re.Match[str]) -> str:
    kind, *arguments = match[2].split()
    return f'{match[1]}\n{_KINDS[kind](*arguments)}\n\n{match[3]}'

  return _PART.sub(make, page)


def main() -> None:
  for path in sorted(PAGES.glob('*.md')):
    old = path.read_text()
    if (new := render(old)) != old:
      path.write_text(new)
      print(path.relative_to(ROOT))


if __name__ == '__main__':
  main()
