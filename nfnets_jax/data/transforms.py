"""The images of training and of evaluation, made of examples.

Training: decode, crop, resize, flip, mix, RandAugment. Everything random about
an image is a function of `NUM_DRAWS` numbers of its own, each with a fixed
purpose. So an image does not depend on how many are made at a time, and is the
same for any configuration of what comes after it. Small images that lie in
memory are made in whole chunks: all is done for the chunk at once that does not
differ from image to image.

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
# Of n examples, their partners, random numbers and indices in the stream.
TrainTransform = Callable[[Examples, Examples, np.ndarray, np.ndarray], Batch]

# Numbers of an image: what its two photographs, their mixing and RandAugment
# take. A multiple of four, which numpy's Philox makes at a time.
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
  """Makes the transform of training examples.

  Args:
    image_size: the side of the square images, in pixels.
    crop: `'random_resized'`, `'random_resized_AREA'`, `'pad_PIXELS'` or
      `'none'`; see `crops`.
    flip: whether to mirror half of the photographs, at random.
    mixup_alpha: α of MixUp; None turns it off.
    cutmix: whether CutMix is on; with both, each makes every other image.
    rand_augment: a policy such as `'4x10'`; see `randaugment.parse_policy`.

  Returns:
    A function of n examples, as of `decode_example`; their partners, the same
    examples if images are not mixed; `[n, NUM_DRAWS]` numbers, uniform in
    [0, 1); and `[n]` integers, the images' indices in the stream. It returns
    `image` uint8 `[n, image_size, image_size, 3]`, `label` int32 `[n]`,
    `mix_label` int32 `[n]`, and `ratio` float32 `[n]`, the weight of `label`;
    that of `mix_label` is the rest.

  Raises:
    ValueError: if there is no such crop or policy, or a number makes no sense.

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
    """Crops, resizes and flips, into a new uint8 `[n, px, px, 3]`."""
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
  """Makes the transform of evaluation examples: decode, crop, resize.

  Args:
    image_size: the side of the square result, in pixels.
    crop: `'resize_crop_PIXELS'`, `'resize_crop_FRACTION'`, `'crop_resize'` or
      `'resize'`; see `crops`.

  Returns:
    A function of an example, which returns
    `{'image': uint8 [image_size, image_size, 3], 'label': np.int32}`.

  Raises:
    ValueError: if there is no such crop, or its number makes no sense.

  Example:
    >>> transform = eval_transform(image_size=64, crop='crop_resize')
    >>> example = {'image': np.zeros((90, 120, 3), np.uint8), 'label': 3}
    >>> transform(example)['image'].shape
    (64, 64, 3)
  """
  view = crops.eval_crop(crop, image_size)

  def transform(example: Example) -> dict[str, Any]:
    example = decode_example(example)
    image = view(example['image'])
    return {'image': image, 'label': np.int32(example['label'])}

  return transform


def decode_example(example: Example) -> dict[str, Any]:
  """Decodes an example.

  Args:
    example: `{'image': encoded bytes or uint8 [H, W, 3], 'label': int}`; with
      `'orient': True` it is turned by its EXIF orientation; see `decode`.

  Returns:
    `{'image': uint8 [H, W, 3], 'label': int}`.

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
  """Returns the numbers with which a partner would be cropped as a first.

  Args:
    uniform: `[n, NUM_DRAWS]`, of images.

  Returns:
    `[n, NUM_DRAWS]`.

  Example:
    >>> uniform = np.arange(NUM_DRAWS)[None]
    >>> numbers_of_second(uniform)[0, :2].tolist()
    [41, 42]
  """
  return np.roll(uniform, -_PHOTO, axis=1)


def _labels(examples: Sequence[Example]) -> np.ndarray:
  return np.array([example['label'] for example in examples], np.int32)
