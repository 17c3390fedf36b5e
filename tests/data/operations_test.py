"""Operations against the released code, Pillow and formulas; magnitudes."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from nfnets_jax.data import operations

HEIGHT, WIDTH = 24, 32


@pytest.fixture(scope='module')
def image():
  """Smooth shapes, noise, a flat corner; each channel has its own range."""
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:HEIGHT, :WIDTH] / 8.0
  base = np.stack([np.sin(x + y), np.cos(x - y), np.sin(x * y)], -1)
  base = 120 + base * [60, 80, 110] + rng.normal(0, 5, base.shape)
  base[:8, :8] = [40, 200, 100]
  return np.clip(base, 5, 245).astype(np.uint8)


def _run(image, name, argument=0.0, center=(0, 0)):
  before = image.copy()
  result = operations.apply(name, image, argument, center)
  assert result.dtype == np.uint8
  np.testing.assert_array_equal(image, before)
  return result.astype(int)


def test_released_outputs(shared):
  """All fifteen deterministic operations, both signs, three magnitudes."""
  path = shared / 'reference' / 'golden' / 'randaugment.npz'
  if not path.exists():
    pytest.skip(f'no golden outputs in {path.parent.name}/')
  with np.load(path) as file:
    golden = dict(file)
  for source in ('10', '500'):
    for magnitude in (5, 10, 15):
      for name in operations.OPERATIONS:
        if name == 'Cutout':
          continue
        for sign in ('+', '-') if name in operations.SIGNED else ('+',):
          argument = operations.argument(name, magnitude)
          argument = argument if sign == '+' else -argument
          result = _run(golden[f'{source}/input'], name, argument)
          key = f'{source}/{name}/{magnitude}/{sign}'
          difference = np.abs(result - golden[key])
          # Whole numbers, where float32 may give a level more or less.
          assert difference.max() <= (name == 'AutoContrast'), key


@pytest.mark.parametrize(
  ('name', 'at_5', 'at_10', 'at_15'),
  [
    ('AutoContrast', 0, 0, 0),
    ('Equalize', 0, 0, 0),
    ('Invert', 0, 0, 0),
    ('Rotate', 15, 30, 45),
    ('Posterize', 2, 4, 6),
    ('Solarize', 128, 256, 384),
    ('Color', 1.0, 1.9, 2.8),
    ('Contrast', 1.0, 1.9, 2.8),
    ('Brightness', 1.0, 1.9, 2.8),
    ('Sharpness', 1.0, 1.9, 2.8),
    ('ShearX', 0.15, 0.3, 0.45),
    ('ShearY', 0.15, 0.3, 0.45),
    ('TranslateX', 50, 100, 150),
    ('TranslateY', 50, 100, 150),
    ('Cutout', 20, 40, 60),
    ('SolarizeAdd', 55, 110, 165),
  ],
)
def test_arguments_are_those_of_the_recipe(name, at_5, at_10, at_15):
  arguments = [operations.argument(name, m) for m in (5, 10, 15)]
  assert arguments == pytest.approx([at_5, at_10, at_15])


def test_argument_rejects_what_it_does_not_know():
  with pytest.raises(ValueError, match=r'magnitude 31 is not in 0\.\.30'):
    operations.argument('Rotate', 31)
  with pytest.raises(ValueError, match=r'magnitude -1 is not in 0\.\.30'):
    operations.argument('Rotate', -1)
  with pytest.raises(ValueError, match="'Blur' is not one of AutoContrast"):
    operations.argument('Blur', 5)
  with pytest.raises(ValueError, match="'Blur' is not one of AutoContrast"):
    operations.apply('Blur', np.zeros((2, 2, 3), np.uint8), 5, (0, 0))


def _truncate(x):
  return np.clip(x, 0, 255).astype(int)


def _at(image, x, y):
  """The pixels at the nearest whole coordinates, 128 outside the image."""
  x, y = np.rint(x).astype(int), np.rint(y).astype(int)
  inside = (x >= 0) & (x < WIDTH) & (y >= 0) & (y < HEIGHT)
  pixels = image[np.clip(y, 0, HEIGHT - 1), np.clip(x, 0, WIDTH - 1)]
  return np.where(inside[..., None], pixels, 128).astype(int)


@pytest.mark.parametrize(
  ('name', 'argument', 'oracle', 'tolerance'),
  [
    ('AutoContrast', 0, ImageOps.autocontrast, 1),
    ('Equalize', 0, ImageOps.equalize, 0),
    ('Invert', 0, ImageOps.invert, 0),
    ('Posterize', 2, lambda x: ImageOps.posterize(x, 2), 0),
    ('Posterize', 0, lambda x: ImageOps.posterize(x, 1), 0),
    ('Solarize', 128, lambda x: ImageOps.solarize(x, 128), 0),
    ('Solarize', 384, lambda x: ImageOps.solarize(x, 128), 0),
    ('Solarize', 256, ImageOps.invert, 0),
  ],
)
def test_agrees_with_pillow(image, name, argument, oracle, tolerance):
  result = _run(image, name, argument)
  expected = np.asarray(oracle(Image.fromarray(image))).astype(int)
  np.testing.assert_allclose(result, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
  ('name', 'argument', 'oracle'),
  [
    ('SolarizeAdd', 110, lambda x: np.where(x < 128, x + 110, x)),
    ('SolarizeAdd', 165, lambda x: np.where(x < 128, x + 165, x)),
    ('Brightness', 0.1, lambda x: 0.1 * x),
    ('Brightness', 1.9, lambda x: 1.9 * x),
    ('Contrast', 0.1, lambda x: 3 + 0.1 * (x - 3)),
    ('Contrast', 1.9, lambda x: 3 + 1.9 * (x - 3)),
    ('Contrast', 1.0, lambda x: x),
  ],
)
def test_is_the_formula(image, name, argument, oracle):
  result = _run(image, name, argument)
  expected = _truncate(oracle(image.astype(float)))
  np.testing.assert_allclose(result, expected, atol=1, rtol=0)


@pytest.mark.parametrize('name', ['AutoContrast', 'Equalize'])
def test_a_flat_image_stays(name):
  flat = np.full((HEIGHT, WIDTH, 3), (0, 100, 255), np.uint8)
  np.testing.assert_array_equal(_run(flat, name), flat)


@pytest.mark.parametrize('argument', [0.1, 1.0, 1.9, 2.8])
def test_color_blends_with_the_luma(image, argument):
  result = _run(image, 'Color', argument)
  pixels = image.astype(float)
  luma = pixels @ [0.2989, 0.587, 0.114] * 255.5 / 255
  grey = np.floor(luma)[..., None]
  expected = _truncate(grey + argument * (pixels - grey))
  np.testing.assert_allclose(result, expected, atol=1, rtol=0)


@pytest.mark.parametrize('argument', [0.1, 1.0, 1.9, 2.8])
def test_sharpness_blends_with_the_smoothed_image(image, argument):
  result = _run(image, 'Sharpness', argument)
  pixels = image.astype(int)
  smooth = pixels.copy()
  for y in range(1, HEIGHT - 1):
    for x in range(1, WIDTH - 1):
      total = pixels[y - 1 : y + 2, x - 1 : x + 2].sum((0, 1))
      smooth[y, x] = (total + 4 * pixels[y, x]) // 13
  expected = _truncate(smooth + argument * (pixels - smooth))
  # Where the mean is a whole number, float32 may make it one less.
  tolerance = 1 + abs(argument - 1)
  np.testing.assert_allclose(result, expected, atol=tolerance, rtol=0)
  assert np.mean(np.abs(result - expected) <= 1) > 0.99


@pytest.mark.parametrize('sign', [1, -1])
@pytest.mark.parametrize(
  ('name', 'argument'),
  [
    ('ShearX', 0.31),  # not 0.3: no pixel is half way between two
    ('ShearY', 0.31),
    ('TranslateX', 5),
    ('TranslateY', 5),
    ('TranslateX', 50),
    ('Rotate', 29),
    ('Rotate', 0),
  ],
)
def test_moves_pixels_by_the_map(image, name, argument, sign):
  argument *= sign
  y, x = np.mgrid[:HEIGHT, :WIDTH].astype(float)
  middle_x, middle_y = (WIDTH - 1) / 2, (HEIGHT - 1) / 2
  turn = np.exp(1j * np.deg2rad(argument))
  turned = (x - middle_x + 1j * (y - middle_y)) * turn
  expected = {
    'ShearX': lambda: _at(image, x + argument * y, y),
    'ShearY': lambda: _at(image, x, y + argument * x),
    'TranslateX': lambda: _at(image, x + argument, y),
    'TranslateY': lambda: _at(image, x, y + argument),
    'Rotate': lambda: _at(
      image, turned.real + middle_x, turned.imag + middle_y
    ),
  }[name]()
  result = _run(image, name, argument)
  assert np.mean(np.all(result == expected, -1)) > 0.995


@pytest.mark.parametrize('centre', [(12, 16), (0, 0), (23, 31), (2, 30)])
@pytest.mark.parametrize('half', [0, 4, 40])
def test_cutout_fills_a_box_clipped_at_the_borders(image, centre, half):
  (y, x), expected = centre, image.copy()
  expected[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 128
  result = _run(image, 'Cutout', half, centre)
  np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize('size', [(1, 1), (2, 5), (3, 3)])
@pytest.mark.parametrize('name', operations.OPERATIONS)
def test_tiny_images(name, size):
  image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
  argument = operations.argument(name, 10)
  assert _run(image, name, argument).shape == image.shape
