"""Operations against the outputs of the released code, and their magnitudes."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from nfnets_jax.augment import operations

GEOMETRIC = ('Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY')


def _keys(n):
  return jax.random.split(jax.random.key(0), n)


def test_released_outputs(shared):
  """All fifteen deterministic operations, both signs, three magnitudes."""
  path = shared / 'reference' / 'golden' / 'randaugment.npz'
  if not path.exists():
    pytest.skip(f'no golden outputs in {path.parent.name}/')
  with np.load(path) as file:
    golden = dict(file)
  apply = jax.jit(operations.apply_operations)
  for source in ('10', '500'):
    for magnitude in (5, 10, 15):
      cases = [
        (name, sign)
        for name in operations.OPERATIONS
        for sign in ('+', '-' if name in GEOMETRIC else None)
        if name != 'Cutout' and sign
      ]
      results = apply(
        jnp.stack([golden[f'{source}/input']] * len(cases)),
        jnp.array([operations.OPERATIONS.index(name) for name, _ in cases]),
        jnp.array(
          [
            operations.argument(name, magnitude) * (1 if sign == '+' else -1)
            for name, sign in cases
          ],
          jnp.float32,
        ),
        jnp.zeros((len(cases), 2), jnp.int32),
      )
      for (name, sign), result in zip(cases, results, strict=True):
        key = f'{source}/{name}/{magnitude}/{sign}'
        difference = np.abs(np.asarray(result).astype(int) - golden[key])
        if name in GEOMETRIC:
          assert np.mean(np.all(difference == 0, -1)) >= 0.99, key
        else:
          assert difference.max() <= 1, key


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
  with pytest.raises(ValueError, match=r'magnitude 21 is not in 0\.\.20'):
    operations.argument('Rotate', 21)
  with pytest.raises(ValueError, match=r'magnitude -1 is not in 0\.\.20'):
    operations.argument('Rotate', -1)
  with pytest.raises(ValueError, match="'Blur' is not one of AutoContrast"):
    operations.argument('Blur', 5)


def test_no_operation_leaves_the_image():
  images = np.random.default_rng(0).integers(0, 256, (2, 9, 7, 3), np.uint8)
  result = jax.jit(operations.apply_operations)(
    jnp.asarray(images),
    jnp.full(2, -1),
    jnp.full(2, 30.0),
    jnp.zeros((2, 2), jnp.int32),
  )
  np.testing.assert_array_equal(result, images)


def test_sign_and_centre_are_uniform():
  n, height, width = 8192, 4, 6
  negative, centre = operations.draw_sign_and_centre(_keys(n), height, width)
  y, x = np.asarray(centre).T
  place = (np.asarray(negative) * height + y) * width + x
  counts = np.bincount(place, minlength=2 * height * width)
  assert counts.size == 2 * height * width
  expected = n / counts.size
  # Chi-square with 47 degrees of freedom: above 92 once in 10,000 times.
  assert np.sum((counts - expected) ** 2 / expected) < 92


def test_distort_gives_signed_arguments_their_sign_and_others_none():
  n = 16
  images = np.random.default_rng(0).integers(0, 256, (n, 9, 7, 3), np.uint8)
  names = ['TranslateX', 'Cutout', 'Posterize', 'Rotate'] * (n // 4)
  strength = np.array([2, 2, 3, 30] * (n // 4), np.float32)
  operation = jnp.array([operations.OPERATIONS.index(name) for name in names])
  negative, centre = operations.draw_sign_and_centre(_keys(n), 9, 7)
  signs = np.where(np.asarray(negative), -1, 1) * np.array([1, 0, 0, 1] * 4)
  signs[signs == 0] = 1
  assert set(signs[::4]) == {-1, 1}
  result = jax.jit(operations.distort)(_keys(n), images, operation, strength)
  expected = jax.jit(operations.apply_operations)(
    images, operation, strength * signs.astype(np.float32), centre
  )
  np.testing.assert_array_equal(result, expected)


def test_to_uint8_clips_and_drops_fractions():
  images = jnp.array([-51.1, -0.5, 0.0, 7.99, 254.6, 255.0, 336.6])
  result = operations.to_uint8(images)
  assert result.dtype == jnp.uint8
  np.testing.assert_array_equal(result, [0, 0, 0, 7, 254, 255, 255])
  np.testing.assert_array_equal(operations.to_uint8(result), result)
