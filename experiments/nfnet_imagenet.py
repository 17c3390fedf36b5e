"""NFNet-F0 to F7 on ImageNet, the paper's main result.

Source: Brock et al. 2021, tables 1 and 3, appendix A; the rest is in
nfnets_jax/training/config.py.
Command:
  python -m nfnets_jax.main --config=experiments/nfnet_imagenet.py:F1 \
    --workdir=DIR
Expected (the paper's top-1 / top-5 in %, and ms per step on 32 TPUv3 cores with
32 images each):
  F0 83.6 / 96.8,   73.3     F1 84.7 / 97.1,  158.5     F2 85.1 / 97.3,  295.8
  F3 85.7 / 97.5,  532.2     F4 85.9 / 97.6, 1033.3
with SAM
  F5 86.3 / 97.9, 1958.0     F6 86.5 / 97.9, 2774.1
F7 is not published. --config.optimizer.sam_rho=None turns SAM off: F5 86.0 /
97.6, 1398.5.

Differences:
  * The paper does not give the ρ of SAM for training from scratch; 0.05 is that
    of its fine-tuning.
  * SAM's ascent is averaged over the devices, as nfnets_jax/training/sam.py
    explains; in the paper each device ascends alone, as with
    --config.optimizer.sam_per_device=True.
"""

from ml_collections import config_dict

from experiments import arguments
from nfnets_jax.models import variants
from nfnets_jax.training import config as defaults

_WITH_SAM = ('F5', 'F6')


def get_config(name: str = 'F0') -> config_dict.ConfigDict:
  """Returns the config of a variant, 'F0' to 'F7' or 'F0+' to 'F7+'."""
  name = name.upper().replace('PLUS', '+')
  known = [f'F{x}'.replace('plus', '+') for x in arguments.suffixes('nfnet_f')]
  arguments.check('NFNet', name, known)
  model = f'nfnet_{name.lower().replace("+", "plus")}'
  variant = variants.get(model)
  config = defaults.get_config()

  config.model = defaults.model(model)
  config.data.image_size = variant.train_size
  config.data.eval_image_size = variant.test_size

  config.augment.rand_augment = variant.rand_augment

  config.optimizer.sam_rho = 0.05 if name in _WITH_SAM else None
  return config
