"""Normalisation against float64, for every type of image."""

import numpy as np
import pytest
from jax import numpy as jnp

from nfnets_jax.training.normalize import normalize


@pytest.mark.parametrize('shape', [(2, 3, 5, 3), (4, 4, 3)])
@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_is_the_formula(shape, dtype):
  images = np.random.default_rng(0).uniform(0, 255, shape).astype(dtype)
  mean = np.array([0.485, 0.456, 0.406])
  std = np.array([0.229, 0.224, 0.225])
  expected = (images.astype(np.float64) / 255 - mean) / std
  result = normalize(jnp.asarray(images))
  assert result.dtype == jnp.float32
  np.testing.assert_allclose(result, expected, atol=1e-5)


def test_bfloat16_is_the_rounded_float32():
  images = np.random.default_rng(0).uniform(0, 255, (2, 8, 8, 3))
  images = jnp.asarray(images, jnp.float32)
  result = normalize(images, dtype=jnp.bfloat16)
  expected = normalize(images).astype(jnp.bfloat16)
  assert result.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    result.astype(jnp.float32), expected.astype(jnp.float32)
  )
