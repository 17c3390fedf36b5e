"""What the site takes from the code exists; `make docs` builds it."""

import ast
import importlib
import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'
# Without docs/_build, where `make docs` copies the pages.
PAGES = sorted(
  x
  for suffix in ('md', 'rst')
  for x in DOCS.rglob(f'*.{suffix}')
  if '_build' not in x.parts
)


def _definitions(path):
  """The source of functions, classes and methods, as in `Class.method`."""
  text = path.read_text()
  found = {}

  def visit(node, prefix):
    for child in ast.iter_child_nodes(node):
      if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
        found[prefix + child.name] = ast.get_source_segment(text, child)
        visit(child, f'{prefix}{child.name}.')

  visit(ast.parse(text), '')
  return found


def test_included_code_exists():
  text = (DOCS / 'how_it_works.md').read_text()
  blocks = re.findall(
    r'^```{literalinclude} (.*?)\n(.*?)^```', text, re.M | re.S
  )
  assert len(blocks) > 10
  for path, options in blocks:
    source = (DOCS / path).resolve()
    (name,) = re.findall(r'^:pyobject: (.+)$', options, re.M)
    definitions = _definitions(source)
    assert name in definitions, f'{path} has no {name}'
    (caption,) = re.findall(r'^:caption: (.+)$', options, re.M)
    assert ROOT / caption == source
    for anchor in re.findall(r'^:(?:start|end)-\w+: "?(.+?)"?$', options, re.M):
      assert definitions[name].count(anchor) == 1, anchor


def test_reference_names_what_exists():
  public = set()
  for page in (DOCS / 'reference').glob('*.rst'):
    text = page.read_text()
    for module in re.findall(r'^\.\. automodule:: (.+)$', text, re.M):
      assert importlib.util.find_spec(module) is not None, module
    found = re.findall(r'^\.\. (?:autofunction|autoclass):: (.+)$', text, re.M)
    if found:
      (module,) = re.findall(r'^\.\. currentmodule:: (.+)$', text, re.M)
      public |= {f'{module}.{name}' for name in found}
  # The names that others rely on, each once.
  expected = set()
  for name in ('agc', 'models', 'weights'):
    module = importlib.import_module(f'nfnets_jax.{name}')
    text = (pathlib.Path(module.__file__)).read_text()
    names = getattr(module, '__all__', re.findall(r' as (\w+)$', text, re.M))
    expected |= {f'nfnets_jax.{name}.{x}' for x in names}
  assert public == expected - {'nfnets_jax.weights.FORMS'}  # a constant


@pytest.mark.parametrize(
  'inventory', sorted(DOCS.glob('inventories/*.inv')), ids=lambda x: x.stem
)
def test_inventories_name_what_exists(inventory):
  lines = inventory.read_text().splitlines()
  assert lines[0] == '# Sphinx inventory version 1'
  for line in lines[3:]:
    name, kind, page = line.split()
    module, _, attribute = name.rpartition('.')
    found = getattr(importlib.import_module(module), attribute)
    assert kind == 'class' or not isinstance(found, type), line
    assert callable(found) and page.endswith('.html'), line


def test_pages_are_in_a_list_of_contents():
  listed = set()
  for page in PAGES:
    trees = re.findall(
      r'^```{toctree}\n(.*?)^```', page.read_text(), re.M | re.S
    )
    for tree in trees:
      for line in tree.splitlines():
        if line and not line.startswith(':'):
          listed |= {
            x.resolve() for x in page.parent.glob(f'{line}.*') if x in PAGES
          }
  assert {x.resolve() for x in PAGES} - listed == {DOCS / 'index.md'}
