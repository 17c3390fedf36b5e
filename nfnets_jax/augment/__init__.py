"""The device side of the input pipeline: mix, distort, normalise.

Pure, jittable functions of random keys and images, in the order in which the
recipe applies them:

* `mix_batch` (`mixup`, `cutmix`): two photographs become one image;
* `rand_augment` or `auto_augment`: random colour and geometric operations;
* `normalize`: from 0..255 to zero mean and unit variance.

Randomness is per image. Where a function takes `keys`, it takes one key for
each image that it returns, so that an image depends on its key alone: not on
its neighbours, nor on how a batch is split over devices. To make them:

  index = jnp.arange(batch_size)  # the images' places in the global batch
  keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, index)

Reference:
  Brock et al., 2021, appendix A, https://arxiv.org/abs/2102.06171
"""

from nfnets_jax.augment.autoaugment import auto_augment
from nfnets_jax.augment.mixing import cutmix, mix_batch, mixup
from nfnets_jax.augment.normalize import (
  IMAGENET_MEAN,
  IMAGENET_STD,
  normalize,
)
from nfnets_jax.augment.randaugment import parse_policy, rand_augment

__all__ = [
  'IMAGENET_MEAN',
  'IMAGENET_STD',
  'auto_augment',
  'cutmix',
  'mix_batch',
  'mixup',
  'normalize',
  'parse_policy',
  'rand_augment',
]
