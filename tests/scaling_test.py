"""The arithmetic of the scaling sheet."""

import json
import re

import pytest

from experiments.benchmarks import scaling

SYSTEM = scaling.System(
  'two speeds', flops=1e12, node=8, inside=100e9, outside=10e9, source='made up'
)
FLAT = SYSTEM._replace(node=1)
WORK = scaling.Work('nfnet_f0', gradient=8 * 10**9, flops=10**12)


def test_work_is_that_of_the_released_net(golden):
  families = json.loads((golden / 'families.json').read_text())
  work = scaling.work('nfnet_f0')
  assert work.gradient == 4 * families['NFNet/F0']['params']
  # 6.98 G multiply-accumulates at 192 px.
  assert work.flops / 6e9 == pytest.approx(6.98, abs=0.005)


@pytest.mark.parametrize(
  ('devices', 'factor'), [(1, 0), (2, 1), (8, 1.75), (4096, 2 - 2 / 4096)]
)
def test_ring_sends_all_but_one_part_twice(devices, factor):
  assert scaling.ring_bytes(1000, devices) == pytest.approx(1000 * factor)


@pytest.mark.parametrize(
  ('devices', 'inside', 'outside'),
  [
    (1, 0, 0),
    (4, 1.5 * 8, 0),
    (8, 1.75 * 8, 0),
    # An eighth of the bytes between nodes, in rings of one device a node.
    (16, 1.75 * 8, 1.0),
    (64, 1.75 * 8, 1.75),
  ],
)
def test_all_reduce_inside_and_between_nodes(devices, inside, outside):
  seconds = scaling.reduce_seconds(8e9, SYSTEM, devices)
  assert seconds == pytest.approx(inside / 100 + outside / 10)


def test_all_reduce_where_all_links_are_equal():
  for devices in scaling.DEVICES:
    expected = scaling.ring_bytes(8e9, devices) / 10e9
    assert scaling.reduce_seconds(8e9, FLAT, devices) == pytest.approx(expected)


def test_nodes_are_whole():
  with pytest.raises(ValueError, match='12 devices .* whole nodes of 8'):
    scaling.reduce_seconds(1, SYSTEM, 12)


def test_nodes_of_equal_links_send_as_much_as_one_ring():
  even = SYSTEM._replace(outside=SYSTEM.inside)
  for devices in scaling.DEVICES:
    assert scaling.reduce_seconds(8e9, even, devices) == pytest.approx(
      scaling.ring_bytes(8e9, devices) / even.inside
    )


@pytest.mark.parametrize(
  ('compute', 'reduce', 'expected'),
  [(1, 0, (1, 1)), (3, 1, (0.75, 1)), (1, 1, (0.5, 1)), (1, 4, (0.2, 0.25))],
)
def test_efficiency(compute, reduce, expected):
  assert scaling.efficiency(compute, reduce) == pytest.approx(expected)


def test_time_of_the_paper_on_tpu():
  """The utilisation assumed of a TPUv3 core is what F1 had."""
  f1 = scaling.Work('nfnet_f1', gradient=0, flops=round(6 * 17.44e9))
  seconds = scaling.compute_seconds(f1, scaling.SYSTEMS[-1], images=32)
  assert seconds == pytest.approx(0.1585, rel=0.02)


def test_report():
  text = scaling.report([WORK], images=32)
  assert text.startswith('Calculated, not measured')
  assert 'batch sizes are 256, 2,048, 16,384, 131,072' in text
  assert '| F0 | 8,000.0 | 14,000.0 | 15,996.1 | 1,000.0 | 32.00 |' in text
  tables = [line for line in text.splitlines() if line.startswith('| F0')]
  assert len(tables) == 1 + len(scaling.SYSTEMS)
  # 32 TFLOP at 346 TFLOP/s; 14 GB at 450 GB/s.
  assert '| F0 | 74.8 / 100.0 (31.1 ms) |' in tables[1]


def _compiled(**changes):
  step = {
    'seconds': 0.01,
    'cycle_seconds': 0.02,
    'collective_bytes': 280e6,
    'overlapped_bytes': 0,
  }
  return {
    'model': 'nfnet_f0',
    'topology': 'v3:4x4',
    'fits': True,
    'per_device_batch': 32,
    'training': step | changes,
  }


def _shares(result):
  row = scaling.compiled_report([result]).splitlines()[2]
  return [float(x) for x in re.findall(r'([0-9.]+) %', row)]


def test_compiled_steps_wait_for_what_is_not_overlapped():
  # 280 MB in a ring of eight: 490 MB at 140 GB/s, 3.5 ms after 20.
  assert _shares(_compiled())[0] == pytest.approx(100 * 20 / 23.5, abs=0.1)
  overlapped = _compiled(overlapped_bytes=280e6)
  assert _shares(overlapped) == [100.0] * len(scaling.DEVICES)
  # XLA for GPUs counts no cycles.
  assert _shares(_compiled(cycle_seconds=None))[0] == pytest.approx(
    100 * 10 / 13.5, abs=0.1
  )


def test_compiled_results_are_read_from_files(tmp_path, capsys):
  result = _compiled()
  paths = [tmp_path / 'result.json', tmp_path / 'cell.json']
  paths[0].write_text(json.dumps(result))
  paths[1].write_text(json.dumps({'command': [], 'result': result}))
  scaling.main(['--compiled', *map(str, paths)])
  expected = scaling.compiled_report([result, result])
  assert capsys.readouterr().out == expected
  for text in ('[]', '{}', 'x'):
    paths[0].write_text(text)
    with pytest.raises(ValueError, match='is not a result of nfnets_jax.comp'):
      scaling.read_compiled(str(paths[0]))


def test_compiled_steps_that_tell_nothing():
  with pytest.raises(ValueError, match='nfnet_f0 does not fit on v3:4x4'):
    scaling.compiled_report([_compiled() | {'fits': False}])
  with pytest.raises(ValueError, match='the links of v5e:8x8 are not known'):
    scaling.compiled_report([_compiled() | {'topology': 'v5e:8x8'}])
