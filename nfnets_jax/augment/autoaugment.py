"""AutoAugment: one of 25 learned pairs of operations.

Differences from the released code: none but the random generator, and the one
that `operations` names. The policy is the released code's, named v0. It is not
the one that the AutoAugment paper prints for ImageNet.

Reference:
  Cubuk et al., "AutoAugment: Learning Augmentation Policies from Data", 2019,
  https://arxiv.org/abs/1805.09501
"""

import jax
from jax import numpy as jnp

from nfnets_jax.augment.operations import (
  OPERATIONS,
  argument,
  distort,
  to_uint8,
)

# (operation, probability, magnitude) twice in each sub-policy.
POLICY_V0 = (
  (('Equalize', 0.8, 1), ('ShearY', 0.8, 4)),
  (('Color', 0.4, 9), ('Equalize', 0.6, 3)),
  (('Color', 0.4, 1), ('Rotate', 0.6, 8)),
  (('Solarize', 0.8, 3), ('Equalize', 0.4, 7)),
  (('Solarize', 0.4, 2), ('Solarize', 0.6, 2)),
  (('Color', 0.2, 0), ('Equalize', 0.8, 8)),
  (('Equalize', 0.4, 8), ('SolarizeAdd', 0.8, 3)),
  (('ShearX', 0.2, 9), ('Rotate', 0.6, 8)),
  (('Color', 0.6, 1), ('Equalize', 1.0, 2)),
  (('Invert', 0.4, 9), ('Rotate', 0.6, 0)),
  (('Equalize', 1.0, 9), ('ShearY', 0.6, 3)),
  (('Color', 0.4, 7), ('Equalize', 0.6, 0)),
  (('Posterize', 0.4, 6), ('AutoContrast', 0.4, 7)),
  (('Solarize', 0.6, 8), ('Color', 0.6, 9)),
  (('Solarize', 0.2, 4), ('Rotate', 0.8, 9)),
  (('Rotate', 1.0, 7), ('TranslateY', 0.8, 9)),
  (('ShearX', 0.0, 0), ('Solarize', 0.8, 4)),
  (('ShearY', 0.8, 0), ('Color', 0.6, 4)),
  (('Color', 1.0, 0), ('Rotate', 0.6, 2)),
  (('Equalize', 0.8, 4), ('Equalize', 0.0, 8)),
  (('Equalize', 1.0, 4), ('AutoContrast', 0.6, 2)),
  (('ShearY', 0.4, 7), ('SolarizeAdd', 0.6, 7)),
  (('Posterize', 0.8, 2), ('Solarize', 0.6, 10)),
  (('Solarize', 0.6, 8), ('Equalize', 0.6, 1)),
  (('Color', 0.8, 6), ('Rotate', 0.4, 5)),
)

# The released code moves images farther here than in RandAugment.
_TRANSLATE = 250


def auto_augment(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Applies a random sub-policy of policy v0 to each image.

  Each image draws one of the 25 sub-policies, all equally likely. The two
  operations of the sub-policy then happen in turn, each with its probability.

  Args:
    keys: `[B]` random keys, one per image.
    images: `[B, H, W, 3]`, uint8 or floating; floating values are clipped to
      0..255 and their fractions dropped.

  Returns:
    `[B, H, W, 3]` of the type of `images`, whole numbers in 0..255.

  Example:
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> images = jnp.zeros((2, 16, 16, 3), jnp.uint8)
    >>> auto_augment(keys, images).shape
    (2, 16, 16, 3)

  Reference:
    Cubuk et al., 2019, section 3, https://arxiv.org/abs/1805.09501
  """
  keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
  operations, strengths = choose_sub_policies(keys[:, 0])

  def step(
    pixels: jax.Array, inputs: tuple[jax.Array, jax.Array, jax.Array]
  ) -> tuple[jax.Array, None]:
    keys, operation, strength = inputs
    return distort(keys, pixels, operation, strength), None

  # A scan compiles one step for the two.
  pixels, _ = jax.lax.scan(
    step, to_uint8(images), (keys[:, 1:].T, operations.T, strengths.T)
  )
  return pixels.astype(images.dtype)


def choose_sub_policies(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Draws a sub-policy per image, and which of its operations happen.

  Args:
    keys: `[B]` random keys, one per image.

  Returns:
    The operations, `[B, 2]` int32: indices into `operations.OPERATIONS`, or −1
    for one that does not happen. And their strengths, `[B, 2]` float32: the
    arguments without their signs.

  Example:
    >>> operations, strengths = choose_sub_policies(
    ...     jax.random.split(jax.random.key(0), 8))
    >>> operations.shape, strengths.shape
    ((8, 2), (8, 2))

  Reference:
    Cubuk et al., 2019, section 3, https://arxiv.org/abs/1805.09501
  """

  def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    which, coins = jax.random.split(key)
    sub_policy = jax.random.randint(which, (), 0, len(POLICY_V0))
    return sub_policy, jax.random.uniform(coins, (2,))

  sub_policy, uniform = jax.vmap(draw)(keys)
  indices = jnp.array(
    [[OPERATIONS.index(name) for name, _, _ in pair] for pair in POLICY_V0]
  )
  probabilities = jnp.array(
    [[probability for _, probability, _ in pair] for pair in POLICY_V0],
    jnp.float32,
  )
  strengths = jnp.array(
    [
      [argument(name, magnitude, _TRANSLATE) for name, _, magnitude in pair]
      for pair in POLICY_V0
    ],
    jnp.float32,
  )
  happens = uniform < probabilities[sub_policy]
  operations = jnp.where(happens, indices[sub_policy], -1)
  return operations, strengths[sub_policy]
