r"""Fine-tuning: existing weights, other classes, other resolutions.

The argument is 'MODEL,DATA'; 'MODEL,DATA,head' trains the classifier alone.
DATA is 'folder', for a folder of photographs, or the name of a TFDS data set.

Source: Brock et al. 2021, section 6.2 and appendix A.5: 15,000 steps of 2048
images, of which 5,000 are warm-up, a learning rate of 0.1 whatever the batch,
cosine decay. NFNets have SAM with ρ = 0.05, weight decay 1e-5, dropout 0.25 and
stochastic depth 0.1; ResNets have none of these, and separate runs at 224, 320
and 384 pixels (data.image_size, data.eval_image_size). The moving average
decays by 0.9999.
Command:
  python -m nfnets_jax.main --config=experiments/finetune.py:nfnet_f0,folder \
    --config.data.data_dir=photos --config.init_from=F0_haiku.npz \
    --workdir=DIR
  config.init_from may also be the run folder of experiments/pretrain.py, whose
  final weights get a new classifier unless the classes are the same.
Expected: on ImageNet, after pre-training on JFT-300M, which is not public:
89.2 % top-1 with NFNet-F4+; 79.5, 80.9 and 81.1 % with NF-ResNet-50 at the
three sizes.

Differences:
  * The steps, batches, warm-up and learning rate above need some 300,000
    images. For fewer, `training.config.derive` has ours: batches of an eighth
    of the images, at most 100 epochs, a third of them warm-up, and a learning
    rate of at most 0.1 per 256 images. The run's config.json has the numbers.
  * The paper does not repeat the moving average's decay for NFNets, nor tell
    the augmentation (here crops and flips, unmixed) or whether ResNets are
    clipped (here not, as in their training on ImageNet).
  * It fine-tunes neither NF-RegNets, which get the recipe of NFNets, nor
    EfficientNets, which get that of ResNets, without AGC as they are
    batch-normalised.
"""

from ml_collections import config_dict

from experiments import arguments
from nfnets_jax.models import variants
from nfnets_jax.training import config as defaults

HEAD_ONLY = r'^\w+/~/linear/=1,.=0'
_NFNET_RECIPE = ('nfnet', 'nf_regnet')  # families


def get_config(argument: str = 'nfnet_f0,cifar10') -> config_dict.ConfigDict:
  """Expands 'MODEL,DATA' or 'MODEL,DATA,head'."""
  name, _, rest = argument.partition(',')
  data, *options = rest.split(',')
  if not data or options not in ([], ['head']):
    raise ValueError(f"{argument!r} is no 'MODEL,DATA' or 'MODEL,DATA,head'")
  arguments.check('model', name, variants.VARIANTS)
  variant = variants.get(name)
  as_nfnet = variant.family in _NFNET_RECIPE
  config = defaults.get_config()
  # All four follow from the number of images.
  config.epochs = config.batch_size = None
  config.optimizer.learning_rate_per_256 = None
  config.optimizer.warmup_epochs = None

  config.model = defaults.model(name)
  config.model.drop_rate = 0.25 if as_nfnet else 0.0
  config.model.stochdepth_rate = 0.1 if as_nfnet else 0.0

  config.data.name = data
  config.data.image_size = variant.train_size
  config.data.eval_image_size = variant.test_size
  if data != 'imagenet2012':
    config.data.test_split = None if data == 'folder' else 'test'
    config.eval_batch_size = 64  # a small test split is padded to it
  if data in ('cifar10', 'cifar100', 'digits'):
    config.data.crop = 'random_resized_0.5'
    config.data.eval_crop = 'resize'  # small, and the object fills them
  if data == 'digits':
    config.data.prepare = True
    config.data.crop = 'pad_2'
    config.data.image_size = config.data.eval_image_size = 16
    config.data.flip = False  # a mirrored 2 is no digit

  config.augment.mixup_alpha = None
  config.augment.cutmix = False

  config.optimizer.weight_decay = 1e-5 if as_nfnet else 0.0
  config.optimizer.clip = 'agc' if as_nfnet else None
  config.optimizer.sam_rho = 0.05 if as_nfnet else None
  if options:
    config.optimizer.learning_rate_groups = HEAD_ONLY
  config.ema_decay = 0.9999

  every = 1.0 if data == 'imagenet2012' else 5.0
  config.eval_every_epochs = config.checkpoint_every_epochs = every
  return config
