"""EfficientNets B0 to B8 on ImageNet, which the paper compares with.

Source: Tan and Le 2019, https://arxiv.org/abs/1905.11946, section 5.2, with
RandAugment instead of AutoAugment as in Brock et al. 2021, table 3; the rest is
in nfnets_jax/training/config.py. More than two layers of RandAugment, MixUp and
CutMix do not help these nets, and SGD with a cosine hurts them (Brock et al.
2021, appendix).
Command:
  python -m nfnets_jax.main --config=experiments/efficientnet_imagenet.py:B0 \
    --workdir=DIR
Expected (Brock et al. 2021, table 3, top-1 / top-5 in %, ms a step on 32 TPUv3
cores with 32 images each):
  B0 77.1 / 93.3,   51.1     B3 81.6 / 95.7,  129.5     B4 82.9 / 96.4,  245.9
  B5 83.7 / 96.7,  450.5     B6 84.0 / 96.8,  775.7     B7 84.7 / 97.0, 1397.0

RandAugment has the magnitude of its authors for B5 and B7, 17 and 28, and else
the default of the original code, 10; B6 and B8 have that of their neighbour.
As in the original code, the random crop covers a tenth of the area or more, and
weight decay acts on all but batch normalisation.

Differences from the original code:
  * Batch normalisation averages over all devices; there over an eighth of the
    devices, at least eight. One device alone, as with
    --config.model.cross_replica_axis=None, has only a few images of the large
    nets at a time, as their batch needs micro-batches to fit.
  * Posterize keeps all bits above magnitude 20; there it shifts by a negative
    number, whose result TensorFlow does not define.
  * The batch size is 4096, there 2048 by default, with a learning rate
    proportional to it.
  * The evaluation crop omits 32 pixels, as there at first; later an eighth,
    which is the same at 224 pixels.
"""

from ml_collections import config_dict

from experiments import arguments
from nfnets_jax.models import variants
from nfnets_jax.runtime import parallel
from nfnets_jax.training import config as defaults

_MAGNITUDES = {'B5': 17, 'B6': 17, 'B7': 28, 'B8': 28}


def get_config(name: str = 'B0') -> config_dict.ConfigDict:
  """Returns the config of a variant, 'B0' to 'B8'."""
  known = [x.upper() for x in arguments.suffixes('efficientnet_')]
  arguments.check('EfficientNet', name.upper(), known)
  model = f'efficientnet_{name.lower()}'
  variant = variants.get(model)
  config = defaults.get_config()
  config.epochs = 350.0
  config.model = defaults.model(model)
  config.model.cross_replica_axis = parallel.AXIS

  config.data.image_size = variant.train_size
  config.data.eval_image_size = variant.test_size
  config.data.eval_crop = 'crop_resize'

  config.augment.mixup_alpha = None
  config.augment.cutmix = False
  config.augment.rand_augment = f'2x{_MAGNITUDES.get(name.upper(), 10)}'

  config.optimizer.name = 'rmsprop'
  config.optimizer.learning_rate_per_256 = 0.016
  config.optimizer.schedule = 'exponential'
  config.optimizer.weight_decay = 1e-5
  config.optimizer.decayed = '/(w|b)$'
  config.optimizer.clip = None

  config.ema_decay = 0.9999
  return config
