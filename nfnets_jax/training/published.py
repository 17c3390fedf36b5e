"""Published accuracies of the released weights, NFNet-F0 to F6.

References:
  * ImageNet, -A, -R and Sketch: timm's evaluation of the converted weights,
    https://github.com/huggingface/pytorch-image-models, results/ at commit
    0173a139 (-A: 049b1332), at the test size, both sides resized ('squash').
    On -A and -R the logits are restricted to the 200 classes.
  * ReaL and ImageNet-V2 (matched frequency): the same source; top-1 alone.
  * Paper: Brock et al. 2021, table 3, of the nets that the authors trained: the
    mean of three seeds, for F6 one run with SAM.
"""

import types
from collections.abc import Mapping
from typing import NamedTuple


class Accuracy(NamedTuple):
  """An accuracy in percent.

  Attributes:
    source: who evaluated it.
    top_1: in percent.
    top_5: in percent, None if not reported.
  """

  source: str
  top_1: float
  top_5: float | None


# F0 to F6.
_TIMM: Mapping[str, tuple[tuple[float, float | None], ...]] = {
  'ImageNet': (
    (83.486, 96.568),
    (84.702, 97.182),
    (85.194, 97.346),
    (85.686, 97.570),
    (85.836, 97.664),
    (86.098, 97.688),
    (86.362, 97.896),
  ),
  'ImageNet-ReaL': (
    (88.12, None),
    (89.02, None),
    (89.19, None),
    (89.63, None),
    (89.74, None),
    (89.73, None),
    (90.24, None),
  ),
  'ImageNet-V2': (
    (71.88, None),
    (74.36, None),
    (75.06, None),
    (75.43, None),
    (75.85, None),
    (75.43, None),
    (76.16, None),
  ),
  'ImageNet-A': (
    (27.080, 58.307),
    (42.547, 71.560),
    (46.653, 74.813),
    (53.773, 79.840),
    (56.707, 81.760),
    (57.640, 82.280),
    (57.560, 82.360),
  ),
  'ImageNet-R': (
    (45.617, 61.277),
    (47.457, 62.083),
    (49.350, 63.950),
    (53.523, 67.743),
    (52.457, 67.117),
    (54.610, 68.670),
    (53.843, 68.413),
  ),
  'ImageNet-Sketch': (
    (35.407, 55.527),
    (36.326, 55.747),
    (37.128, 56.983),
    (41.323, 62.110),
    (39.924, 60.447),
    (41.290, 62.011),
    (41.166, 62.843),
  ),
}
_PAPER = (
  (83.6, 96.8),
  (84.7, 97.1),
  (85.1, 97.3),
  (85.7, 97.5),
  (85.9, 97.6),
  (86.0, 97.6),
  (86.5, 97.9),
)
_MODELS = tuple(f'nfnet_f{n}' for n in range(7))

# (number of classes, number of images): test set. The three sets of
# ImageNet-V2 are of one size; the figures are those of matched frequency.
_SETS: Mapping[tuple[int, int], str] = types.MappingProxyType(
  {
    (1000, 50_000): 'ImageNet',
    (1000, 10_000): 'ImageNet-V2',
    (1000, 50_889): 'ImageNet-Sketch',
    (200, 7_500): 'ImageNet-A',
    (200, 30_000): 'ImageNet-R',
  }
)


def identify(
  num_classes: int, num_images: int, label_sets: bool = False
) -> str | None:
  """Returns the ImageNet test set of a size, None if there is none.

  Args:
    num_classes: ImageNet classes in the set.
    num_images: size of the set.
    label_sets: whether the labels are ReaL's.

  Example:
    >>> identify(200, 7500), identify(10, 360)
    ('ImageNet-A', None)
  """
  name = _SETS.get((num_classes, num_images))
  if label_sets:
    return 'ImageNet-ReaL' if name == 'ImageNet' else None
  return name


def accuracies(model: str, name: str | None) -> list[Accuracy]:
  """Returns the published accuracies of released weights on a test set.

  Args:
    model: the variant.
    name: as returned by `identify`.

  Example:
    >>> [x.top_1 for x in accuracies('nfnet_f0', 'ImageNet')]
    [83.486, 83.6]
  """
  if model not in _MODELS or name is None or name not in _TIMM:
    return []
  index = _MODELS.index(model)
  found = [Accuracy('timm', *_TIMM[name][index])]
  if name == 'ImageNet':
    found.append(Accuracy('paper', *_PAPER[index]))
  return found
