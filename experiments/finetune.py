r"""Fine-tuning: weights that are there, other classes, other resolutions.

The argument is 'MODEL,DATA'; with 'MODEL,DATA,head' the classifier alone is
trained.

Source: Brock et al. 2021, section 6.2 and appendix A.5: 15,000 steps of 2048
images, learning rate 0.1 whatever the batch, 5,000 steps of warm-up, cosine,
SAM with ρ = 0.05, weight decay 1e-5, dropout 0.25, stochastic depth 0.1, a
moving average (for the ResNets of 0.9999, which is taken here). The
augmentation is not told; here images are cropped and flipped, not mixed.
Command:
  python -m nfnets_jax.main --config=experiments/finetune.py:nfnet_f0,cifar10 \
    --config.init_from=F0_haiku.npz --workdir=DIR
Expected: the paper fine-tunes on ImageNet what was trained on JFT-300M, which
nobody else has: 89.2 % top-1 with NFNet-F4+.
"""

from ml_collections import config_dict

from experiments import arguments
from nfnets_jax.models import variants
from nfnets_jax.training import config as defaults

# Images of the training split, of which the number of epochs follows.
_SIZES = {
  'cifar10': 50_000,
  'cifar100': 50_000,
  'digits': 1_437,
  'imagenet2012': 1_281_167,
}
_STEPS, _WARMUP_STEPS, _BATCH_SIZE = 15_000, 5_000, 2048
HEAD_ONLY = r'^\w+/~/linear/=1,.=0'


def get_config(argument: str = 'nfnet_f0,cifar10') -> config_dict.ConfigDict:
  """Expands 'MODEL,DATA' or 'MODEL,DATA,head'."""
  name, _, rest = argument.partition(',')
  data, *options = rest.split(',')
  if data not in _SIZES or options not in ([], ['head']):
    raise ValueError(
      f"{argument!r} is no 'MODEL,DATA' or 'MODEL,DATA,head' with DATA one of "
      f'{", ".join(_SIZES)}'
    )
  arguments.check('model', name, variants.VARIANTS)
  variant = variants.get(name)
  epoch_steps = _SIZES[data] / _BATCH_SIZE
  config = defaults.get_config()
  config.epochs = _STEPS / epoch_steps
  config.batch_size = _BATCH_SIZE

  config.model = defaults.model(name)
  config.model.drop_rate = 0.25
  if 'stochdepth_rate' in config.model:
    config.model.stochdepth_rate = 0.1

  config.data.name = data
  config.data.image_size = variant.train_size
  config.data.eval_image_size = variant.test_size
  if data != 'imagenet2012':
    config.data.test_split = 'test'
    config.data.crop = 'random_resized_0.5'
    config.data.eval_crop = 'resize'  # small, and the object fills them
  if data == 'digits':
    config.data.prepare = True
    config.data.crop = 'pad_2'
    config.data.image_size = config.data.eval_image_size = 16
    config.data.flip = False  # a mirrored 2 is no digit

  config.augment.mixup_alpha = None
  config.augment.cutmix = False

  config.optimizer.learning_rate_per_256 = 0.1 * 256 / _BATCH_SIZE
  config.optimizer.warmup_epochs = _WARMUP_STEPS / epoch_steps
  config.optimizer.weight_decay = 1e-5
  config.optimizer.sam_rho = 0.05
  if options:
    config.optimizer.learning_rate_groups = HEAD_ONLY
  config.ema_decay = 0.9999

  config.eval_every_epochs = 500 / epoch_steps
  config.checkpoint_every_epochs = 500 / epoch_steps
  return config
