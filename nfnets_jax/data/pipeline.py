"""The images of training: decode, crop, flip, mix, RandAugment.

Everything random about an image is a function of `NUM_DRAWS` numbers of its
own, each with a fixed purpose. So an image does not depend on how many are made
at a time, and is the same for any configuration of what comes after it.

Small images that lie in memory are made in whole chunks: all is done for the
chunk at once that does not differ from image to image.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nfnets_jax.data import decode, mixing, randaugment, transforms

Example = Mapping[str, Any]
Batch = dict[str, np.ndarray]

# Numbers of an image: what its two photographs, their mixing and RandAugment
# take. A multiple of four, which numpy's Philox makes at a time.
NUM_DRAWS = 256
_PHOTO = transforms.CROP_DRAWS + 1
_MIX = 2 * _PHOTO
_POLICY = _MIX + mixing.NUM_DRAWS
MAX_LAYERS = (NUM_DRAWS - _POLICY) // randaugment.NUM_DRAWS


class TrainPipeline:
  """Makes training images of photographs.

  Attributes:
    mixes: whether an image is made of two photographs.
  """

  def __init__(
    self,
    image_size: int,
    crop: str = 'random_resized',
    flip: bool = True,
    mixup_alpha: float | None = None,
    cutmix: bool = False,
    rand_augment: str | None = None,
  ):
    """Checks and keeps what is to be done.

    Args:
      image_size: the side of the square images, in pixels.
      crop: `'random_resized'`, `'random_resized_AREA'`, `'pad_PIXELS'` or
        `'none'`; see `transforms`.
      flip: whether to mirror half of the photographs, at random.
      mixup_alpha: α of MixUp; None turns it off.
      cutmix: whether CutMix is on; with both, each makes every other image.
      rand_augment: a policy such as `'4x10'`; see `randaugment.parse_policy`.

    Raises:
      ValueError: if there is no such crop or policy, or a number makes no
        sense.
    """
    self._image_size = image_size
    self._crop = transforms.train_crop(crop, image_size)
    self._flip = flip
    if mixup_alpha is not None and mixup_alpha <= 0:
      raise ValueError(f'mixup alpha must be positive, not {mixup_alpha}')
    self._mixup_alpha, self._cutmix = mixup_alpha, cutmix
    self.mixes = mixup_alpha is not None or cutmix
    self._policy = None
    if rand_augment is not None:
      self._policy = randaugment.parse_policy(rand_augment)
      if self._policy.num_layers > MAX_LAYERS:
        raise ValueError(
          f'RandAugment policy {rand_augment!r} has more than {MAX_LAYERS} '
          'layers'
        )

  def __call__(
    self,
    first: Sequence[Example],
    second: Sequence[Example],
    uniform: np.ndarray,
    index: np.ndarray,
  ) -> Batch:
    """Makes n images.

    Args:
      first: n examples, as of `decode_example`.
      second: the partners that they are mixed with, if images are mixed; else
        any.
      uniform: `[n, NUM_DRAWS]`, uniform in [0, 1).
      index: `[n]` integers, the images' indices in the stream.

    Returns:
      `image` uint8 `[n, px, px, 3]`, `label` int32 `[n]`, `mix_label` int32
      `[n]`, and `ratio` float32 `[n]`, the weight of `label`; that of
      `mix_label` is the rest.

    Example:
      >>> pipeline = TrainPipeline(32, mixup_alpha=0.2, rand_augment='2x5')
      >>> example = {'image': np.zeros((40, 50, 3), np.uint8), 'label': 3}
      >>> uniform = np.random.default_rng(0).random((1, NUM_DRAWS))
      >>> batch = pipeline([example], [example], uniform, np.arange(1))
      >>> batch['image'].shape, batch['label'].tolist()
      ((1, 32, 32, 3), [3])
    """
    images = self._photographs(first, uniform[:, :_PHOTO])
    label = mix_label = _labels(first)
    ratio = np.ones(len(first), np.float32)
    if self.mixes:
      partners = self._photographs(second, uniform[:, _PHOTO:_MIX])
      mix_label = _labels(second)
      images, ratio = mixing.mix(
        images,
        partners,
        uniform[:, _MIX:_POLICY],
        index,
        self._mixup_alpha,
        self._cutmix,
      )
    if self._policy is not None:
      draws = uniform[:, _POLICY:]
      images = np.stack(
        [
          randaugment.rand_augment(image, numbers, self._policy)
          for image, numbers in zip(images, draws, strict=True)
        ]
      )
    return {
      'image': images,
      'label': label,
      'mix_label': mix_label,
      'ratio': ratio,
    }

  def _photographs(
    self, examples: Sequence[Example], uniform: np.ndarray
  ) -> np.ndarray:
    """Crops, resizes and flips, into a new uint8 `[n, px, px, 3]`."""
    crops = self._crop([example['image'] for example in examples], uniform)
    mirrored = uniform[:, -1] < (0.5 if self._flip else 0)
    if len(crops) == 1 or not transforms.same_shape(crops):
      parts = [
        transforms.resize_and_mirror(crop[None], self._image_size, flip[None])
        for crop, flip in zip(crops, mirrored, strict=True)
      ]
      return parts[0] if len(parts) == 1 else np.concatenate(parts)
    return transforms.resize_and_mirror(
      np.stack(crops), self._image_size, mirrored
    )


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
