"""The paper's runs on ImageNet in miniature, for two cores.

Network, resolutions, recipe and code path are those of nfnet_imagenet.py, with
a small batch and few images. Accuracies mean nothing here.

Command: make rehearse-f1
Expected: three steps of sixteen images on one to eight devices, in under ten
minutes on two cores; see docs/results/rehearsals.md.
"""

from ml_collections import config_dict

from experiments import nfnet_imagenet


def get_config(name: str = 'F1') -> config_dict.ConfigDict:
  """Returns the config of a variant, 'F0' to 'F7' or 'F0+' to 'F7+'."""
  config = nfnet_imagenet.get_config(name)
  config.epochs = 1.0
  config.batch_size = 16
  config.eval_batch_size = 16
  config.data.train_split = 'train[:48]'
  config.data.test_split = 'validation[:16]'
  config.optimizer.warmup_epochs = 0.3
  config.log_every_steps = 1
  config.eval_every_epochs = 1.0
  config.checkpoint_every_epochs = 0.3
  return config
