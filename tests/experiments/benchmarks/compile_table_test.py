"""The table of cells that are made, and of which are not made again."""

import json

import pytest

from experiments.benchmarks import compile_nets, compile_table
from experiments.reproduce import cost, latency_table
from experiments.reproduce.claims import latency
from nfnets_jax import topologies

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


def _net(variant, batch=4096):
  (net,) = compile_nets.batch_nets([variant], batch)
  return net


def _keep(output, net, topology, result):
  arguments = compile_table.command(net, topology, [])
  output.mkdir(exist_ok=True)
  path = cost.cell_file(output, net.name, topology)
  path.write_text(json.dumps({'command': arguments, 'result': result}))
  return path


def test_nets_that_are_compiled_in_given_micro_batches():
  f1, f6 = compile_nets.batch_nets(['F1', 'F6'], 4096)
  assert not f1.overrides
  without_sam, in_parts = f6.overrides
  assert without_sam == '--config.optimizer.sam_rho=None'
  assert in_parts == '--config.micro_batches=16'
  (f6,) = compile_nets.batch_nets(['F6'], 512)
  assert f6.overrides == [without_sam]


def test_table_of_what_is_kept(tmp_path, capsys):
  _keep(tmp_path, _net('F1'), 'v3:4x4', _FITS)
  _keep(tmp_path, _net('F6'), 'v5e:8x8', _TOO_LARGE)
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
  path = _keep(tmp_path, _net('F1'), 'v3:4x4', _FITS)
  arguments = compile_table.command(_net('F1', 1024), 'v3:4x4', [])
  with pytest.raises(ValueError, match='made by other arguments, .*=4096'):
    compile_table.make(path, 'python', arguments)


def test_overrides_reach_the_command(tmp_path, capsys):
  _keep(tmp_path, _net('F1'), 'v3:4x4', _FITS)
  arguments = [f'--output={tmp_path}', '--kept']
  with pytest.raises(SystemExit, match='made by other arguments'):
    compile_table.main([*arguments, '--config.remat=block'])
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


def test_less_effort_reaches_the_compiler_and_is_kept(tmp_path):
  python = tmp_path / 'python'
  python.write_text(
    '#!/bin/sh\ntest "$JAX_EXEC_TIME_OPTIMIZATION_EFFORT" = -1.0 || exit 3\n'
    f"cat <<'END'\n{json.dumps(_FITS)}\nEND\n"
  )
  python.chmod(0o755)
  path, arguments = tmp_path / 'a.json', ['-m', 'it']
  with pytest.raises(ValueError, match='failed with code 3'):
    compile_table.make(path, str(python), arguments)
  made = compile_table.make(path, str(python), arguments, less_effort=True)
  assert made['training']['cycle_seconds'] is None
  assert made['training']['seconds'] == _FITS['training']['seconds']
  with pytest.raises(
    ValueError, match='other arguments, JAX_EXEC_TIME.* -m it'
  ):
    compile_table.make(path, str(python), arguments)


def test_claims_choose_their_own_steps(tmp_path, capsys):
  with pytest.raises(SystemExit):
    compile_table.main([f'--output={tmp_path}', '--claims', '--nets', 'F0'])
  assert '--claims takes no --nets' in capsys.readouterr().err
  with pytest.raises(SystemExit):
    compile_table.main([f'--output={tmp_path}', '--latency', '--less_effort'])
  assert '--latency takes no --less_effort' in capsys.readouterr().err


def test_failed_cells_do_not_stop_the_others(tmp_path, capsys):
  python = tmp_path / 'python'
  python.write_text(
    '#!/bin/sh\ncase "$*" in *F0*) exit 3;; esac\n'
    f"cat <<'END'\n{json.dumps(_TOO_LARGE)}\nEND\n"
  )
  python.chmod(0o755)
  arguments = [f'--output={tmp_path}', f'--tpu_python={python}']
  arguments += ['--nets', 'F0', 'F1', '--topologies', 'v3:4x4']
  with pytest.raises(SystemExit, match='F0 on v3:4x4: .* failed with code 3'):
    compile_table.main(arguments)
  assert 'F1' in capsys.readouterr().out
  assert [x.name for x in tmp_path.glob('*.json')] == ['F1,v3_4x4.json']


def test_latency_has_the_batch_of_the_paper():
  nets = compile_nets.latency_nets(latency.COMPILED)
  assert {*latency.MODELS} < {net.name for net in nets}
  for net in nets:
    arguments = compile_table.command(net, 'v3:4x4', [])
    assert '--config.batch_size=1024' in arguments
    assert '--config.compute_dtype=bfloat16' in arguments
  by_name = {net.name: net for net in nets}
  assert '--config.optimizer.sam_rho=None' in by_name['nfnet_f5'].overrides
  assert '--config.batch_size=32' in compile_table.command(
    by_name['resnet50'], 'h100', []
  )
  for kind in topologies.KINDS.values():
    assert compile_nets.count_devices(kind.example) > 0


def test_latency_of_the_compilers_is_in_the_report(tmp_path):
  result = {'params': 1e6, 'gmacs_test': 1.0, 'size': 32}
  used = {'nfnet_f0': result, 'nfnet_f1': result}
  head, *empty = latency_table.table('paper', used, tmp_path)
  column = head.index('compiler for v3:4x4, ÷ F1 (ms)')
  assert [row[column] for row in empty] == ['', '']
  f0, f1 = compile_nets.latency_nets([*used])
  faster = _FITS | {'training': _FITS['training'] | {'cycle_seconds': 0.1}}
  _keep(tmp_path / 'latency', f0, 'v3:4x4', faster)
  _keep(tmp_path / 'latency', f1, 'v3:4x4', _FITS)
  _keep(tmp_path / 'latency', f1, 'h100', _TOO_LARGE)
  head, *rows = latency_table.table('paper', used, tmp_path)
  assert [row[column] for row in rows] == ['0.25 (100.0)', '1.00 (400.0)']
  assert [row[column + 1] for row in rows] == ['', '']
  # The same columns as without the second measurement.
  assert {len(row) for row in (head, *rows)} == {len(head)}
  small = latency_table.table('small', used, tmp_path)
  assert {len(row) for row in small} == {len(head) - 1}
