"""NF-ResNets on ImageNet, without AGC, or with it by override.

Source: Brock, De and Smith 2021, https://arxiv.org/abs/2101.08692, and the
released recipe for ResNets; the rest is in nfnets_jax/training/config.py.
Command:
  python -m nfnets_jax.main --config=experiments/nf_resnet_imagenet.py:50 \
    --workdir=DIR
  For the large batches of Brock et al. 2021, figure 2, add:
    --config.optimizer.clip=agc --config.batch_size=4096
Expected (Brock et al. 2021, figure 2, top-1 in %, digitised): depth 50 at batch
size 1024 76.9 without AGC and 76.95 with it, at 4096 below 70 without and 76.7
with; depth 200 at 1024 79.5 without and 79.6 with.

Differences:
  * No recipe for these nets is released; this is that of batch-normalised
    ResNets. The paper does not give the rates of stochastic depth and dropout;
    here they are 0.1, the default of the released module, and 0.
"""

from ml_collections import config_dict

from experiments import arguments
from nfnets_jax.training import config as defaults


def get_config(depth: str = '50') -> config_dict.ConfigDict:
  """Returns the config of a depth: 50, 101, 152, 200, 288 or 600."""
  arguments.check('NF-ResNet', depth, arguments.suffixes('nf_resnet'))
  config = defaults.get_config()
  config.epochs = 90.0
  config.batch_size = 1024
  config.model = defaults.model(f'nf_resnet{depth}')

  config.data.eval_crop = 'crop_resize'

  config.augment.mixup_alpha = None
  config.augment.cutmix = False

  config.optimizer.weight_decay = 1e-4
  config.optimizer.clip = None

  config.ema_decay = 0.0
  config.compute_dtype = 'float32'
  return config
