"""Batch-normalised ResNets on ImageNet, the paper's baseline.

Source: the released recipe for ResNets; the rest is in
nfnets_jax/training/config.py.
Command:
  python -m nfnets_jax.main --config=experiments/resnet_imagenet.py:50 \
    --workdir=DIR
  For batch statistics over all devices instead of each alone, add:
    --config.model.cross_replica_axis=devices
Expected (Brock et al. 2021, figure 2, top-1 in %, digitised): 76.4 for depth 50
and 78.9 for depth 200 at batch size 1024.
"""

from ml_collections import config_dict

from experiments import arguments
from nfnets_jax.training import config as defaults

_OTHERS = ('senet50', 'skipinit_resnet50', 'fixup_resnet50')


def get_config(depth: str = '50') -> config_dict.ConfigDict:
  """Returns the config of a depth: 50, 101, 152, 200, 288 or 600.

  Also of 'senet50', and of 'skipinit_resnet50' and 'fixup_resnet50', which have
  no normalisation.
  """
  depth = depth.removeprefix('resnet')
  known = [*arguments.suffixes('resnet'), *_OTHERS]
  arguments.check('ResNet', depth, known)
  config = defaults.get_config()
  config.epochs = 90.0
  config.batch_size = 1024
  name = depth if depth in _OTHERS else f'resnet{depth}'
  config.model = defaults.model(name)

  config.data.eval_crop = 'crop_resize'

  config.augment.mixup_alpha = None
  config.augment.cutmix = False

  config.optimizer.weight_decay = 1e-4
  config.optimizer.clip = None

  config.ema_decay = 0.0
  config.compute_dtype = 'float32'
  return config
