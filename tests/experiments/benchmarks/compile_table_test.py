"""The table of cells that are made, and of which are not made again."""

import json

import pytest

from experiments.benchmarks import compile_table

_FITS = {
  'fits': True,
  'compiler': 'jax 1.2.3',
  'devices': 32,
  'per_device_batch': 128,
  'micro_batches': 2,
  'device_memory': 16 * 2**30,
  'images_per_second': 12345.6,
  'days': 0.789,
  'training': {
    'total': 12 * 2**30,
    'seconds': 0.2,
    'cycle_seconds': 0.4,
    'bound': 'memory',
    'collective_bytes': 530e6,
    'overlapped_bytes': 0,
    'compile_seconds': 600.0,
  },
}
_TOO_LARGE = {
  'fits': False,
  'devices': 64,
  'per_device_batch': 64,
  'remedy': {'micro_batches': 8, 'remat': 'block', 'bytes': 1},
}


def _keep(output, variant, topology, result):
  arguments = compile_table.command(variant, topology, 4096, [])
  path = compile_table.cell_file(output, variant, topology)
  path.write_text(json.dumps({'command': arguments, 'result': result}))
  return path


def test_table_of_what_is_kept(tmp_path, capsys):
  _keep(tmp_path, 'F1', 'v3:4x4', _FITS)
  _keep(tmp_path, 'F6', 'v5e:8x8', _TOO_LARGE)
  compile_table.main([f'--output={tmp_path}', '--kept'])
  rows = capsys.readouterr().out.splitlines()[2:]
  assert len(rows) == 2
  cells = [x.strip() for x in rows[0].split('|')[1:-1]]
  assert cells[:6] == [
    *('F1', 'v3:4x4: 32 × 128', '2', '12.00 of 16.00', '200.0', '400.0')
  ]
  # A quarter of the images; the paper's 158.5 ms.
  assert cells[7:9] == ['100.0', '158.5']
  assert 'does not fit; 8, remat block would' in rows[1]
  assert {row.count('|') for row in rows} == {len(cells) + 1}


def test_cell_of_other_arguments_is_refused(tmp_path):
  path = _keep(tmp_path, 'F1', 'v3:4x4', _FITS)
  arguments = compile_table.command('F1', 'v3:4x4', 1024, [])
  with pytest.raises(ValueError, match='made by other arguments, .*=4096'):
    compile_table.make(path, 'python', arguments)


def test_overrides_reach_the_command(tmp_path, capsys):
  _keep(tmp_path, 'F1', 'v3:4x4', _FITS)
  arguments = [f'--output={tmp_path}', '--kept']
  with pytest.raises(SystemExit):
    compile_table.main([*arguments, '--config.remat=block'])
  error = capsys.readouterr().err
  assert 'made by other arguments' in error or 'other sources' in error
  with pytest.raises(SystemExit):
    compile_table.main([*arguments, '--remat=block'])
  assert 'unrecognized argument: --remat=block' in capsys.readouterr().err


def test_cell_is_made_once(tmp_path):
  """By another command here, which says how often it was run."""
  python = tmp_path / 'python'
  python.write_text(f'#!/bin/sh\necho x >> {tmp_path}/calls\necho "{{}}"\n')
  python.chmod(0o755)
  for _ in range(2):
    assert (
      compile_table.make(tmp_path / 'a.json', str(python), ['-m', 'it']) == {}
    )
  assert (tmp_path / 'calls').read_text() == 'x\n'
  python.write_text('#!/bin/sh\nexit 3\n')
  with pytest.raises(ValueError, match='-m it failed with code 3'):
    compile_table.make(tmp_path / 'b.json', str(python), ['-m', 'it'])
  assert not (tmp_path / 'b.json').exists()
