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


def test_a_round_takes_at_least_three_tenths_of_a_second():
  counts = []

  def run(count):
    counts.append(count)
    return 0.05 if len(counts) < 4 else 0.07

  times = common.measure_steps(run)
  assert counts == [1, 6, 6, 6, 6, 6]
  assert times['rounds'] == [0.05, 0.05, 0.07, 0.07, 0.07]
  assert times['seconds'] == 0.07
