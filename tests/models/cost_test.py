import jax
import jax.numpy as jnp
import pytest
from jax import lax

from nfnets_jax import models


@pytest.mark.parametrize('groups', [1, 4])
def test_convolution(groups):
  x, w = jnp.ones((2, 8, 8, 16)), jnp.ones((3, 3, 16 // groups, 32))

  def conv(x, w):
    return lax.conv_general_dilated(
      x,
      w,
      (2, 2),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=groups,
    )

  assert models.count_macs(conv, x, w) == 2 * 4 * 4 * 32 * 9 * 16 // groups


def test_looks_inside_of_jit_remat_and_scan():
  x = jnp.ones((5, 5))

  def inner(x, _):
    return jax.jit(jax.checkpoint(lambda x: x @ x))(x), None

  assert (
    models.count_macs(lambda x: lax.scan(inner, x, None, length=3)[0], x)
    == 3 * 5**3
  )
