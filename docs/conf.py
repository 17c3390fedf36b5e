"""Sphinx's configuration of the site; `make docs` builds it."""

import pathlib
import re
import sys

import chex
from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.util.typing import stringify_annotation

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

import nfnets_jax  # noqa: E402

project = 'nfnets_jax'
author = 'the nfnets_jax authors'
version = release = nfnets_jax.__version__

extensions = [
  'myst_parser',
  'sphinx.ext.autodoc',
  'sphinx.ext.intersphinx',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
  'sphinx_copybutton',
]
exclude_patterns = ['_build']
nitpicky = True

myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3

html_theme = 'sphinx_book_theme'
html_title = f'nfnets_jax {version}'
html_static_path = ['_static']
html_css_files = ['site.css']
html_theme_options = {
  'home_page_in_toc': True,
  'navbar_persistent': [],
  'show_toc_level': 2,
  'use_download_button': False,
  'use_fullscreen_button': False,
}
html_math_renderer = 'mathml'

python_maximum_signature_line_length = 72
autodoc_member_order = 'bysource'
autodoc_typehints_format = 'short'
autoclass_content = 'both'
napoleon_custom_sections = ['Differences', 'Reference']
napoleon_use_ivar = True
# `name` in a docstring links to what has that name, and is code otherwise.
default_role = 'py:obj'
nitpick_ignore_regex = [
  (r'py:(obj|exc)', r'(?s).*'),
  (r'py:class', r'ArrayTree'),
  # Types of packages whose documents have no such page, and of private modules.
  (r'py:.*', r'(chex|etils|jax|jmp|ml_collections|tensorflow_datasets)\..*'),
  (r'py:.*', r'nfnets_jax\.(data|runtime|training)\..*'),
]

# Committed, so that a build needs no network. `# Sphinx inventory version 1` is
# plain text: a name, its kind, and the page where it is an anchor.
intersphinx_mapping = {
  name: (url, f'inventories/{name}.inv')
  for name, url in {
    'haiku': 'https://dm-haiku.readthedocs.io/en/latest',
    'jax': 'https://docs.jax.dev/en/latest',
    'numpy': 'https://numpy.org/doc/stable',
    'optax': 'https://optax.readthedocs.io/en/latest',
    'python': 'https://docs.python.org/3',
  }.items()
}
# Where autodoc finds an object, or what our docstrings call it: its page.
_PUBLIC = {
  r'hk\.': 'haiku.',
  r'haiku\._src\.\w+\.': 'haiku.',
  r'jnp\.': 'jax.numpy.',
  r'(jax\.)?jaxlib\._jax\.': 'jax.',
  r'jax\._src\.stages\.': 'jax.stages.',
  r'optax\._src\.\w+\.': 'optax.',
}
# Aliases that autodoc would write out.
_ALIASES = {
  stringify_annotation(getattr(chex, name), 'smart'): f'~chex.{name}'
  for name in ('ArrayTree', 'Array', 'Numeric')
}


# Documents outside of this folder, and the pages that include them.
_INCLUDED = {
  'CHANGELOG.md': 'changelog.md',
  'CONTRIBUTING.md': 'contributing.md',
  'experiments/benchmarks/NOTES.md': 'notes.md',
  'experiments/launch/README.md': 'launch.md',
  'experiments/reproduce/small/report.md': 'results/claims.md',
}


def _source(app, page, source):
  """Links to the page that includes a document instead of the document."""
  folder = (DOCS / page).parent
  up = '../' * page.count('/')

  def link(match):
    target = (folder / match[1]).resolve()
    included = target.is_relative_to(ROOT) and _INCLUDED.get(
      str(target.relative_to(ROOT))
    )
    return f']({up}{included}' if included else match[0]

  source[0] = re.sub(r'\]\(([\w./-]+\.md)', link, source[0])


def _signature(app, what, name, obj, options, signature, returns):
  """Names the aliases in a signature."""
  del app, what, name, obj, options

  def named(text):
    for written_out, alias in _ALIASES.items():
      text = text and text.replace(written_out, alias)
    return text

  return named(signature), named(returns)


def _public(app, env, node, contnode):
  """Looks for public names, in `intersphinx` after this."""
  del app, env, contnode
  target = node.get('reftarget', '')
  for private, public in _PUBLIC.items():
    target = re.sub(f'^{private}', public, target)
  node['reftarget'] = target


def _docstring(app, what, name, obj, options, lines):
  """Makes reStructuredText of a docstring, before `napoleon` reads it.

  Our docstrings have Markdown's code and bullets, and indented equations.
  """
  del app, what, name, obj, options
  doctest = r'(^ *>>>.*(?:\n *\S.*)*)'
  parts = re.split(doctest, '\n'.join(lines), flags=re.MULTILINE)
  parts[::2] = map(_restructured, parts[::2])
  lines[:] = ''.join(parts).split('\n')


def _restructured(text):
  code = re.split(r'(`[^`]*`)', text)
  code[::2] = [re.sub(r'([*|\\]|_(?!\w))', r'\\\1', x) for x in code[::2]]
  # Code may be part of a word: `jax.Array`s.
  code[2::2] = [re.sub(r'^(?=\w)', r'\\ ', x) for x in code[2::2]]
  text = ''.join(code)
  for pattern, replacement in (
    (r'^( *)\\\* ', r'\1* '),  # a bullet
    # A list needs an empty line before it, and an equation a double colon.
    (r'^( *)(?!\* )(\S.*)\n(?=\1 *\* )', r'\1\2\n\n'),
    (r'^( *)(\S.*):\n\n(?=\1 +(?!>>>|\* )\S)', r'\1\2::\n\n'),
    # Or napoleon takes what is before a colon for a type.
    (r'^( *)(Returns|Yields):\n( +)', r'\1\2:\n\3\\\n\3'),
  ):
    text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
  return text


def _math(self, node):
  """Writes MathML, which needs neither a script nor a network."""
  block = node.tagname == 'math_block'
  element = latex2mathml.tex2mathml(node.astext(), as_block=block)
  if block:
    element = f'<div class="equation">{element}</div>'
  self.body.append(element)
  raise nodes.SkipNode


def setup(app):
  """Connects the functions above."""
  app.connect('source-read', _source)
  app.connect('autodoc-process-docstring', _docstring, priority=400)
  app.connect('autodoc-process-signature', _signature)
  app.connect('missing-reference', _public, priority=400)
  app.add_html_math_renderer('mathml', (_math, None), (_math, None))
