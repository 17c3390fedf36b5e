"""The paper's ablation: from NF-SE-ResNeXt-D to NFNet, row by row.

Source: Brock et al. 2021, table 2; see nfnet_imagenet.py for the full recipe.
Command:
  python -m nfnets_jax.main --workdir=DIR \
    --config=experiments/ablation_imagenet.py:F0,baseline
Expected (the paper's top-1 in %, mean of three seeds):
                      F0    F1    F2    F3
  baseline          80.4  81.7  82.0  82.3
  modified_width    80.9  81.8  82.0  82.3
  second_conv       81.3  82.2  82.4  82.7
  mixup             82.2  82.9  83.1  83.5
  rand_augment      83.2  84.6  84.8  85.0
  cutmix            83.6  84.7  85.1  85.7
  default_width     83.1  84.5  85.0  85.5
  batch_norm        83.4  84.4  85.1  85.5
The paper does not say whether the row `batch_norm` was trained with AGC; here
it is, unless --config.optimizer.clip=None.

Differences:
  * The paper does not say how many images MixUp mixes. Here, as in the released
    pipeline, it is all in the rows `mixup` and `rand_augment`, and half from
    `cutmix` on.
"""

from ml_collections import config_dict

from experiments import arguments, nfnet_imagenet

# Each row adds to the one before, up to `cutmix`, the full recipe. The last two
# change one thing each: the widths of a ResNet, and batch normalisation.
ROWS = (
  'baseline',
  'modified_width',
  'second_conv',
  'mixup',
  'rand_augment',
  'cutmix',
  'default_width',
  'batch_norm',
)

_RESNET_WIDTH = (256, 512, 1024, 2048)


def get_config(name: str = 'F0,baseline') -> config_dict.ConfigDict:
  """Returns the config of 'VARIANT,ROW', such as 'F1,mixup'."""
  variant, _, row = name.partition(',')
  arguments.check('row', row, ROWS)
  config = nfnet_imagenet.get_config(variant)
  step = ROWS.index(row)
  if row in ('baseline', 'default_width'):
    config.model.width = _RESNET_WIDTH
  if step < ROWS.index('second_conv'):
    config.model.use_two_convs = False
  if step < ROWS.index('mixup'):
    config.augment.mixup_alpha = None
  if step < ROWS.index('rand_augment'):
    config.augment.rand_augment = None
  if step < ROWS.index('cutmix'):
    config.augment.cutmix = False
  if row == 'batch_norm':
    config.model.norm = 'batch'
  return config
