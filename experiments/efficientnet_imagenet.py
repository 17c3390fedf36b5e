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

Differences from the original code:
  * Weight decay is on weights only; there also on the biases of squeeze-excite
    gates and classifier.
  * Batch normalisation uses the images of one device; there 128, of several
    devices. --config.model.cross_replica_axis=devices uses all.
  * RandAugment has magnitude 10 for all variants, the default there; its
    authors use 17 for B5, and 28, which is out of range here, for B7 and B8.
  * The batch size is 4096, there 2048 by default, with a learning rate
    proportional to it.
  * The evaluation crop omits 32 pixels, as there at first; later an eighth,
    which is the same at 224 pixels.
"""

from ml_collections import config_dict

from experiments import arguments
from nfnets_jax.models import variants
from nfnets_jax.training import config as defaults


def get_config(name: str = 'B0') -> config_dict.ConfigDict:
  """Returns the config of a variant, 'B0' to 'B8'."""
  known = [x.upper() for x in arguments.suffixes('efficientnet_')]
  arguments.check('EfficientNet', name.upper(), known)
  model = f'efficientnet_{name.lower()}'
  variant = variants.get(model)
  config = defaults.get_config()
  config.epochs = 350.0
  config.model = defaults.model(model)

  config.data.image_size = variant.train_size
  config.data.eval_image_size = variant.test_size
  config.data.eval_crop = 'crop_resize'

  config.augment.mixup_alpha = None
  config.augment.cutmix = False
  config.augment.rand_augment = '2x10'

  config.optimizer.name = 'rmsprop'
  config.optimizer.learning_rate_per_256 = 0.016
  config.optimizer.schedule = 'exponential'
  config.optimizer.weight_decay = 1e-5
  config.optimizer.clip = None

  config.ema_decay = 0.9999
  return config
