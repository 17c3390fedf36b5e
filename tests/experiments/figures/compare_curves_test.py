import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from experiments.figures import compare_curves


def _run(folder, shift):
  folder.mkdir()
  lines = [
    {'step': step, 'split': split, 'loss': 2 - step / 10, **more}
    for step in range(1, 5)
    for split, more in (
      ('train', {}),
      ('test', {'eval_top_1': step / 10 + shift}),
    )
  ]
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (folder / 'metrics.jsonl').write_text(text)
  return folder


def test_runs_are_drawn_in_one_picture(tmp_path):
  runs = {'a': _run(tmp_path / 'a', 0.0), 'b': _run(tmp_path / 'b', 0.2)}
  pictures = []
  for count in (1, 2):
    output = tmp_path / f'{count}.png'
    compare_curves.draw(dict(list(runs.items())[:count]), output)
    with Image.open(output) as picture:
      pictures.append(np.asarray(picture.convert('RGB')))
  assert pictures[0].shape == pictures[1].shape
  assert (pictures[0] != pictures[1]).any()


def test_folder_without_a_run_is_named(tmp_path):
  with pytest.raises(ValueError, match='no evaluated run in .*nowhere'):
    compare_curves.draw({'x': tmp_path / 'nowhere'}, pathlib.Path('x.png'))
