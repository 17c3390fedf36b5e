"""NF-RegNets B0 to B8 on ImageNet.

Source: Brock, De and Smith 2021, https://arxiv.org/abs/2101.08692, and the
released recipe; the rest is in nfnets_jax/training/config.py.
Command:
  python -m nfnets_jax.main --config=experiments/nf_regnet_imagenet.py:B0 \
    --workdir=DIR
Expected (that paper's top-1 in %, digitised): B0 77.0, B1 78.7, B2 80.0, B3
81.2, B4 82.5, B5 83.0; unpublished for B6 to B8.

Differences:
  * The released recipe ends at B5; B6 to B8 continue its weight decay, 1e-5
    more for each variant.
"""

from ml_collections import config_dict

from experiments import arguments
from nfnets_jax.models import variants
from nfnets_jax.training import config as defaults


def get_config(name: str = 'B0') -> config_dict.ConfigDict:
  """Returns the config of a variant, 'B0' to 'B8'."""
  known = [x.upper() for x in arguments.suffixes('nf_regnet_')]
  arguments.check('NF-RegNet', name.upper(), known)
  model = f'nf_regnet_{name.lower()}'
  variant = variants.get(model)
  config = defaults.get_config()
  config.batch_size = 1024
  config.model = defaults.model(model)

  config.data.image_size = variant.train_size
  config.data.eval_image_size = variant.test_size
  config.data.eval_crop = 'crop_resize'

  config.optimizer.end_learning_rate = 0.001
  config.optimizer.weight_decay = 1e-5 * (5 + int(model[-1]))
  config.optimizer.clip = None

  config.compute_dtype = 'float32'
  return config
