"""Convolutions of blocks of pixels, for layers with few channels on TPUs.

A block of n×n pixels becomes one position with n² times the channels, "space to
depth", in the order rows, columns, channels. The 16 to 64 channels of a stem
fill few of a TPU's 128 lanes, in its memory as well.
"""

import jax
import jax.numpy as jnp

from nfnets_jax.models import precision, xla_convolution


def conv2d(
  x: jax.Array, w: jax.Array, stride: int, block: int, out_block: int
) -> jax.Array:
  """Convolves images stored as blocks of pixels.

  Equals the convolution of the pixels up to rounding. Each position computes
  all pixels of a block from the blocks around it, so the weight is repeated and
  padded with zeros.

  Args:
    x: inputs in blocks, `[B, H, W, block² · I]`.
    w: weights `[k, k, I, O]`, of the dtype of `x`.
    stride: step in pixels.
    block: side of a block of inputs in pixels, 1 for an image.
    out_block: side of a block of outputs in pixels.

  Returns:
    Outputs of a 'same' convolution of the pixels, in blocks: `[B, H / s, W / s,
    out_block² · O]` with s = `stride · out_block / block`.

  Raises:
    ValueError: if s is not a whole number that divides H and W.

  Example:
    >>> x, w = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 16))
    >>> y = conv2d(x, w, stride=2, block=1, out_block=2)
    >>> y.shape, depth_to_space(y, 2).shape
    ((1, 2, 2, 64), (1, 4, 4, 16))
  """
  step, rest = divmod(stride * out_block, block)
  if rest or step == 0 or x.shape[1] % step or x.shape[2] % step:
    raise ValueError(
      f'blocks of {out_block}×{out_block} pixels at stride {stride} cannot be '
      f'computed from {x.shape[1]}×{x.shape[2]} of {block}×{block} pixels'
    )
  # The gradient of the weight is summed over the pixels of a block in float32.
  wide, before = _weight_of_blocks(precision.widen(w), stride, block, out_block)
  w = wide.astype(x.dtype)
  padding = (before, len(w) - step - before)
  return xla_convolution.conv(x, w, [padding, padding], stride=step)


def depth_to_space(x: jax.Array, block: int) -> jax.Array:
  """Returns the pixels `[B, n·H, n·W, C]` of blocks `[B, H, W, n²·C]`."""
  batch, height, width, channels = x.shape
  channels //= block**2
  x = x.reshape(batch, height, width, block, block, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, height * block, width * block, channels)


def _weight_of_blocks(
  w: jax.Array, stride: int, block: int, out_block: int
) -> tuple[jax.Array, int]:
  """Returns the weight of blocks, and the blocks before the first."""
  size, _, channels, out_channels = w.shape
  pad = max(size - stride, 0) // 2  # of 'SAME', with the odd pixel at the end
  before = -(-pad // block)
  last = stride * (out_block - 1) + size - 1 - pad
  blocks = before + last // block + 1
  # The pixels that each pixel of a block reads, of all that the block reads.
  starts = [before * block - pad + stride * i for i in range(out_block)]
  ends = [blocks * block - size - start for start in starts]
  around = list(zip(starts, ends, strict=True))
  none = (0, 0)
  w = jnp.stack(
    [
      jnp.pad(w, (rows, cols, none, none)) for rows in around for cols in around
    ],
    axis=3,
  )
  w = w.reshape(blocks, block, blocks, block, channels, -1)
  w = w.transpose(0, 2, 1, 3, 4, 5)
  w = w.reshape(blocks, blocks, -1, out_block**2 * out_channels)
  return w, before
