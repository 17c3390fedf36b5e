"""MixUp and CutMix: one training image made of two.

With both on, MixUp makes one half of the batch and CutMix the other.
RandAugment comes after. Each image draws from a key of its own.

Differences from the released code:
  * The images that CutMix and MixUp make alternate, where the released code has
    them in two halves: any even share of a batch then holds both.
  * The two images of a mix are neighbours in the batch, where the released code
    takes them from two parts of it. The input pipeline has shuffled them.
  * `raw_per_image=1` mixes each image with its neighbour and so reads half as
    many images. The released code has no such mode.

Reference:
  Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018,
  https://arxiv.org/abs/1710.09412
  Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with
  Localizable Features", 2019, https://arxiv.org/abs/1905.04899
  Brock et al., 2021, appendix A, https://arxiv.org/abs/2102.06171
"""

import functools
from collections.abc import Callable

import jax
from jax import numpy as jnp


def mixup(
  keys: jax.Array,
  images_a: jax.Array,
  images_b: jax.Array,
  labels_a: jax.Array,
  labels_b: jax.Array,
  alpha: float = 0.2,
) -> tuple[jax.Array, jax.Array]:
  """Blends two images, and their labels, in one random proportion.

  With `r ~ Beta(α, α)`, drawn once per image,

    image = r · a + (1 − r) · b,    label = r · label_a + (1 − r) · label_b.

  Args:
    keys: `[B]` random keys, one per image.
    images_a: `[B, H, W, C]` float32, values in 0..255.
    images_b: `[B, H, W, C]` float32, values in 0..255.
    labels_a: `[B, K]` float32, probabilities of the classes.
    labels_b: `[B, K]` float32, probabilities of the classes.
    alpha: α > 0. The smaller it is, the closer most ratios are to 0 or 1.

  Returns:
    Images `[B, H, W, C]` and labels `[B, K]`.

  Raises:
    ValueError: `alpha` is not positive.

  Example:
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> black, white = jnp.zeros((2, 4, 4, 3)), jnp.full((2, 4, 4, 3), 255.)
    >>> cat, dog = jnp.array([[1., 0.]] * 2), jnp.array([[0., 1.]] * 2)
    >>> images, labels = mixup(keys, black, white, cat, dog)
    >>> bool(jnp.allclose(images[:, 0, 0, 0] / 255, labels[:, 1]))
    True

  Reference:
    Zhang et al., 2018, section 2, https://arxiv.org/abs/1710.09412
  """
  if alpha <= 0:
    raise ValueError(f'mixup alpha must be positive, not {alpha}')
  ratio = jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(keys)
  images = _blend(ratio[:, None, None, None], images_a, images_b)
  return images, _blend(ratio[:, None], labels_a, labels_b)


def cutmix(
  keys: jax.Array,
  images_a: jax.Array,
  images_b: jax.Array,
  labels_a: jax.Array,
  labels_b: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Pastes a random box of one image onto another, and weighs their labels.

  The box has the image's proportions and a share of its area that is uniform
  on 0..1 (`Beta(1, 1)`). Its centre is uniform over the pixels, so a part of
  it may lie outside the image. The labels follow what is left inside:

    label = λ · label_a + (1 − λ) · label_b,    λ = pixels in the box / (H · W).

  Args:
    keys: `[B]` random keys, one per image.
    images_a: `[B, H, W, C]`, the images inside the box.
    images_b: `[B, H, W, C]`, the images around it, of the same type.
    labels_a: `[B, K]` float32, probabilities of the classes.
    labels_b: `[B, K]` float32, probabilities of the classes.

  Returns:
    Images `[B, H, W, C]` and labels `[B, K]`.

  Example:
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> black, white = jnp.zeros((2, 4, 4, 3)), jnp.full((2, 4, 4, 3), 255.)
    >>> cat, dog = jnp.array([[1., 0.]] * 2), jnp.array([[0., 1.]] * 2)
    >>> images, labels = cutmix(keys, black, white, cat, dog)
    >>> bool(jnp.allclose((images == 0).mean((1, 2, 3)), labels[:, 0]))
    True

  Reference:
    Yun et al., 2019, section 3.1, https://arxiv.org/abs/1905.04899
  """
  height, width = images_a.shape[1:3]
  box = functools.partial(_random_box, height=height, width=width)
  lower, upper = jax.vmap(box)(keys)

  def inside(axis: int, size: int) -> jax.Array:
    place = jnp.arange(size, dtype=jnp.float32)[None]
    return (lower[:, axis, None] <= place) & (place < upper[:, axis, None])

  mask = inside(0, height)[:, :, None] & inside(1, width)[:, None, :]
  area = mask.mean((1, 2), dtype=jnp.float32)
  images = jnp.where(mask[..., None], images_a, images_b)
  return images, _blend(area[:, None], labels_a, labels_b)


def mix_batch(
  keys: jax.Array,
  images: jax.Array,
  labels: jax.Array,
  *,
  num_classes: int,
  mixup_alpha: float | None,
  cutmix: bool,
  raw_per_image: int,
) -> tuple[jax.Array, jax.Array]:
  """Turns raw images and class indices into the mixed images of a batch.

  With both on, MixUp makes the even images and CutMix the odd ones. With one
  on, it makes all of them. With none, images and labels only change their type.

  An image depends on its key, its own raw images and whether its place is odd.
  So a batch may be split over devices in any way that leaves each an even
  number of images, and the result stays the same.

  Args:
    keys: `[B]` random keys, one per image that is returned.
    images: `[R, H, W, C]` uint8 with `R = raw_per_image · B`.
    labels: `[R]` class indices in 0..num_classes − 1.
    num_classes: K.
    mixup_alpha: α of MixUp's `Beta(α, α)`; None turns MixUp off.
    cutmix: whether CutMix is on.
    raw_per_image: 2 as released: raw images 2j and 2j + 1 make image j, and an
      epoch of raw images lasts half as many steps. Or 1: each raw image j is
      mixed with its neighbour, j + 1 for an even j and j − 1 for an odd one.

  Returns:
    Images `[B, H, W, C]` float32, values in 0..255, and label probabilities
    `[B, K]` float32.

  Raises:
    ValueError: `raw_per_image` is neither 1 nor 2, or is 2 with nothing to mix;
      there are not as many raw images as it says; B is odd, where both
      mixes, or an image and its neighbour, share it; or `mixup_alpha` is not
      positive.

  Example:
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> raw, labels = jnp.zeros((8, 32, 32, 3), jnp.uint8), jnp.arange(8)
    >>> images, probabilities = mix_batch(
    ...     keys, raw, labels, num_classes=10, mixup_alpha=0.2, cutmix=True,
    ...     raw_per_image=2)
    >>> images.shape, probabilities.shape
    ((4, 32, 32, 3), (4, 10))

  Reference:
    Brock et al., 2021, appendix A, https://arxiv.org/abs/2102.06171
  """
  mixes = _mixes(mixup_alpha, cutmix)
  batch_size = len(keys)
  _check_sizes(batch_size, len(images), raw_per_image, len(mixes))

  pixels = images.astype(jnp.float32)
  targets = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
  if not mixes:
    return pixels, targets

  images_a, images_b = _partners(pixels, raw_per_image)
  labels_a, labels_b = _partners(targets, raw_per_image)
  # Each mix computes its own share, no image is mixed twice: with n mixes,
  # number i makes the images i, i + n, i + 2n ...
  n = len(mixes)
  shares = [
    mix(
      keys[i::n], images_a[i::n], images_b[i::n], labels_a[i::n], labels_b[i::n]
    )
    for i, mix in enumerate(mixes)
  ]
  mixed_images, mixed_labels = zip(*shares, strict=True)
  return _interleave(mixed_images), _interleave(mixed_labels)


def _mixes(alpha: float | None, use_cutmix: bool) -> list[Callable]:
  """The mixes that take turns in a batch."""
  mixes: list[Callable] = []
  if alpha is not None:
    mixes.append(functools.partial(mixup, alpha=alpha))
  if use_cutmix:
    mixes.append(cutmix)
  return mixes


def _check_sizes(
  batch_size: int, num_raw: int, raw_per_image: int, num_mixes: int
) -> None:
  """Raises ValueError where `mix_batch` could not pair or share the images."""
  if raw_per_image not in (1, 2):
    raise ValueError(f'raw_per_image must be 1 or 2, not {raw_per_image}')
  if num_mixes == 0 and raw_per_image != 1:
    raise ValueError(
      f'raw_per_image is {raw_per_image} but neither MixUp nor CutMix is on'
    )
  if num_raw != raw_per_image * batch_size:
    raise ValueError(
      f'{batch_size} images of {raw_per_image} raw images each need '
      f'{raw_per_image * batch_size} raw images, not {num_raw}'
    )
  if batch_size % 2 and num_mixes == 2:
    raise ValueError(
      f'batch size {batch_size} is odd: MixUp and CutMix cannot share it'
    )
  if batch_size % 2 and num_mixes and raw_per_image == 1:
    raise ValueError(
      f'batch size {batch_size} is odd: raw_per_image=1 mixes neighbours'
    )


def _partners(x: jax.Array, raw_per_image: int) -> tuple[jax.Array, jax.Array]:
  """The two ingredients, `[B, ...]` each, of every mix."""
  pairs = x.reshape(-1, 2, *x.shape[1:])
  if raw_per_image == 2:
    return pairs[:, 0], pairs[:, 1]
  return x, pairs[:, ::-1].reshape(x.shape)


def _interleave(shares: tuple[jax.Array, ...]) -> jax.Array:
  """`[B / n, ...]` of n mixes become `[B, ...]`, one of each in turn."""
  return jnp.stack(shares, axis=1).reshape(-1, *shares[0].shape[1:])


def _blend(ratio: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  return ratio * a + (1 - ratio) * b


def _random_box(
  key: jax.Array, height: int, width: int
) -> tuple[jax.Array, jax.Array]:
  """CutMix's box: the lower and upper (exclusive) corners, (y, x) each."""
  size = jnp.array([height, width], jnp.float32)
  uniform = jax.random.uniform(key, (3,))
  centre, side = jnp.floor(uniform[:2] * size), jnp.sqrt(uniform[2]) * size
  # As released: whole pixels, and as many on either side of the centre.
  half = jnp.floor(side) // 2
  return jnp.clip(centre - half, 0, size), jnp.clip(centre + half, 0, size)
