"""The released input pipeline in tensorflow, rewritten to measure against.

Decodes a random box of the JPEG, resizes and flips it, then optionally mixes it
with another by MixUp or CutMix and applies RandAugment, with the arguments and
peculiarities of `nfnets_jax.data.operations`. A test compares the two.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from nfnets_jax.data import operations

_FILL = 128


def batches(
  photos: Sequence[bytes],
  *,
  batch_size: int,
  image_size: int,
  threads: int,
  mixup_alpha: float | None = None,
  cutmix: bool = False,
  policy: tuple[int, int] | None = None,
) -> Iterator[np.ndarray]:
  """Returns an endless iterator of uint8 batches `[B, px, px, 3]`.

  Args:
    photos: JPEGs.
    batch_size: B.
    image_size: px.
    threads: number of threads.
    mixup_alpha: α of MixUp; None is off.
    cutmix: whether to use CutMix; with MixUp, each with probability 1/2.
    policy: number of layers and magnitude of RandAugment; None is off.
  """

  def photograph(encoded: Any) -> Any:
    image = resize(decode_random_crop(encoded), image_size)
    image = tf.image.random_flip_left_right(image)
    return tf.ensure_shape(image, (image_size, image_size, 3))

  @tf.autograph.experimental.do_not_convert
  def make(encoded: Any) -> Any:
    if mixup_alpha is None and not cutmix:
      image = photograph(encoded)
    else:
      first, second = photograph(encoded[0]), photograph(encoded[1])
      image = mix(first, second, mixup_alpha, cutmix)
    return image if policy is None else rand_augment(image, *policy)

  dataset = tf.data.Dataset.from_tensor_slices(list(photos)).repeat()
  if mixup_alpha is not None or cutmix:
    dataset = dataset.batch(2, drop_remainder=True)
  dataset = dataset.map(make, num_parallel_calls=threads)
  options = tf.data.Options()
  options.autotune.enabled = False
  options.experimental_optimization.inject_prefetch = False
  options.threading.private_threadpool_size = threads
  options.threading.max_intra_op_parallelism = 1
  dataset = dataset.batch(batch_size).with_options(options)
  return dataset.as_numpy_iterator()


def decode_random_crop(encoded: Any) -> Any:
  """Decodes a random box, uint8 `[h, w, 3]`."""
  top_left, size, _ = tf.image.sample_distorted_bounding_box(
    tf.image.extract_jpeg_shape(encoded),
    bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
    min_object_covered=0.1,
    aspect_ratio_range=(3 / 4, 4 / 3),
    area_range=(0.08, 1.0),
    max_attempts=10,
    use_image_if_no_bounding_boxes=True,
  )
  window = tf.concat([top_left[:2], size[:2]], axis=0)
  return tf.image.decode_and_crop_jpeg(encoded, window, channels=3)


def resize(image: Any, px: int) -> Any:
  """Resizes `[h, w, 3]` to uint8 `[px, px, 3]` as released."""
  levels = tf.raw_ops.ResizeBicubic(
    images=image[None], size=(px, px), half_pixel_centers=True
  )
  return tf.saturate_cast(tf.round(levels[0]), tf.uint8)


def mix(first: Any, second: Any, alpha: float | None, cutmix: bool) -> Any:
  """Mixes two uint8 images `[H, W, 3]` by MixUp or CutMix."""

  def blend() -> Any:
    gamma = tf.random.gamma((2,), alpha)
    # Both can be 0 in float32.
    ratio = tf.math.divide_no_nan(gamma[0], gamma[0] + gamma[1])
    pixels = [tf.cast(image, tf.float32) for image in (first, second)]
    pixels = ratio * pixels[0] + (1 - ratio) * pixels[1]
    return tf.cast(tf.round(pixels), tf.uint8)

  def paste() -> Any:
    height, width, _ = first.shape
    size = tf.constant([height, width], tf.float32)
    center = tf.floor(tf.random.uniform((2,)) * size)
    half = tf.floor(tf.sqrt(tf.random.uniform(())) * size) // 2
    down = tf.abs(tf.range(0.5, float(height)) - center[0]) < half[0]
    across = tf.abs(tf.range(0.5, float(width)) - center[1]) < half[1]
    return tf.where((down[:, None] & across)[..., None], first, second)

  if alpha is None:
    return paste()
  if not cutmix:
    return blend()
  return tf.cond(tf.random.uniform(()) < 0.5, blend, paste)


def rand_augment(image: Any, layers: int, magnitude: int) -> Any:
  """Applies `layers` random operations to one uint8 image `[H, W, 3]`."""
  height, width, _ = image.shape
  for _ in range(layers):
    sign = tf.where(tf.random.uniform(()) < 0.5, -1.0, 1.0)
    center = tf.random.uniform((2,)) * tf.constant([height, width], tf.float32)
    branches = [
      functools.partial(
        operation,
        image,
        operations.argument(name, magnitude)
        * (sign if name in operations.SIGNED else 1.0),
        tf.cast(center, tf.int32),
      )
      for name, operation in OPERATIONS.items()
    ]
    which = tf.random.uniform((), maxval=len(branches), dtype=tf.int32)
    image = tf.ensure_shape(tf.switch_case(which, branches), image.shape)
  return image


def _blend(degenerate: Any, image: Any, factor: Any) -> Any:
  start, end = (tf.cast(x, tf.float32) for x in (degenerate, image))
  value = start + factor * (end - start)
  return tf.cast(tf.clip_by_value(value, 0, 255), tf.uint8)


def _auto_contrast(image: Any) -> Any:
  levels = tf.cast(image, tf.int32)
  low, high = tf.reduce_min(levels, (0, 1)), tf.reduce_max(levels, (0, 1))
  stretched = (levels - low) * 255 // tf.maximum(high - low, 1)
  return tf.cast(tf.where(high > low, stretched, levels), tf.uint8)


def _equalize(image: Any) -> Any:
  def equalize(channel: Any) -> Any:
    levels = tf.cast(channel, tf.int32)
    counts = tf.histogram_fixed_width(levels, (0, 255), nbins=256)
    below = tf.cumsum(counts, exclusive=True)
    step = tf.reduce_max(tf.where(counts > 0, below, 0)) // 255
    table = tf.minimum((below + step // 2) // tf.maximum(step, 1), 255)
    return tf.cond(
      step > 0,
      lambda: tf.cast(tf.gather(table, levels), tf.uint8),
      lambda: channel,
    )

  return tf.stack([equalize(image[..., c]) for c in range(3)], axis=-1)


def _posterize(image: Any, bits: float) -> Any:
  shift = tf.constant(8 - min(max(int(bits), 1), 8), tf.uint8)
  shifted = tf.bitwise.right_shift(image, shift)
  return tf.bitwise.left_shift(shifted, shift)


def _solarize(image: Any, threshold: float) -> Any:
  return tf.where(image < int(threshold) % 256, image, 255 - image)


def _solarize_add(image: Any, levels: float) -> Any:
  added = tf.cast(image, tf.int32) + int(levels)
  added = tf.cast(tf.clip_by_value(added, 0, 255), tf.uint8)
  return tf.where(image < 128, added, image)


def _contrast(image: Any, factor: float) -> Any:
  height, width, _ = image.shape
  return _blend(min(height * width // 256, 255), image, factor)


def _sharpness(image: Any, factor: float) -> Any:
  kernel = np.ones((3, 3, 3, 1), np.float32)
  kernel[1, 1] = 5
  pixels = tf.cast(image, tf.float32)[None]
  smooth = tf.nn.depthwise_conv2d(pixels, kernel / 13, (1, 1, 1, 1), 'VALID')
  smooth = tf.cast(tf.clip_by_value(smooth[0], 0, 255), tf.uint8)
  border = ((1, 1), (1, 1), (0, 0))
  inside = tf.pad(tf.ones_like(smooth), border) == 1
  return _blend(tf.where(inside, tf.pad(smooth, border), image), image, factor)


def _affine(image: Any, *coefficients: Any) -> Any:
  """Maps output pixel (x, y) to input (a x + b y + c, d x + e y + f)."""
  moved = tf.raw_ops.ImageProjectiveTransformV3(
    images=image[None],
    transforms=tf.stack(
      [tf.cast(x, tf.float32) for x in (*coefficients, 0, 0)]
    )[None],
    output_shape=image.shape[:2],
    fill_value=float(_FILL),
    interpolation='NEAREST',
    fill_mode='CONSTANT',
  )
  return moved[0]


def _rotate(image: Any, degrees: Any) -> Any:
  height, width, _ = image.shape
  right, bottom = width - 1, height - 1
  angle = degrees * (np.pi / 180)
  cos, sin = tf.cos(angle), tf.sin(angle)
  dx = (right - cos * right + sin * bottom) / 2
  dy = (bottom - sin * right - cos * bottom) / 2
  return _affine(image, cos, -sin, dx, sin, cos, dy)


def _cutout(image: Any, half: float, center: Any) -> Any:
  height, width, _ = image.shape
  down = tf.range(height) - center[0]
  across = tf.range(width) - center[1]
  rows = (down >= -int(half)) & (down < int(half))
  columns = (across >= -int(half)) & (across < int(half))
  box = (rows[:, None] & columns[None])[..., None]
  return tf.where(box, tf.constant(_FILL, tf.uint8), image)


# Functions of the image, the argument, and the centre (y, x) of Cutout's box.
OPERATIONS: dict[str, Callable[[Any, Any, Any], Any]] = {
  'AutoContrast': lambda image, x, center: _auto_contrast(image),
  'Equalize': lambda image, x, center: _equalize(image),
  'Invert': lambda image, x, center: 255 - image,
  'Rotate': lambda image, x, center: _rotate(image, x),
  'Posterize': lambda image, x, center: _posterize(image, x),
  'Solarize': lambda image, x, center: _solarize(image, x),
  'Color': lambda image, x, center: _blend(
    tf.image.rgb_to_grayscale(image), image, x
  ),
  'Contrast': lambda image, x, center: _contrast(image, x),
  'Brightness': lambda image, x, center: _blend(0, image, x),
  'Sharpness': lambda image, x, center: _sharpness(image, x),
  'ShearX': lambda image, x, center: _affine(image, 1, x, 0, 0, 1, 0),
  'ShearY': lambda image, x, center: _affine(image, 1, 0, 0, x, 1, 0),
  'TranslateX': lambda image, x, center: _affine(image, 1, 0, x, 0, 1, 0),
  'TranslateY': lambda image, x, center: _affine(image, 1, 0, 0, 0, 1, x),
  'Cutout': _cutout,
  'SolarizeAdd': lambda image, x, center: _solarize_add(image, x),
}
