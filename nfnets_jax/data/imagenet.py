"""ImageNet's 1,000 classes and the sizes of its splits."""

import functools
import pathlib

from nfnets_jax import paths

# Images; the paper tests on `validation`.
SPLITS = {'train': 1_281_167, 'validation': 50_000}
_FILE = pathlib.Path(__file__).with_name('imagenet_classes.txt')


@functools.cache
def classes() -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Returns the WordNet ids and the descriptions, in the order of the labels.

  Example:
    >>> ids, descriptions = classes()
    >>> ids[0], descriptions[0]
    ('n01440764', 'tench, Tinca tinca')
  """
  lines = paths.read_text_lines(_FILE)
  ids, descriptions = zip(*(line.split(' ', 1) for line in lines), strict=True)
  return ids, descriptions
