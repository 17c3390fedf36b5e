"""Crops keep their promises."""

import numpy as np
import pytest

from nfnets_jax.data import crops


def position_image(height, width):
  """An image whose every pixel says where it is."""
  rows, columns = np.mgrid[:height, :width]
  return np.stack([rows, columns, np.ones_like(rows)], axis=-1).astype(np.uint8)


def crop_of(image, rng, *args, **kwargs):
  uniform = rng.random(crops.NUM_DRAWS)
  return crops.random_resized_crop(image, uniform, *args, **kwargs)


@pytest.mark.parametrize('min_area', [0.1, 0.25])
def test_random_resized_crop_keeps_its_promises(min_area):
  height, width = 120, 200
  image = position_image(height, width)
  rng = np.random.default_rng(0)
  areas, corners = [], set()
  for _ in range(2000):
    crop = crop_of(image, rng, min_area)
    h, w, _ = crop.shape
    top, left = crop[0, 0, :2].astype(int)
    np.testing.assert_array_equal(
      crop, image[top : top + h, left : left + w], strict=True
    )
    # The width is rounded to whole pixels.
    assert (w + 0.5) / h >= 3 / 4 and (w - 0.5) / h <= 4 / 3
    areas.append(h * w / (height * width))
    corners.add((int(top), int(left)))
  assert min_area <= min(areas) < min_area + 0.02
  assert 0.7 < max(areas) <= 0.8  # the whole height at 4 : 3
  assert len(corners) > 1000


def test_random_resized_crop_falls_back_to_the_center():
  image = position_image(120, 200)
  # No box of those ratios covers so much of it.
  crop = crop_of(image, np.random.default_rng(0), 0.9)
  np.testing.assert_array_equal(crop, image[:, 40:160])


def test_random_resized_crop_of_extreme_shapes():
  rng = np.random.default_rng(0)
  for height, width in (1, 1), (1, 50), (50, 1), (2, 3), (10, 300):
    image = position_image(height, width)
    for _ in range(20):
      h, w, _ = crop_of(image, rng).shape
      assert 1 <= h <= height
      assert 1 <= w <= width


def test_pad_crop_shifts_evenly_and_pads_with_black():
  image = position_image(6, 7)
  rng = np.random.default_rng(0)
  shifts = []
  for _ in range(900):
    (crop,) = crops.pad_crop(image[None], rng.random((1, 2)), pixels=1)
    assert crop.shape == image.shape
    top, left = crop[2, 2, :2].astype(int) - 2
    rolled = np.roll(image, (-top, -left), axis=(0, 1))
    inside = crop[..., 2] == 1
    np.testing.assert_array_equal(crop, rolled * inside[..., None])
    assert inside.sum() == (6 - abs(top)) * (7 - abs(left))
    shifts.append((top, left))
  _, counts = np.unique(shifts, axis=0, return_counts=True)
  assert len(counts) == 9
  assert counts.min() > 65 and counts.max() < 135  # 100 expected


def test_pad_crop_by_more_than_the_image():
  rng = np.random.default_rng(0)
  images = np.ones((99, 2, 3, 3))
  moved = crops.pad_crop(images, rng.random((99, 2)), 9)
  sums = {image.sum() / 3 for image in moved}
  assert sums <= {0, 1, 2, 3, 4, 6} and 0 in sums


@pytest.mark.parametrize(
  'crop',
  ['', 'random', 'random_resized_0', 'random_resized_2', 'pad', 'pad_1.5'],
)
def test_unknown_training_crop_lists_the_choices(crop):
  with pytest.raises(ValueError, match='random_resized_AREA, pad_PIXELS, none'):
    crops.train_crop(crop, 32)


@pytest.mark.parametrize(
  'crop', ['', 'none', 'resize_crop', 'resize_crop_0.0', 'resize_crop_1.5']
)
def test_unknown_evaluation_crop_lists_the_choices(crop):
  with pytest.raises(ValueError, match=r'resize_crop_PIXELS, .*, resize '):
    crops.eval_crop(crop, 32)


def test_evaluation_crops_take_the_right_part():
  whole = position_image(100, 200)

  def seen(crop, px=32):
    """The first and last row and column of the original that show."""
    pixels = crops.eval_crop(crop, px)(whole)
    assert pixels.shape == (px, px, 3)
    rows, columns = pixels[:, 0, 0], pixels[0, :, 1]
    return [int(x) for x in (rows[0], rows[-1], columns[0], columns[-1])]

  half_row, half_column = 100 / 64 / 2, 200 / 64 / 2
  assert seen('resize_crop_32') == pytest.approx(
    [25 + half_row, 75 - half_row, 50 + half_column, 150 - half_column], abs=1.5
  )
  assert seen('resize_crop_0.5') == seen('resize_crop_32')
  assert seen('crop_resize') == pytest.approx([25, 74, 75, 124], abs=1)
  assert seen('resize') == seen('resize_crop_0') == seen('resize_crop_1.0')
  assert seen('resize') == pytest.approx([1, 98, 3, 196], abs=1.5)


def test_a_crop_of_the_whole_image_is_the_central_square():
  for size in (1, 1), (3, 3), (3, 4):
    crops = {
      crop_of(
        position_image(*size), np.random.default_rng(seed), 1.0, center=0.5
      ).shape
      for seed in range(20)
    }
    assert crops == {(1, 1, 3)}
