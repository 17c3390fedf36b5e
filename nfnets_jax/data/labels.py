"""Relates the classes of a data set to those of a net, for evaluation.

The other test sets of ImageNet name its classes differently, or have some only:

| set                 | classes | names in folders | names in TFDS       |
|---------------------|---------|------------------|---------------------|
| ImageNet-V2         |   1,000 | '0' to '999'     | WordNet ids         |
| ImageNet-A, -R      |     200 | WordNet ids      | WordNet ids, 1,000  |
| ImageNet-Sketch     |   1,000 | WordNet ids      | WordNet ids         |

To evaluate a net on one, select its logits with `label_map` and keep the labels
of the data set. On 200 classes, predictions are thus restricted to these, as in
the papers. (`datasets.select_classes(dataset, 'present')` drops the classes
without images.)

ReaL replaces the labels of ImageNet's validation images by sets of labels, see
`read_label_sets`.

Reference:
  Recht et al., "Do ImageNet Classifiers Generalize to ImageNet?", 2019 (V2),
  https://arxiv.org/abs/1902.10811
  Hendrycks et al., "Natural Adversarial Examples", 2019 (A),
  https://arxiv.org/abs/1907.07174
  Hendrycks et al., "The Many Faces of Robustness", 2020 (R),
  https://arxiv.org/abs/2006.16241
  Wang et al., "Learning Robust Global Representations by Penalizing Local
  Predictive Power", 2019 (Sketch), https://arxiv.org/abs/1905.13549
  Beyer et al., "Are we done with ImageNet?", 2020 (ReaL),
  https://arxiv.org/abs/2006.07159
"""

import collections
import dataclasses
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from nfnets_jax import paths
from nfnets_jax.data import datasets, imagenet

_ID = re.compile(r'n\d{8}\b')
_VALIDATION_IMAGE = re.compile(r'ILSVRC2012_val_(\d{8})\b')


def label_map(
  class_names: Sequence[str], net_names: Sequence[str] | None = None
) -> np.ndarray:
  """Returns the net's index of each class of a data set.

  Classes match by their name, or by a WordNet id that begins it; with the 1,000
  classes of ImageNet also by their index, '0' to '999'.

  Args:
    class_names: the K classes of the data set.
    net_names: the classes of the net, by default ImageNet's.

  Returns:
    int32 `[K]`, all different.

  Raises:
    ValueError: if a class is unknown to the net, or two are the same.

  Example:
    >>> label_map(['n01443537', 'n01440764'])
    array([1, 0], dtype=int32)
    >>> label_map(['dog', 'cat'], net_names=['cat', 'dog', 'emu'])
    array([1, 0], dtype=int32)
  """
  ids, descriptions = imagenet.classes()
  if net_names is None or tuple(net_names) == descriptions:
    net_names = [f'{x} {y}' for x, y in zip(ids, descriptions, strict=True)]
  indices = {_key(name): i for i, name in enumerate(net_names)}
  if tuple(indices) == ids:
    counts = collections.Counter(descriptions)
    indices |= {x: i for i, x in enumerate(descriptions) if counts[x] == 1}
    indices |= {str(i): i for i in range(len(ids))}
  unknown = [name for name in class_names if _key(name) not in indices]
  if unknown:
    more = f' and {len(unknown) - 5:,} more' if len(unknown) > 5 else ''
    raise ValueError(
      f'{len(unknown):,} of {len(class_names):,} classes of the data set are '
      f'none of the {len(net_names):,} of the net: '
      f'{", ".join(map(repr, unknown[:5]))}{more}; name ImageNet classes by '
      'WordNet id (n01440764) or index (0 to 999)'
    )
  found = [indices[_key(name)] for name in class_names]
  first: dict[int, str] = {}
  for name, index in zip(class_names, found, strict=True):
    if index in first:
      raise ValueError(
        f'classes {first[index]!r} and {name!r} of the data set are both class '
        f'{index} of the net, {net_names[index]!r}'
      )
    first[index] = name
  return np.array(found, np.int32)


def read_label_sets(path: str | os.PathLike[str]) -> list[tuple[int, ...]]:
  """Reads the label sets of ReaL, `real.json`.

  Args:
    path: a JSON list with the ImageNet labels of each validation image, in the
      order of their file names, from
      https://github.com/google-research/reassessed-imagenet

  Returns:
    The labels of each image; empty for images that have none.

  Raises:
    ValueError: if the file is something else.
    FileNotFoundError: if it does not exist.
  """
  file = paths.existing(path, 'label sets', 'file')
  try:
    content = json.loads(file.read_bytes())
    sets = [tuple(labels) for labels in content]
    valid = isinstance(content, list) and all(
      isinstance(x, int) and 0 <= x < 1000 for y in sets for x in y
    )
  except (TypeError, ValueError):
    valid = False
  if not valid:
    raise ValueError(
      f'{file} is not a JSON list of lists of labels from 0 to 999, such as '
      'real.json'
    )
  return sets


def with_label_sets(
  dataset: datasets.Dataset,
  label_sets: Sequence[Sequence[int]],
  label_map: np.ndarray | None = None,
) -> datasets.Dataset:
  """Adds the label sets of ReaL to ImageNet's validation images.

  Args:
    dataset: its file names are those of ImageNet,
      `ILSVRC2012_val_00000001.JPEG`.
    label_sets: of image 1, 2, ... in classes of the net.
    label_map: int32 `[K]`, the net's index of each class of the data set; by
      default they are the same.

  Returns:
    The data set with `label_set`, int32 `[n]`, in each example: classes of the
    data set, padded with -1 to the size n of the largest set. The loader gives
    an image without labels the mask 0.
  """
  classes = {
    int(x): i
    for i, x in enumerate(
      range(dataset.num_classes) if label_map is None else label_map
    )
  }
  known = [[classes[x] for x in xs if x in classes] for xs in label_sets]
  padded = np.full((len(known), max(map(len, known), default=0)), -1, np.int32)
  for row, labels in zip(padded, known, strict=True):
    row[: len(labels)] = labels
  source = _WithLabelSets(dataset.source, padded)
  return dataclasses.replace(dataset, source=source)


@dataclasses.dataclass(frozen=True)
class _WithLabelSets:
  """Validation images with their label sets, int32 `[images, n]`."""

  source: datasets.Source
  label_sets: np.ndarray

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int, /) -> dict[str, Any]:
    example = self.source[index]
    name = datasets.file_name(example)
    match = _VALIDATION_IMAGE.search(name or '')
    number = int(match[1]) if match else 0
    if not 1 <= number <= len(self.label_sets):
      raise datasets.LabelError(
        f'example {index}, {name}, has no label set: the file is none of '
        f'ILSVRC2012_val_00000001 to {len(self.label_sets):08d}'
      )
    return {**example, 'label_set': self.label_sets[number - 1]}


def _key(name: str) -> str:
  """Returns the WordNet id that begins a class name, else the name."""
  match = _ID.match(name)
  return match[0] if match else name
