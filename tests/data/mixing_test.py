"""MixUp and CutMix against their formulas, and their distributions."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from nfnets_jax.augment import mixing


def _keys(n, seed=0):
  return jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.key(seed), jnp.arange(n)
  )


def _batch(n, height=6, width=10, num_classes=7, seed=0):
  rng = np.random.default_rng(seed)
  images = rng.uniform(0, 255, (2, n, height, width, 3)).astype(np.float32)
  labels = rng.dirichlet(np.ones(num_classes), (2, n)).astype(np.float32)
  return *images, *labels


def _raw(n, height=6, width=10, seed=0):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8)
  return images, rng.integers(0, 7, n, dtype=np.int32)


def _one_hot_pair(n):
  """Labels that spell the ratio out: the first column is the weight of a."""
  return np.tile(np.eye(2, 7, dtype=np.float32)[:, None], (1, n, 1))


# Sampling from Beta takes seconds to compile: tests share what is jitted.
_mixup = jax.jit(mixing.mixup)
_cutmix = jax.jit(mixing.cutmix)
_mix_batch = functools.partial(
  jax.jit,
  static_argnames=('num_classes', 'mixup_alpha', 'cutmix', 'raw_per_image'),
)(mixing.mix_batch)


def test_mixup_is_the_formula():
  a, b, label_a, label_b = _batch(8)
  keys = _keys(8)
  _, ratio = _mixup(keys, a, b, *_one_hot_pair(8))
  images, labels = _mixup(keys, a, b, label_a, label_b)
  r = np.asarray(ratio, np.float64)[:, :1]
  r4 = r[:, :, None, None]
  np.testing.assert_allclose(images, r4 * a + (1 - r4) * b, rtol=1e-5)
  np.testing.assert_allclose(labels, r * label_a + (1 - r) * label_b, rtol=1e-5)
  np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-6)
  assert images.dtype == labels.dtype == jnp.float32


@pytest.mark.parametrize('alpha', [0.2, 1.0])
def test_mixup_ratio_has_the_moments_of_beta(alpha):
  n = 4096
  a, b = np.ones((n, 1, 1, 3), np.float32), np.zeros((n, 1, 1, 3), np.float32)
  _, labels = mixing.mixup(_keys(n), a, b, *_one_hot_pair(n), alpha)
  ratio = np.asarray(labels[:, 0])
  variance = 1 / (4 * (2 * alpha + 1))
  assert ratio.min() >= 0
  assert ratio.max() <= 1
  assert ratio.mean() == pytest.approx(0.5, abs=4 * (variance / n) ** 0.5)
  assert ratio.var() == pytest.approx(variance, rel=0.05)


def test_mixup_rejects_an_alpha_that_is_not_positive():
  with pytest.raises(ValueError, match=r'must be positive, not 0\.0'):
    mixing.mixup(_keys(8), *_batch(8), alpha=0.0)


@pytest.mark.parametrize('size', [(16, 16), (7, 12), (1, 1)])
def test_cutmix_weighs_labels_by_the_pixels_it_pasted(size):
  n = 64
  a, b = np.ones((n, *size, 3), np.float32), np.zeros((n, *size, 3), np.float32)
  images, labels = _cutmix(_keys(n), a, b, *_one_hot_pair(n))
  pasted = np.asarray(images[..., 0], np.float64).mean((1, 2))
  np.testing.assert_allclose(labels[:, 0], pasted, atol=1e-6)
  np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-6)


def test_cutmix_pastes_one_box_with_the_pixels_in_their_places():
  a, b, label_a, label_b = _batch(32, height=12, width=20)
  images, labels = _cutmix(_keys(32), a, b, label_a, label_b)
  from_a = np.asarray(images) == a
  assert np.all(from_a | (np.asarray(images) == b))
  mask = from_a.all(-1)
  rows, columns = mask.any(2), mask.any(1)
  np.testing.assert_array_equal(mask, rows[:, :, None] & columns[:, None])
  for line in (*rows, *columns):  # one run: it begins once at most
    assert np.sum(np.diff(line.astype(int), prepend=0) == 1) <= 1
  weight = mask.mean((1, 2))[:, None]
  expected = weight * label_a + (1 - weight) * label_b
  np.testing.assert_allclose(labels, expected, rtol=1e-5)


def test_cutmix_box_is_uniform_in_area_and_place():
  """Its mean and spread are those of a simulation of the definition."""
  n, size = 4096, 32
  a = np.ones((n, size, size, 1), np.uint8)
  images, labels = _cutmix(_keys(n), a, np.zeros_like(a), *_one_hot_pair(n))
  rng = np.random.default_rng(0)
  side = np.sqrt(rng.uniform(size=100_000))
  half = (side * size).astype(int) // 2

  def length():
    centre = rng.integers(0, size, len(side))
    return np.minimum(centre + half, size) - np.maximum(centre - half, 0)

  area = length() * length() / size**2
  weight = np.asarray(labels[:, 0])
  tolerance = 4 * area.std() / n**0.5
  assert weight.mean() == pytest.approx(area.mean(), abs=tolerance)
  assert weight.std() == pytest.approx(area.std(), rel=0.05)
  # A box has as many pixels before its centre as from it on, so that the boxes
  # of all centres lie evenly about the pixel before the middle.
  cover = np.asarray(images[:, :-1, :-1, 0], np.float64).mean(0)
  np.testing.assert_allclose(cover, cover[::-1], atol=0.05)
  np.testing.assert_allclose(cover, cover.T, atol=0.05)


@pytest.mark.parametrize('raw_per_image', [1, 2])
def test_mix_batch_takes_turns_and_mixes_the_right_images(raw_per_image):
  raw, classes = _raw(8 * raw_per_image)
  images, labels = _mix_batch(
    _keys(8),
    raw,
    classes,
    num_classes=7,
    mixup_alpha=0.2,
    cutmix=True,
    raw_per_image=raw_per_image,
  )
  one_hot = np.eye(7, dtype=np.float32)[classes]
  pixels = raw.astype(np.float32)
  if raw_per_image == 2:
    a, b = np.arange(0, 16, 2), np.arange(1, 16, 2)
  else:
    a, b = np.arange(8), np.arange(8) ^ 1
  sources = pixels[a], pixels[b], one_hot[a], one_hot[b]
  mixed, cut = _mixup(_keys(8), *sources), _cutmix(_keys(8), *sources)
  for result, even, odd in zip((images, labels), mixed, cut, strict=True):
    np.testing.assert_allclose(result[::2], even[::2], rtol=1e-6)
    np.testing.assert_allclose(result[1::2], odd[1::2], rtol=1e-6)
  assert images.dtype == labels.dtype == jnp.float32


@pytest.mark.parametrize(
  ('alpha', 'cutmix', 'raw_per_image'),
  [(0.2, True, 2), (0.2, True, 1), (None, True, 1)],
)
def test_mix_batch_does_not_depend_on_how_a_batch_is_split(
  alpha, cutmix, raw_per_image
):
  raw, classes = _raw(8 * raw_per_image)
  run = functools.partial(
    _mix_batch,
    num_classes=7,
    mixup_alpha=alpha,
    cutmix=cutmix,
    raw_per_image=raw_per_image,
  )
  whole = run(_keys(8), raw, classes)
  middle = 4 * raw_per_image
  halves = zip(
    run(_keys(8)[:4], raw[:middle], classes[:middle]),
    run(_keys(8)[4:], raw[middle:], classes[middle:]),
    strict=True,
  )
  for together, apart in zip(whole, halves, strict=True):
    np.testing.assert_array_equal(together, np.concatenate(apart))


def test_mix_batch_makes_every_image_with_cutmix_alone():
  raw, classes = _raw(6)
  options = {'num_classes': 7, 'raw_per_image': 2}
  images, _ = _mix_batch(
    _keys(3), raw, classes, mixup_alpha=None, cutmix=True, **options
  )
  pixels = raw.astype(np.float32)
  assert np.all((images == pixels[::2]) | (images == pixels[1::2]))


def test_mix_batch_makes_every_image_with_mixup_alone():
  raw, classes = _raw(16)
  images, labels = _mix_batch(
    _keys(8),
    raw,
    classes,
    num_classes=7,
    mixup_alpha=0.2,
    cutmix=False,
    raw_per_image=2,
  )
  pixels, one_hot = raw.astype(np.float32), np.eye(7, dtype=np.float32)[classes]
  expected = _mixup(
    _keys(8), pixels[::2], pixels[1::2], one_hot[::2], one_hot[1::2]
  )
  np.testing.assert_allclose(images, expected[0], rtol=1e-6)
  np.testing.assert_allclose(labels, expected[1], rtol=1e-6)


def test_mix_batch_makes_a_batch_of_one():
  raw, classes = _raw(2)
  images, labels = _mix_batch(
    _keys(1),
    raw,
    classes,
    num_classes=7,
    mixup_alpha=None,
    cutmix=True,
    raw_per_image=2,
  )
  image = np.asarray(images[0])
  assert np.all((image == raw[0]) | (image == raw[1]))
  assert labels.sum() == pytest.approx(1)


def test_mix_batch_with_nothing_on_changes_types_only():
  raw, classes = _raw(3)
  images, labels = _mix_batch(
    _keys(3),
    raw,
    classes,
    num_classes=7,
    mixup_alpha=None,
    cutmix=False,
    raw_per_image=1,
  )
  np.testing.assert_array_equal(images, raw.astype(np.float32))
  np.testing.assert_array_equal(labels, np.eye(7, dtype=np.float32)[classes])


@pytest.mark.parametrize(
  ('batch_size', 'num_raw', 'alpha', 'cutmix', 'raw_per_image', 'message'),
  [
    (5, 10, 0.2, True, 2, 'batch size 5 is odd'),
    (3, 3, 0.2, False, 1, 'batch size 3 is odd'),
    (3, 3, None, True, 1, 'batch size 3 is odd'),
    (4, 6, 0.2, True, 2, 'need 8 raw images, not 6'),
    (4, 12, 0.2, True, 3, 'must be 1 or 2, not 3'),
    (4, 8, None, False, 2, 'neither MixUp nor CutMix is on'),
    (4, 8, 0.0, True, 2, 'must be positive, not 0.0'),
  ],
)
def test_mix_batch_rejects_sizes_that_do_not_fit(
  batch_size, num_raw, alpha, cutmix, raw_per_image, message
):
  raw, classes = _raw(num_raw)
  with pytest.raises(ValueError, match=message):
    mixing.mix_batch(
      _keys(batch_size),
      raw,
      classes,
      num_classes=7,
      mixup_alpha=alpha,
      cutmix=cutmix,
      raw_per_image=raw_per_image,
    )
