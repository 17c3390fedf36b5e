import pytest

from experiments.figures import tables
from nfnets_jax.models import variants
from tests.commands import ROOT


@pytest.mark.parametrize(
  'name', ['nfnet_f0', 'nf_resnet50', 'efficientnet_b0', 'nfnet_tiny']
)
def test_docs_have_the_table_of_today(name):
  """If not: make tables."""
  assert tables.row(name) in (ROOT / 'docs/models.md').read_text().splitlines()


@pytest.mark.slow
def test_docs_have_the_whole_table_of_today():
  lines = (ROOT / 'docs/models.md').read_text().splitlines()
  rows = [line for line in lines if line.startswith('| `')]
  assert rows == [tables.row(name) for name in variants.VARIANTS]
