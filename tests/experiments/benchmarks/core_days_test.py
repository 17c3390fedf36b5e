"""Table 5 of the paper, and core-days of compiled steps."""

import json

import pytest

from experiments.benchmarks import core_days

_RESULT = {
  'model': 'nfnet_f4plus',
  'topology': 'v3:8x8',
  'compiler': 'jax 0.10.2',
  'devices': 128,
  'batch_size': 4096,
  'image_size': 224,
  'epochs': 20.0,
  'training': {'seconds': 0.9},
}


def _cells(text):
  rows = [x.split('|')[1:-1] for x in text.splitlines() if x[:1] == '|']
  return {row[0].strip(): [x.strip() for x in row[1:]] for row in rows}


def test_the_papers_numbers_follow_from_its_steps():
  # "Some 830 ms" and the cores are round numbers.
  for row in core_days.TABLE_5.values():
    if row.epochs is not None:
      found = core_days.core_days(
        core_days.IMAGES, row.epochs, 4096, row.step_ms / 1e3, 128
      )
      assert found == pytest.approx(row.core_days, rel=0.04)


def test_compiled_steps_beside_the_paper(tmp_path, capsys):
  file = tmp_path / 'f4plus.json'
  # As it is printed, and as `make compile-table` keeps it.
  for content in (_RESULT, {'command': [], 'result': _RESULT}):
    file.write_text(json.dumps(content))
    core_days.main([str(file)])
    text = capsys.readouterr().out
    assert text.startswith('300,000,000 images')
    cells = _cells(text)
    # 20 · 300 M / 4096 steps of 0.9 s on 128 cores.
    assert cells['nfnet_f4plus, 224 px'][-3:] == ['20', '900.0', '1,953']
    assert cells['nfnet_f4plus'][-1] == '1,860; 1,801 from its step'
    assert cells['ViT-L/16'] == ['the paper', '87.76', '', '', '', '', '680']
  core_days.main([str(file), '--images=3000000'])
  assert _cells(capsys.readouterr().out)['nfnet_f4plus, 224 px'][-1] == '20'


def test_a_file_without_an_estimate_is_an_error(tmp_path):
  with pytest.raises(SystemExit, match='error: FILE: there is no file .*gone'):
    core_days.main([str(tmp_path / 'gone.json')])
