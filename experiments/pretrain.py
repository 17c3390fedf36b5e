r"""Pre-training on many images, as on JFT-300M, to fine-tune afterwards.

The argument is 'MODEL,DATA'. DATA is 'folder', for a folder of photographs, or
the name of a TFDS data set; both may have any number of classes.

Source: Brock et al. 2021, section 6.2 and appendix A.5: 224 pixels, crops and
flips alone, no moving average. NFNets: batches of 4096, 40 epochs (the "plus"
nets 20), weight decay 1e-6. ResNets: batches of 1024, 10 epochs, a learning
rate of 0.4, 5,000 steps of warm-up, weight decay 1e-5. The rest is as on
ImageNet.
Command:
  python -m nfnets_jax.main --config=experiments/pretrain.py:nfnet_f4plus,DATA \
    --workdir=PRETRAINED
  python -m nfnets_jax.main \
    --config=experiments/finetune.py:nfnet_f4plus,imagenet2012 \
    --config.init_from=PRETRAINED --workdir=DIR
Expected, after JFT-300M (300 million images of some 18,000 classes, not
public): on ImageNet 89.2 % top-1 with NFNet-F4 and -F4+, in 3,700 and 1,860
TPUv3-core-days; experiments/benchmarks/core_days.py sets compiled steps beside
them.

Differences:
  * The paper gives the warm-up of ResNets only; NFNets have the same here. It
    is at most a third of the run.
  * The paper does not give the regularisation of pre-training; dropout,
    stochastic depth and label smoothing are as on ImageNet.
  * It pre-trains neither NF-RegNets, which get the recipe of NFNets, nor other
    NFNets than F4 and F4+, which get the epochs of these, nor EfficientNets,
    which get the recipe of ResNets.
  * F4+ is the released net of 525 million parameters; for the paper's 527, add
    --config.model.group_width='(192,128,128,128)' to both commands.
"""

from ml_collections import config_dict

from experiments import arguments
from nfnets_jax.models import variants
from nfnets_jax.training import config as defaults

_NFNET_RECIPE = ('nfnet', 'nf_regnet')  # families


def get_config(
  argument: str = 'nfnet_f4plus,imagenet2012',
) -> config_dict.ConfigDict:
  """Expands 'MODEL,DATA'."""
  name, _, data = argument.partition(',')
  if not data or ',' in data:
    raise ValueError(f"{argument!r} is no 'MODEL,DATA'")
  arguments.check('model', name, variants.VARIANTS)
  as_nfnet = variants.get(name).family in _NFNET_RECIPE
  config = defaults.get_config()
  config.epochs = 10.0
  if as_nfnet:
    config.epochs = 20.0 if name.endswith('plus') else 40.0
  config.batch_size = 4096 if as_nfnet else 1024

  config.model = defaults.model(name)

  config.data.name = data
  if data == 'folder':
    config.data.test_split = None
  elif not data.startswith('imagenet'):
    config.data.test_split = 'test'

  config.augment.mixup_alpha = None
  config.augment.cutmix = False

  config.optimizer.warmup_epochs = None  # 5,000 steps
  config.optimizer.weight_decay = 1e-6 if as_nfnet else 1e-5
  config.optimizer.clip = 'agc' if as_nfnet else None
  config.ema_decay = 0.0
  if not as_nfnet:
    config.data.eval_crop = 'crop_resize'
    config.compute_dtype = 'float32'

  config.eval_every_epochs = config.checkpoint_every_epochs = 1.0
  return config
