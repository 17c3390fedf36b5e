"""MixUp and CutMix: one training image from two photographs.

With both enabled, each makes half of the images. RandAugment comes after.

Differences from the released code:
  * CutMix and MixUp alternate; the released code applies one to each half of
    the batch.
  * The partner comes from a second, independent permutation of the epoch, so
    each photograph is once a first and once a second one. The released code
    mixes neighbours in one stream, so that an epoch of output images reads only
    half of the photographs.
  * MixUp rounds to the nearest level; the released code keeps float32, or
    rounds down before RandAugment. The ratio is a multiple of 1/256, for images
    and labels alike.

Reference:
  Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018,
  https://arxiv.org/abs/1710.09412
  Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with
  Localizable Features", 2019, https://arxiv.org/abs/1905.04899
  Brock et al., 2021, appendix A, https://arxiv.org/abs/2102.06171
"""

import math

import numpy as np
from scipy import special

NUM_DRAWS = 3  # per image

_STEPS = 256  # of MixUp's ratio, so that weighted sums fit into 16 bits


def mix(
  first: np.ndarray,
  second: np.ndarray,
  uniform: np.ndarray,
  index: np.ndarray,
  mixup_alpha: float | None,
  use_cutmix: bool,
) -> tuple[np.ndarray, np.ndarray]:
  """Mixes each photograph with its partner.

  With both enabled, MixUp makes the images of even index and CutMix those of
  odd index. Otherwise one makes all of them.

  Args:
    first: `[n, H, W, 3]` uint8.
    second: `[n, H, W, 3]` uint8, the partners.
    uniform: `[n, NUM_DRAWS]`, uniform in [0, 1).
    index: `[n]` integers, indices in the stream.
    mixup_alpha: α of MixUp's `Beta(α, α)`; None disables MixUp.
    use_cutmix: whether to use CutMix.

  Returns:
    Images `[n, H, W, 3]` uint8, and the weight of the first label `[n]`
    float32; the second has one minus that.

  Raises:
    ValueError: if `mixup_alpha` is not positive.

  Example:
    >>> black, white = np.zeros((2, 4, 4, 3), np.uint8), np.full(
    ...     (2, 4, 4, 3), 255, np.uint8)
    >>> uniform = np.random.default_rng(0).random((2, NUM_DRAWS))
    >>> images, ratio = mix(black, white, uniform, np.arange(2), 0.2, True)
    >>> np.allclose(images.mean((1, 2, 3)) / 255, 1 - ratio, atol=0.002)
    True

  Reference:
    Brock et al., 2021, appendix A, https://arxiv.org/abs/2102.06171
  """
  if mixup_alpha is None:
    return cutmix(first, second, uniform)
  if not use_cutmix:
    return mixup(first, second, uniform[:, 0], mixup_alpha)
  even = index % 2 == 0
  images, ratio = np.empty_like(first), np.empty(len(first), np.float32)
  for half, mixed in (
    (even, mixup(first[even], second[even], uniform[even, 0], mixup_alpha)),
    (~even, cutmix(first[~even], second[~even], uniform[~even])),
  ):
    images[half], ratio[half] = mixed
  return images, ratio


def is_on(mixup_alpha: float | None, cutmix: bool) -> bool:
  """Returns whether images are mixed."""
  return mixup_alpha is not None or cutmix


def mixup(
  first: np.ndarray, second: np.ndarray, uniform: np.ndarray, alpha: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
  """Blends two photographs and their labels in a random ratio.

  With `r ~ Beta(α, α)`, drawn once per image and rounded to 1/256,

    image = r · first + (1 − r) · second,

  rounded to the nearest level, halves up.

  Args:
    first: `[n, H, W, 3]` uint8.
    second: `[n, H, W, 3]` uint8.
    uniform: `[n]`, uniform in [0, 1).
    alpha: α > 0. Small values give ratios close to 0 or 1.

  Returns:
    Images `[n, H, W, 3]` uint8, and the ratios r, `[n]` float32.

  Raises:
    ValueError: if `alpha` is not positive.

  Example:
    >>> black, white = np.zeros((1, 4, 4, 3), np.uint8), np.full(
    ...     (1, 4, 4, 3), 255, np.uint8)
    >>> images, ratio = mixup(black, white, np.array([0.5]))
    >>> int(images[0, 0, 0, 0]), ratio.tolist()
    (128, [0.5])

  Reference:
    Zhang et al., 2018, section 2, https://arxiv.org/abs/1710.09412
  """
  if not 0 < alpha < math.inf:
    raise ValueError(f'mixup alpha must be positive, not {alpha}')
  beta = special.betaincinv(alpha, alpha, uniform)  # the quantile function
  weight = np.rint(_STEPS * beta).astype(np.uint16)
  column = weight[:, None, None, None]
  images = np.multiply(first, column, dtype=np.uint16)
  images += np.multiply(second, _STEPS - column, dtype=np.uint16)
  images += _STEPS // 2
  images //= _STEPS
  return images.astype(np.uint8), (weight / _STEPS).astype(np.float32)


def cutmix(
  first: np.ndarray, second: np.ndarray, uniform: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Pastes a random box of the first photograph onto the second.

  The box has the aspect ratio of the image and a fraction of its area that is
  uniform in [0, 1] (`Beta(1, 1)`). Its centre is uniform over the pixels, so it
  may extend beyond the image. The first label's weight is
  `λ = visible pixels of the box / (H · W)`.

  Args:
    first: `[n, H, W, 3]` uint8, inside the box.
    second: `[n, H, W, 3]` uint8, outside the box.
    uniform: `[n, 3]`, uniform in [0, 1).

  Returns:
    Images `[n, H, W, 3]` uint8, and the weights λ, `[n]` float32.

  Example:
    >>> black, white = np.zeros((1, 4, 4, 3), np.uint8), np.full(
    ...     (1, 4, 4, 3), 255, np.uint8)
    >>> images, weight = cutmix(black, white, np.array([[0.5, 0.5, 0.3]]))
    >>> int((images[0, ..., 0] == 0).sum()), weight.tolist()
    (4, [0.25])

  Reference:
    Yun et al., 2019, section 3.1, https://arxiv.org/abs/1905.04899
  """
  size = np.array(first.shape[1:3])
  center = np.floor(uniform[:, :2] * size).astype(int)
  # As released: whole pixels, symmetric about the center.
  half = np.floor(np.sqrt(uniform[:, 2:]) * size).astype(int) // 2
  lower = np.maximum(center - half, 0)
  upper = np.minimum(center + half, size)
  images = second.copy()
  corners = zip(lower.tolist(), upper.tolist(), strict=True)
  for i, ((top, left), (bottom, right)) in enumerate(corners):
    images[i, top:bottom, left:right] = first[i, top:bottom, left:right]
  area = (upper - lower).prod(axis=1) / size.prod()
  return images, area.astype(np.float32)
