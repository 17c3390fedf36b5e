"""Transforms of training and evaluation examples.

Training: decode, crop, resize, flip, mix, RandAugment. The randomness of an
image is a function of its own `NUM_DRAWS` numbers, each with a fixed purpose.
So it does not depend on the chunk size or on the later steps. Small images in
memory are processed in chunks where the step is the same for all images.

Evaluation: decode, crop, resize.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nfnets_jax.data import crops, decode, mixing, randaugment, resize

Example = Mapping[str, Any]
Examples = Sequence[Example]
Batch = dict[str, np.ndarray]
# Of n examples, n partners, `[n, NUM_DRAWS]` numbers and `[n]` stream indices.
TrainTransform = Callable[[Examples, Examples, np.ndarray, np.ndarray], Batch]

# Random numbers per image: for its two photographs, mixing and RandAugment. A
# multiple of four, the block size of numpy's Philox.
NUM_DRAWS = 256
_PHOTO = crops.NUM_DRAWS + 1
_MIX = 2 * _PHOTO
_POLICY = _MIX + mixing.NUM_DRAWS
MAX_LAYERS = (NUM_DRAWS - _POLICY) // randaugment.NUM_DRAWS


def train_transform(
  image_size: int,
  crop: str = 'random_resized',
  flip: bool = True,
  mixup_alpha: float | None = None,
  cutmix: bool = False,
  rand_augment: str | None = None,
) -> TrainTransform:
  """Returns the transform of training examples.

  Args:
    image_size: side of the square images in pixels.
    crop: one of `crops.TRAIN_CROPS`.
    flip: whether to flip horizontally with probability 1/2.
    mixup_alpha: α of MixUp; None disables it.
    cutmix: whether to use CutMix; with both, they alternate.
    rand_augment: a policy such as `'4x10'`; see `randaugment.parse_policy`.

  Returns:
    A function of n examples from `decode_example`; their n partners (the same
    examples without mixing); `[n, NUM_DRAWS]` numbers, uniform in [0, 1); and
    `[n]` integer indices in the stream. It returns `image` uint8
    `[n, image_size, image_size, 3]`, `label` int32 `[n]`, `mix_label` int32
    `[n]`, and `ratio` float32 `[n]`, the weight of `label`; `mix_label` has the
    weight 1 − ratio.

  Raises:
    ValueError: if a crop or policy is unknown, or a number is out of range.

  Example:
    >>> transform = train_transform(32, mixup_alpha=0.2, rand_augment='2x5')
    >>> example = {'image': np.zeros((40, 50, 3), np.uint8), 'label': 3}
    >>> uniform = np.random.default_rng(0).random((1, NUM_DRAWS))
    >>> batch = transform([example], [example], uniform, np.arange(1))
    >>> batch['image'].shape, batch['label'].tolist()
    ((1, 32, 32, 3), [3])
  """
  cut = crops.train_crop(crop, image_size)
  if mixup_alpha is not None and not 0 < mixup_alpha < math.inf:
    raise ValueError(f'mixup alpha must be positive, not {mixup_alpha}')
  policy = None
  if rand_augment is not None:
    policy = randaugment.parse_policy(rand_augment)
    if policy.num_layers > MAX_LAYERS:
      raise ValueError(
        f'RandAugment policy {rand_augment!r} has more than {MAX_LAYERS} layers'
      )

  def photographs(examples: Examples, uniform: np.ndarray) -> np.ndarray:
    """Crops, resizes and flips; returns a new uint8 `[n, px, px, 3]`."""
    views = cut([example['image'] for example in examples], uniform)
    mirrored = uniform[:, -1] < (0.5 if flip else 0)
    if len(views) == 1 or not resize.same_shape(views):
      parts = [
        resize.resize_and_mirror(view[None], image_size, mirror[None])
        for view, mirror in zip(views, mirrored, strict=True)
      ]
      return parts[0] if len(parts) == 1 else np.concatenate(parts)
    return resize.resize_and_mirror(np.stack(views), image_size, mirrored)

  def transform(
    first: Examples, second: Examples, uniform: np.ndarray, index: np.ndarray
  ) -> Batch:
    images = photographs(first, uniform[:, :_PHOTO])
    label = mix_label = _labels(first)
    ratio = np.ones(len(first), np.float32)
    if mixing.is_on(mixup_alpha, cutmix):
      partners = photographs(second, uniform[:, _PHOTO:_MIX])
      mix_label = _labels(second)
      numbers = uniform[:, _MIX:_POLICY]
      images, ratio = mixing.mix(
        images, partners, numbers, index, mixup_alpha, cutmix
      )
    if policy is not None:
      augmented = [
        randaugment.rand_augment(image, numbers, policy)
        for image, numbers in zip(images, uniform[:, _POLICY:], strict=True)
      ]
      images = np.stack(augmented)
    return {
      'image': images,
      'label': label,
      'mix_label': mix_label,
      'ratio': ratio,
    }

  return transform


def eval_transform(
  image_size: int, crop: str = 'resize_crop_32'
) -> Callable[[Example], dict[str, Any]]:
  """Returns the transform of evaluation examples: decode, crop, resize.

  Args:
    image_size: side of the square result in pixels.
    crop: one of `crops.EVAL_CROPS`.

  Returns:
    A function of an example that returns
    `{'image': uint8 [image_size, image_size, 3], 'label': np.int32}`, and
    `label_set` if the example has one; see `labels.with_label_sets`.

  Raises:
    ValueError: if the crop is unknown or its number is out of range.

  Example:
    >>> transform = eval_transform(image_size=64, crop='crop_resize')
    >>> example = {'image': np.zeros((90, 120, 3), np.uint8), 'label': 3}
    >>> transform(example)['image'].shape
    (64, 64, 3)
  """
  view = crops.eval_crop(crop, image_size)

  def transform(example: Example) -> dict[str, Any]:
    image = view(decode_example(example)['image'])
    result = {'image': image, 'label': np.int32(example['label'])}
    if 'label_set' in example:
      result['label_set'] = example['label_set']
    return result

  return transform


def decode_example(example: Example) -> dict[str, Any]:
  """Decodes an example to `{'image': uint8 [H, W, 3], 'label': int}`.

  Args:
    example: `{'image': encoded bytes or uint8 [H, W, 3], 'label': int}`; with
      `'orient': True` its EXIF orientation is applied; see `decode`.

  Raises:
    ValueError: if it cannot be decoded.

  Example:
    >>> example = {'image': np.zeros((4, 2, 3), np.uint8), 'label': 3}
    >>> decode_example(example)['image'].shape
    (4, 2, 3)
  """
  image = decode.decode(example['image'], example.get('orient', False))
  return {'image': image, 'label': example['label']}


def numbers_of_second(uniform: np.ndarray) -> np.ndarray:
  """Returns the numbers `[n, NUM_DRAWS]` that crop an image like its partner.

  Example:
    >>> uniform = np.arange(NUM_DRAWS)[None]
    >>> numbers_of_second(uniform)[0, :2].tolist()
    [41, 42]
  """
  return np.roll(uniform, -_PHOTO, axis=1)


def _labels(examples: Sequence[Example]) -> np.ndarray:
  return np.array([example['label'] for example in examples], np.int32)
