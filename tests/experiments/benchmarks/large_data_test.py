"""The bench of large data sets writes, reads and reports."""

import pytest

from experiments.benchmarks import large_data


@pytest.mark.thorough
def test_table_of_large_data(capsys):
  options = '--files=20 --records=300 --workers=1 --epochs=0.5 --batches=2'
  large_data.main(options.split())
  head, _, small, large = capsys.readouterr().out.strip().splitlines()[-4:]
  cells = [[x.strip() for x in row.split('|')[1:-1]] for row in (small, large)]
  assert head.count('|') == len(cells[0]) + 1
  assert [x[:3] for x in cells] == [['300', '1', '0'], ['6,000', '1', '0.5']]
  # All files are open, each by one reader.
  assert int(cells[1][-1]) - int(cells[0][-1]) == 19
