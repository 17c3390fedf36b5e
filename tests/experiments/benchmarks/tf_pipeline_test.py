"""The peer of the input pipeline does the same as ours."""

import io

import numpy as np
import pytest
from PIL import Image

from nfnets_jax.data import crops, decode, operations, resize
from tests.experiments.benchmarks import photographs


@pytest.fixture(scope='module')
def pipeline():
  """What ours is timed beside."""
  pytest.importorskip('tensorflow')
  from experiments.benchmarks import tf_pipeline

  return tf_pipeline


@pytest.mark.parametrize('magnitude', [3, 10, 15])
@pytest.mark.parametrize('name', operations.OPERATIONS)
def test_operation_in_tensorflow_is_ours(pipeline, name, magnitude):
  with Image.open(io.BytesIO(photographs.make(1)[0])) as file:
    image = np.array(file)
  center = np.array([20, 50], np.int32)
  for sign in (1, -1) if name in operations.SIGNED else (1,):
    argument = sign * operations.argument(name, magnitude)
    theirs = pipeline.OPERATIONS[name](
      pipeline.tf.constant(image), argument, pipeline.tf.constant(center)
    ).numpy()
    ours = operations.apply(name, image, argument, tuple(center.tolist()))
    differs = np.abs(theirs.astype(int) - np.asarray(ours, int)) > 1
    assert theirs.dtype == np.uint8
    assert differs.mean() < 0.01


def test_resize_in_tensorflow_is_ours(pipeline):
  image = decode.decode(photographs.make(1)[0])
  np.testing.assert_array_equal(
    pipeline.resize(pipeline.tf.constant(image), 32).numpy(),
    resize.resize(image, 32, 32),
  )


def test_random_crops_in_tensorflow_are_as_large_as_ours(pipeline):
  photo = photographs.make(1)[0]
  pixels = decode.decode(photo)
  rng = np.random.default_rng(0)
  theirs, ours = (
    [np.prod(crop().shape[:2]) / (50 * 70) for _ in range(600)]
    for crop in (
      lambda: pipeline.decode_random_crop(photo),
      lambda: crops.random_resized_crop(pixels, rng.random(40)),
    )
  )
  assert min(theirs) == pytest.approx(0.1, abs=0.02)
  assert np.mean(theirs) == pytest.approx(np.mean(ours), abs=0.04)


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'mixup_alpha': 0.2},
    {'mixup_alpha': 0.2, 'cutmix': True, 'policy': (4, 10)},
  ],
)
def test_batches_of_tensorflow(pipeline, options):
  # Larger than a translation, which would leave nothing of some.
  batches = pipeline.batches(
    photographs.make(), batch_size=4, image_size=128, threads=2, **options
  )
  some = np.stack([next(batches) for _ in range(3)])
  assert some.shape == (3, 4, 128, 128, 3) and some.dtype == np.uint8
  assert some.std() > 10
