"""The data set `digits`: 1,797 handwritten digits, without a download.

Importing this module registers it with TensorFlow Datasets.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class Digits(tfds.core.GeneratorBasedBuilder):
  """Handwritten digits of 8 x 8 pixels, from scikit-learn.

  Every fifth image (0, 5, 10, ...) is in the split `test`, 360 in all; the
  other 1,437 are in `train`. The original 17 levels, 0 to 16, become
  `round(level * 255 / 16)`. TFDS orders each split by a hash of the image
  indices, the same on every machine.

  Example:
    >>> tfds.builder('digits').info.features
    FeaturesDict({
        'image': Image(shape=(8, 8, 1), dtype=uint8),
        'label': ClassLabel(shape=(), dtype=int64, num_classes=10),
    })

  Reference:
    Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", 1998,
    https://archive.ics.uci.edu/dataset/80
  """

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description='Handwritten digits of 8 x 8 pixels, from scikit-learn.',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(8, 8, 1), encoding_format='png'),
          'label': tfds.features.ClassLabel(num_classes=10),
        }
      ),
      supervised_keys=('image', 'label'),
      homepage='https://archive.ics.uci.edu/dataset/80',
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    del dl_manager  # nothing to download
    return {
      'train': self._generate_examples(test=False),
      'test': self._generate_examples(test=True),
    }

  def _generate_examples(
    self, test: bool
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    # scikit-learn is needed only to prepare the data set.
    from sklearn import datasets

    digits = datasets.load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    for i, (image, label) in enumerate(zip(pixels, digits.target, strict=True)):
      if (i % 5 == 0) == test:
        yield i, {'image': _png(image), 'label': int(label)}


def _png(image: np.ndarray) -> bytes:
  """Encodes uint8 `[H, W]`; given an array, TFDS would need tensorflow."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format='PNG')
  return buffer.getvalue()
