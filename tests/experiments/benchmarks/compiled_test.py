from experiments.benchmarks import compiled


def test_table_of_both_forms():
  released = {
    'seconds': 0.032, 'cycles_seconds': 0.05, 'bytes': 9e9, 'traffic': 8e9,
    'temporaries': 2**30, 'compiling': 60.0,
  }  # fmt: skip
  ours = released | {'seconds': 0.016, 'cycles_seconds': None}
  head, _, *rows = compiled.table(released, ours).splitlines()
  assert head.startswith('|  | time, ms | cycles, ms | bytes, GB')
  assert rows == [
    '| released | 32.00 | 50.00 | 9.00 | 8.00 | 1.00 | 60.00 |',
    '| ours | 16.00 |  | 9.00 | 8.00 | 1.00 | 60.00 |',
    '| ratio | 0.500 |  | 1.000 | 1.000 | 1.000 | 1.000 |',
  ]
