import math

from experiments.gpu import common


def test_results_survive_a_line_that_was_cut_off(output):
  common.add(1, 'first', value=1.0)
  common.check(1, 'small', 0.5, 1.0)
  common.check(1, 'not a number', math.nan, 1.0)
  with (output / 'results.jsonl').open('a') as file:
    file.write('{"part": 2, "wh')
  found = common.read(output / 'results.jsonl')
  assert [x['what'] for x in found] == ['first', 'small', 'not a number']
  assert [x.get('ok') for x in found] == [None, True, False]
