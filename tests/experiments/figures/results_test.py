"""The results pages agree with the results that they are made from."""

import re

import pytest

from experiments.figures import results

PAGES = sorted(results.PAGES.glob('*.md'))


@pytest.mark.parametrize('path', results.pages(), ids=lambda path: path.stem)
def test_tables_are_those_of_the_results(path):
  page = path.read_text()
  assert results.render(page) == page, (
    f'{path.name} differs from the results; run '
    'python -m experiments.figures.results'
  )


def test_part_of_no_known_name():
  with pytest.raises(ValueError, match='compiled speed is neither batch nor'):
    results.render('<!-- begin compiled speed -->\n<!-- end -->')


def test_links_lead_somewhere():
  for path in PAGES:
    for link in re.findall(r'\]\((?!http)([^)#]+)', path.read_text()):
      assert (path.parent / link).exists(), f'{path.name} links to {link}'


def test_every_page_is_in_the_index():
  index = (results.PAGES / 'index.md').read_text()
  linked = set(re.findall(r'^\| \[[^]]+\]\((\w+\.md)\)', index, re.M))
  assert linked == {path.name for path in PAGES} - {'index.md'}
