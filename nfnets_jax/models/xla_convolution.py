"""XLA's convolution, and the padding of convolutions and pooling."""

import jax
from jax import lax

# Pixels before and after, for height and width.
Padding = list[tuple[int, int]]


def conv2d(
  x: jax.Array, w: jax.Array, stride: int, groups: int, padding: str
) -> jax.Array:
  """Convolves; see `convolution.conv2d`."""
  around: str | Padding = 'SAME'
  if padding == 'symmetric' and stride > 1:
    around = [((k - 1) // 2, (k - 1) // 2) for k in w.shape[:2]]
  return conv(x, w, around, stride=stride, groups=groups)


def conv(
  x: jax.Array,
  w: jax.Array,
  padding: str | Padding,
  *,
  stride: int = 1,
  w_dilation: int = 1,
  groups: int = 1,
) -> jax.Array:
  """Convolves channels-last images with explicit padding."""
  return lax.conv_general_dilated(
    x,
    w,
    window_strides=(stride, stride),
    padding=padding,
    rhs_dilation=(w_dilation, w_dilation),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )
