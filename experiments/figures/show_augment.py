r"""Draws training images as the network sees them, with their labels.

  python -m experiments.figures.show_augment --output=augment.png \
    --config=experiments/nfnet_imagenet.py:F1 --config.data.data_dir=DIR

The images come from the loader, with the policy of the config. They are those
of the first step of a run with this config, as far as its batch reaches. Below
each are the crops that it was made of, and how much of each class is in its
label.
"""

import sys

import numpy as np
from absl import app, flags, logging
from ml_collections import config_dict
from PIL import Image, ImageDraw, ImageFont

from nfnets_jax import command_line, devices, paths
from nfnets_jax.data import loader, transforms
from nfnets_jax.training import build

_CONFIG = command_line.define_config()
_OUTPUT = flags.DEFINE_string('output', None, 'The picture, such as FILE.png.')
_IMAGES = flags.DEFINE_integer('images', 32, 'Augmented images.', lower_bound=1)
_COLUMNS = flags.DEFINE_integer('columns', 8, 'Images in a row.', lower_bound=1)
_CELL = flags.DEFINE_integer(
  'cell', 160, 'Pixels that an image is wide in the picture.', lower_bound=64
)

# Pixels.
_GAP = 8
_LINE = 14


def make_images(
  config: config_dict.ConfigDict, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
  """Makes the first images of the first step of a run with this config.

  Args:
    config: of the run.
    count: how many.

  Returns:
    The crops that each image is made of, uint8 `[count, N, px, px, 3]` with N 2
    where images are mixed and else 1; the augmented images uint8
    `[count, px, px, 3]`; their labels `[count, K]`; and the K classes' names.

  Raises:
    ValueError: if the data cannot be read.
    FileNotFoundError: if there are no such data.
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


def describe(
  label: np.ndarray, class_names: tuple[str, ...]
) -> list[tuple[str, str]]:
  """Writes a label distribution as names and weights, the largest first.

  Args:
    label: `[K]` probabilities.
    class_names: K names.

  Returns:
    The classes that make up at least half a hundredth.

  Example:
    >>> describe(np.array([0.37, 0.0, 0.63]), ('goldfish', 'shark', 'tench'))
    [('tench', '0.63'), ('goldfish', '0.37')]
  """
  return [
    (class_names[i], f'{label[i]:.2f}')
    for i in np.argsort(-label)
    if label[i] >= 0.005
  ]


def describe_policy(config: config_dict.ConfigDict) -> str:
  """Writes what is done to the images of a config in one line."""
  data, policy = config.data, config.augment
  parts = [f'{data.name}, {data.image_size} px, crop {data.crop}']
  if policy.mixup_alpha is not None:
    parts.append(f'MixUp {policy.mixup_alpha:g}')
  if policy.cutmix:
    parts.append('CutMix')
  if policy.rand_augment is not None:
    parts.append(f'RandAugment {policy.rand_augment}')
  return ', '.join(parts)


def draw(
  crops: np.ndarray,
  images: np.ndarray,
  captions: list[list[tuple[str, str]]],
  title: str,
  columns: int,
  cell: int,
) -> Image.Image:
  """Draws a sheet of images over the crops that each was made of.

  Args:
    crops: `[B, N, px, px, 3]` uint8, N 1 or 2.
    images: `[B, px, px, 3]` uint8.
    captions: B lists of a name and a weight, of which two are shown.
    title: one line.
    columns: images in a row.
    cell: pixels that an image is wide.

  Returns:
    The picture.
  """
  columns = min(columns, len(images))
  rows = -(-len(images) // columns)
  small = cell // 2
  height = cell + small + 2 * _LINE + _GAP // 2
  sheet = Image.new(
    'RGB',
    (columns * (cell + _GAP) + _GAP, rows * (height + _GAP) + 3 * _GAP + _LINE),
    'white',
  )
  pen = ImageDraw.Draw(sheet)
  pen.text((_GAP, _GAP), title, 'black', ImageFont.load_default(_LINE))
  font = ImageFont.load_default(_LINE - 3)
  cells = zip(crops, images, captions, strict=True)
  for i, (ingredients, image, caption) in enumerate(cells):
    row, column = divmod(i, columns)
    left = _GAP + column * (cell + _GAP)
    top = 3 * _GAP + _LINE + row * (height + _GAP)
    _paste(sheet, image, left, top, cell)
    bottom = top + cell + _GAP // 4
    for place, ingredient in enumerate(ingredients):
      _paste(sheet, ingredient, left + place * small, bottom, small)
    for place, (name, weight) in enumerate(caption[:2]):
      line = bottom + small + place * _LINE
      room = cell - pen.textlength(f'  {weight}', font)
      while pen.textlength(name, font) > room:
        name = f'{name.rstrip("…")[:-1]}…'
      pen.text((left, line), name, 'black', font)
      pen.text((left + cell, line), weight, 'black', font, anchor='ra')
  return sheet


def _paste(
  sheet: Image.Image, image: np.ndarray, left: int, top: int, side: int
) -> None:
  # Few pixels stay pixels.
  is_small = image.shape[0] < side
  method = Image.Resampling.NEAREST if is_small else Image.Resampling.LANCZOS
  resized = Image.fromarray(image).resize((side, side), method)
  sheet.paste(resized, (left, top))


def main(argv: list[str]) -> None:
  """Draws the picture."""
  del argv
  devices.start_or_exit()
  logging.set_verbosity(logging.WARNING)
  config = _CONFIG.value
  try:
    crops, images, labels, names = make_images(config, _IMAGES.value)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f'error: {error}')
  captions = [describe(label, names) for label in labels]
  title = describe_policy(config)
  sheet = draw(crops, images, captions, title, _COLUMNS.value, _CELL.value)
  assert _OUTPUT.value is not None  # it is required
  path = paths.expand(_OUTPUT.value, '--output')
  path.parent.mkdir(parents=True, exist_ok=True)
  sheet.save(path)
  print(f'{len(images)} images of {title} in {path}')


if __name__ == '__main__':
  # Here, so that tests may import it beside other commands.
  flags.mark_flags_as_required(['config', 'output'])
  app.run(main, flags_parser=command_line.parse_flags)
