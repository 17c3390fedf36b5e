r"""Draws augmented training images with their labels.

  python -m experiments.figures.show_augment --output=augment.png \
    --config=experiments/nfnet_imagenet.py:F1 --config.data.data_dir=DIR

The images are the first of the first step of a run with this config. Below each
are the crops that it was mixed from, and the weights of its classes.
"""

import sys
import textwrap

import matplotlib.figure
import numpy as np
from absl import app, flags, logging
from ml_collections import config_dict
from PIL import Image

from nfnets_jax import command_line, devices, paths
from nfnets_jax.data import loader, transforms
from nfnets_jax.training import build

_CONFIG = command_line.define_config()
_OUTPUT = flags.DEFINE_string('output', None, 'A PNG file.')
_IMAGES = flags.DEFINE_integer('images', 32, 'Number of images.', lower_bound=1)
_COLUMNS = flags.DEFINE_integer('columns', 8, 'Images per row.', lower_bound=1)


def make_images(
  config: config_dict.ConfigDict, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
  """Makes the first images of the first step of a run.

  Args:
    config: config of the run.
    count: number of images.

  Returns:
    The N crops of each image, uint8 `[count, N, px, px, 3]`, with N = 2 if
    images are mixed, else 1; the images, uint8 `[count, px, px, 3]`; labels
    `[count, K]`; and K class names.

  Raises:
    ValueError: if the data cannot be read.
    FileNotFoundError: if the data set is missing.
  """
  dataset, _ = build.load_data(config)
  whole = build.create_transform(config)
  data = config.data
  crop = transforms.train_transform(data.image_size, data.crop, data.flip)

  def transform(
    first: loader.Examples,
    second: loader.Examples,
    uniform: np.ndarray,
    index: np.ndarray,
  ) -> loader.Batch:
    batch = whole(first, second, uniform, index)
    crops = [crop(first, first, uniform, index)['image']]
    if build.mixes(config):
      partners = transforms.numbers_of_second(uniform)
      crops.append(crop(second, second, partners, index)['image'])
    return {**batch, 'crops': np.stack(crops, axis=1)}

  batches = loader.train_batches(
    dataset,
    batch_size=count,
    transform=transform,
    partners=build.mixes(config),
    seed=config.seed,
    num_workers=0,
  )
  batch = next(batches)
  batches.close()
  classes = np.eye(dataset.num_classes)
  ratio = batch['ratio'][:, None]
  labels = ratio * classes[batch['label']]
  labels += (1 - ratio) * classes[batch['mix_label']]
  return batch['crops'], batch['image'], labels, dataset.class_names


def describe(label: np.ndarray, class_names: tuple[str, ...]) -> str:
  """Formats the two largest weights of a label `[K]`, if at least 0.005.

  Example:
    >>> print(describe(np.array([0.37, 0.0, 0.63]), ('hen', 'shark', 'tench')))
    tench 0.63
    hen 0.37
  """
  return '\n'.join(
    f'{textwrap.shorten(class_names[i], 24, placeholder="…")} {label[i]:.2f}'
    for i in np.argsort(-label)[:2]
    if label[i] >= 0.005
  )


def describe_policy(config: config_dict.ConfigDict) -> str:
  """Describes the transforms of a config in a line."""
  data, policy = config.data, config.augment
  parts = [f'{data.name}, {data.image_size} px, crop {data.crop}']
  if policy.mixup_alpha is not None:
    parts.append(f'MixUp {policy.mixup_alpha:g}')
  if policy.cutmix:
    parts.append('CutMix')
  if policy.rand_augment is not None:
    parts.append(f'RandAugment {policy.rand_augment}')
  return ', '.join(parts)


def tile(image: np.ndarray, crops: np.ndarray) -> np.ndarray:
  """Puts an image `[px, px, 3]` above its crops `[N, px, px, 3]`, halved."""
  side = image.shape[0] // 2
  below = np.full((side, *image.shape[1:]), 255, np.uint8)
  for i, crop in enumerate(crops):
    small = Image.fromarray(crop).resize((side, side))
    below[:, i * side : (i + 1) * side] = small
  return np.concatenate([image, below])


def draw(
  tiles: list[np.ndarray], captions: list[str], title: str, columns: int
) -> matplotlib.figure.Figure:
  """Draws tiles in rows, with captions below."""
  columns = min(columns, len(tiles))
  rows = -(-len(tiles) // columns)
  figure = matplotlib.figure.Figure(
    figsize=(1.7 * columns, 3.0 * rows + 0.4), layout='constrained'
  )
  figure.suptitle(title)
  grid = list(figure.subplots(rows, columns, squeeze=False).flat)
  for axes in grid:
    axes.set_axis_off()
  for axes, image, caption in zip(grid, tiles, captions, strict=False):
    axes.imshow(image)
    axes.text(
      0.5,
      -0.02,
      caption,
      ha='center',
      va='top',
      transform=axes.transAxes,
      fontsize=7,
    )
  return figure


def main(argv: list[str]) -> None:
  del argv
  devices.start_or_exit()
  logging.set_verbosity(logging.WARNING)
  config = _CONFIG.value
  try:
    crops, images, labels, names = make_images(config, _IMAGES.value)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f'error: {error}')
  title = describe_policy(config)
  figure = draw(
    [tile(*pair) for pair in zip(images, crops, strict=True)],
    [describe(label, names) for label in labels],
    title,
    _COLUMNS.value,
  )
  path = paths.local(_OUTPUT.value or '', '--output')
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=100)
  print(f'{len(images)} images of {title} in {path}')


if __name__ == '__main__':
  # Here, so that tests can import this with other commands.
  flags.mark_flags_as_required(['config', 'output'])
  app.run(main, flags_parser=command_line.parse_flags)
