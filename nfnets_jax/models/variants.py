"""The network families as frozen data: what differs between two variants.

A variant has two parts. `architecture` holds the keyword arguments that its
module takes; the rest belongs to its recipe (image sizes in pixels and the
RandAugment policy), which the experiment files read.

Differences:
  * The published code rounds a stage's bottleneck down to whole groups of 128
    channels, so stage 1 of every "plus" net has a bottleneck of 128 where the
    paper's count of 527 M parameters for F4+ asks for 192. The variants are the
    code's; `create('nfnet_f4plus', group_width=(192, 128, 128, 128))` is the
    paper's.

Reference:
  Brock et al. 2021, table 1 and appendix A.5.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Variant:
  """One network of a family.

  Attributes:
    family: the module that builds it, such as `nfnet`.
    architecture: keyword arguments of that module.
    train_size: side of the training images, in pixels.
    test_size: side of the test images, in pixels.
    rand_augment: RandAugment policy, `<layers>x<magnitude>`, or None for none.
  """

  family: str
  architecture: Mapping[str, Any]
  train_size: int
  test_size: int
  rand_augment: str | None


_WIDTH = (256, 512, 1536, 1536)
_PLUS_WIDTH = (384, 768, 2048, 2048)

# N: (dropout rate, training size, test size, RandAugment); the depth is
# (N + 1) times (1, 2, 6, 3).
_NFNET_ROWS = (
  (0.2, 192, 256, '4x5'),
  (0.3, 224, 320, '4x10'),
  (0.4, 256, 352, '4x10'),
  (0.4, 320, 416, '4x15'),
  (0.5, 384, 512, '4x15'),
  (0.5, 416, 544, '4x15'),
  (0.5, 448, 576, '4x15'),
  (0.5, 480, 608, '4x15'),
)


def _nfnets() -> dict[str, Variant]:
  variants = {}
  for n, (drop_rate, train_size, test_size, policy) in enumerate(_NFNET_ROWS):
    depth = tuple(stage * (n + 1) for stage in (1, 2, 6, 3))
    for suffix, width in (('', _WIDTH), ('plus', _PLUS_WIDTH)):
      variants[f'nfnet_f{n}{suffix}'] = Variant(
        family='nfnet',
        architecture=types.MappingProxyType(
          {
            'width': width,
            'depth': depth,
            'stem_width': (16, 32, 64, width[0] // 2),
            'drop_rate': drop_rate,
          }
        ),
        train_size=train_size,
        test_size=test_size,
        rand_augment=policy,
      )
  return variants


# A net for tests, demonstrations and images of about 32 pixels: the same blocks
# in three stages, with a stem that keeps half the resolution.
_TINY = Variant(
  family='nfnet',
  architecture=types.MappingProxyType(
    {
      'width': (64, 128, 256),
      'depth': (1, 2, 1),
      'strides': (1, 2, 2),
      'group_width': (32, 32, 32),
      'stem_width': (16, 32),
      'stem_strides': (1, 2),
      'drop_rate': 0.1,
      'stochdepth_rate': 0.1,
    }
  ),
  train_size=32,
  test_size=32,
  rand_augment=None,
)

VARIANTS: Mapping[str, Variant] = types.MappingProxyType(
  {**_nfnets(), 'nfnet_tiny': _TINY}
)


def get(name: str) -> Variant:
  """Returns the variant called `name`.

  Args:
    name: a key of `VARIANTS`.

  Returns:
    The frozen variant.

  Raises:
    ValueError: if there is no such variant; the message lists those there are.

  Example:
    >>> get('nfnet_f1').test_size
    320
  """
  if name not in VARIANTS:
    raise ValueError(
      f'unknown model {name!r}; choose one of {", ".join(sorted(VARIANTS))}'
    )
  return VARIANTS[name]
