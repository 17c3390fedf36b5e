"""The contact sheet of augmented images."""

import re

import numpy as np
import pytest
from PIL import Image

from experiments import digits
from experiments.figures import show_augment
from nfnets_jax.training import build
from tests import commands


@pytest.mark.thorough
def test_contact_sheet(tmp_path):
  output = tmp_path / 'new folder' / 'sheet.png'
  printed = commands.output(
    'experiments.figures.show_augment',
    '--config=experiments/digits.py',
    f'--config.data.data_dir={tmp_path}',
    '--config.augment.rand_augment=2x5',
    '--images=6',
    '--columns=4',
    f'--output={output}',
  )
  assert 'MixUp 0.2, CutMix, RandAugment 2x5' in printed
  with Image.open(output) as sheet:
    assert sheet.size == (680, 640)
    assert (np.asarray(sheet.convert('L')) < 255).mean() > 0.3


def test_tile_has_one_crop_without_mixing():
  image, *crops = np.random.default_rng(0).integers(
    200, size=(3, 8, 8, 3), dtype=np.uint8
  )
  for shown in (crops, crops[:1]):
    tile = show_augment.tile(image, np.stack(shown))
    np.testing.assert_array_equal(tile[:8], image)
    assert (tile[8:, :4] < 255).all()
    assert (tile[8:, 4:] == 255).all() == (len(shown) == 1)


@pytest.mark.thorough
def test_contact_sheet_names_a_missing_folder(tmp_path):
  done = commands.run(
    'experiments.figures.show_augment',
    f'--output={tmp_path / "sheet.png"}',
    '--config=experiments/nfnet_imagenet.py:F0',
    '--config.data.data_dir=no such folder',
  )
  assert done.returncode == 1
  assert re.search('^error: ', done.stderr, re.MULTILINE)
  assert 'no such folder' in done.stderr and 'Traceback' not in done.stderr


def test_contact_sheet_is_of_the_first_step(tmp_path):
  config = digits.get_config()
  config.data.data_dir = str(tmp_path)
  config.augment.rand_augment = '2x5'
  crops, images, labels, _ = show_augment.make_images(config, 6)
  config.data.num_workers = 0
  dataset, _ = build.load_data(config)
  batches = build.train_batches(config, dataset)
  batch = next(batches)
  batches.close()
  np.testing.assert_array_equal(images, batch['image'][:6])
  for i, (label, weights) in enumerate(
    zip(batch['label'], labels[:6], strict=False)
  ):
    assert weights.sum() == pytest.approx(1)
    assert weights[label] >= batch['ratio'][i] - 1e-6
  # Mixed by hand, they are what RandAugment was given.
  config.augment.rand_augment = None
  crops, images, _, _ = show_augment.make_images(config, 6)
  ratio = batch['ratio'][0]
  expected = ratio * crops[0, 0] + (1 - ratio) * crops[0, 1]
  np.testing.assert_array_equal(images[0], np.floor(expected + 0.5))
