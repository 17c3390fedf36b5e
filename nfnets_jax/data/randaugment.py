"""RandAugment: a few random operations of one fixed magnitude.

Differences from the released code: the random generator, and the one listed in
`operations`. As in the released code, and unlike the paper, the operations
include SolarizeAdd, Invert and Cutout but not the identity. Lengths in pixels
can optionally scale with the image, for images smaller than ImageNet's.

Reference:
  Cubuk et al., "RandAugment: Practical automated data augmentation with a
  reduced search space", 2020, https://arxiv.org/abs/1909.13719
  Brock et al., 2021, appendix A, https://arxiv.org/abs/2102.06171
"""

import re
from typing import NamedTuple

import numpy as np

from nfnets_jax.data import operations

NUM_DRAWS = 4  # per layer


class Policy(NamedTuple):
  """A policy of RandAugment.

  Attributes:
    num_layers: operations per image, at least 1.
    magnitude: strength, 0 to 30.
    size: reference size in pixels: translations and the box of Cutout are
      multiplied by `min(H, W) / size` and rounded. None does not scale them, as
      in the released code.
  """

  num_layers: int
  magnitude: int
  size: int | None = None


def parse_policy(policy: str) -> Policy:
  """Parses a policy such as `'4x10'`: four layers of magnitude ten.

  The recipe has `'4x5'` for NFNet-F0, `'4x10'` for F1 and F2, and `'4x15'` for
  larger variants. `'4x10@224'` scales lengths relative to images of 224 pixels.

  Args:
    policy: `'LAYERSxMAGNITUDE'` or `'LAYERSxMAGNITUDE@SIZE'`.

  Raises:
    ValueError: if the format is invalid or a number is out of range.

  Example:
    >>> parse_policy('2x5@224')
    Policy(num_layers=2, magnitude=5, size=224)

  Reference:
    Brock et al., 2021, table 1 and appendix A,
    https://arxiv.org/abs/2102.06171
  """
  match = re.fullmatch(r'([0-9]+)x([0-9]+)(?:@([0-9]+))?', policy)
  if match is None:
    raise ValueError(
      f'RandAugment policy {policy!r} is not of the form '
      "'LAYERSxMAGNITUDE' or 'LAYERSxMAGNITUDE@SIZE', such as '4x10'"
    )
  num_layers, magnitude = int(match[1]), int(match[2])
  size = None if match[3] is None else int(match[3])
  if num_layers < 1:
    raise ValueError(f'RandAugment needs at least 1 layer, not {num_layers}')
  if magnitude > operations.MAX_MAGNITUDE:
    raise ValueError(
      f'RandAugment magnitude {magnitude} is not in '
      f'0..{operations.MAX_MAGNITUDE}'
    )
  if size is not None and size < 1:
    raise ValueError(f'RandAugment for images of {size} pixels; give 1 or more')
  return Policy(num_layers, magnitude, size)


def rand_augment(
  image: np.ndarray, uniform: np.ndarray, policy: Policy
) -> np.ndarray:
  """Applies a sequence of random operations to an image.

  Each layer draws uniformly one of the sixteen operations, the sign of its
  argument if signed, and the centre of Cutout's box among the pixels.

  Args:
    image: `[H, W, 3]` uint8; not modified.
    uniform: at least `NUM_DRAWS` numbers per layer, uniform in [0, 1).
    policy: see `parse_policy`.

  Returns:
    `[H, W, 3]` uint8.

  Example:
    >>> image = np.zeros((16, 16, 3), np.uint8)
    >>> uniform = np.random.default_rng(0).random(4 * NUM_DRAWS)
    >>> rand_augment(image, uniform, parse_policy('4x10')).shape
    (16, 16, 3)

  Reference:
    Cubuk et al., 2020, section 3, https://arxiv.org/abs/1909.13719
  """
  height, width, _ = image.shape
  draws = uniform[: policy.num_layers * NUM_DRAWS].reshape(-1, NUM_DRAWS)
  for which, sign, down, across in draws.tolist():
    name = operations.OPERATIONS[int(which * len(operations.OPERATIONS))]
    argument = operations.argument(name, policy.magnitude)
    if policy.size is not None and name in operations.IN_PIXELS:
      argument = round(argument * min(height, width) / policy.size)
    if name in operations.SIGNED and sign < 0.5:
      argument = -argument
    center = int(down * height), int(across * width)
    image = operations.apply(name, image, argument, center)
  return image
