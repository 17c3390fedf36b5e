"""RandAugment: its policy strings, its draws, and what they do to an image."""

import collections

import numpy as np
import pytest

from nfnets_jax.data import operations, randaugment


def _image(height=24, width=32):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
  ('policy', 'expected'),
  [
    ('4x5', (4, 5, None)),
    ('4x10', (4, 10, None)),
    ('2x0', (2, 0, None)),
    ('12x20', (12, 20, None)),
    ('2x5@224', (2, 5, 224)),
  ],
)
def test_parse_policy(policy, expected):
  assert randaugment.parse_policy(policy) == expected


@pytest.mark.parametrize(
  ('policy', 'message'),
  [
    ('', "policy '' is not of the form"),
    ('410', "policy '410' is not"),
    ('4x', "policy '4x' is not"),
    ('x10', "policy 'x10' is not"),
    ('4x10x2', "policy '4x10x2' is not"),
    ('4x-5', "policy '4x-5' is not"),
    ('4x1.5', "policy '4x1.5' is not"),
    (' 4x10', "policy ' 4x10' is not"),
    ('0x10', 'at least 1 layer, not 0'),
    ('4x31', r'magnitude 31 is not in 0\.\.30'),
    ('4x5@', "policy '4x5@' is not"),
    ('4x5@0', 'images of 0 pixels'),
  ],
)
def test_parse_policy_rejects(policy, message):
  with pytest.raises(ValueError, match=message):
    randaugment.parse_policy(policy)


def _distort(image, draws, magnitude, changes=()):
  """What one layer does, from its four numbers."""
  which, sign, down, across = draws
  name = operations.OPERATIONS[int(16 * which)]
  argument = dict(changes).get(name, operations.argument(name, magnitude))
  if name in operations.SIGNED and sign < 0.5:
    argument = -argument
  height, width, _ = image.shape
  center = int(down * height), int(across * width)
  return operations.apply(name, image, argument, center)


def _spy(monkeypatch):
  """Records what is applied, and leaves images as they are."""
  seen = []

  def apply(name, image, argument, center):
    seen.append((name, argument, center))
    return image

  monkeypatch.setattr(operations, 'apply', apply)
  return seen


def test_draws_are_uniform(monkeypatch):
  seen, n, height, width = _spy(monkeypatch), 16_000, 4, 6
  draws = np.random.default_rng(0).random((n, 4))
  policy = randaugment.parse_policy('1x10')
  for numbers in draws:
    randaugment.rand_augment(_image(height, width), numbers, policy)
  names, arguments, centers = zip(*seen, strict=True)

  def chi_square(counts, cells):
    assert len(counts) == cells
    expected = n / cells
    return sum((x - expected) ** 2 / expected for x in counts.values())

  # Each is above the bound once in 10,000 times.
  assert chi_square(collections.Counter(names), 16) < 44
  assert chi_square(collections.Counter(centers), height * width) < 58
  for name in operations.SIGNED:
    signs = [
      np.sign(x) for x, y in zip(arguments, names, strict=True) if y == name
    ]
    assert set(signs) == {-1, 1}
    assert abs(np.mean(signs)) < 4 / len(signs) ** 0.5
  others = {
    np.sign(x)
    for x, y in zip(arguments, names, strict=True)
    if y not in operations.SIGNED
  }
  assert others <= {0, 1}


def test_layers_apply_one_after_the_other():
  """Two layers are two distortions, each with numbers of its own."""
  policy = randaugment.parse_policy('2x10')
  for seed in range(40):
    draws = np.random.default_rng(seed).random(12)
    image = _image()
    result = randaugment.rand_augment(image, draws, policy)
    expected = _distort(_distort(image, draws[:4], 10), draws[4:8], 10)
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(image, _image())


def test_lengths_in_pixels_follow_the_size_they_are_for():
  """One layer of a policy for another size is that policy's own operations."""
  # The shorter side has 24 of the 224 pixels: 50 become 5.36, and 20 are 2.14.
  changes = {'TranslateX': 5, 'TranslateY': 5, 'Cutout': 2}
  policy, image = randaugment.parse_policy('1x5@224'), _image()
  differ = 0
  for seed in range(64):
    draws = np.random.default_rng(seed).random(4)
    result = randaugment.rand_augment(image, draws, policy)
    np.testing.assert_array_equal(result, _distort(image, draws, 5, changes))
    differ += np.any(result != _distort(image, draws, 5))
  assert differ
