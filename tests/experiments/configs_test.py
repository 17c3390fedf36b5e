"""The configs of experiments/ are complete and build what they say."""

import itertools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from ml_collections import config_dict
from PIL import Image

from experiments import (
  ablation_imagenet,
  cifar10,
  digits,
  efficientnet_imagenet,
  finetune,
  nf_regnet_imagenet,
  nf_resnet_imagenet,
  nfnet_imagenet,
  overfit,
  pretrain,
  resnet_imagenet,
)
from nfnets_jax import models
from nfnets_jax.data import transforms
from nfnets_jax.runtime import parallel
from nfnets_jax.training import (
  build,
  check,
  groups,
  init_from,
  optimizer,
  schedules,
  train,
)
from nfnets_jax.training import config as defaults

# The paper's table 1: dropout, training and test size, RandAugment.
TABLE = {
  'F0': (0.2, 192, 256, '4x5'),
  'F1': (0.3, 224, 320, '4x10'),
  'F2': (0.4, 256, 352, '4x10'),
  'F3': (0.4, 320, 416, '4x15'),
  'F4': (0.5, 384, 512, '4x15'),
  'F5': (0.5, 416, 544, '4x15'),
  'F6': (0.5, 448, 576, '4x15'),
  'F7': (0.5, 480, 608, '4x15'),
}


@pytest.mark.parametrize('plus', ['', '+'])
@pytest.mark.parametrize('name', TABLE)
def test_nfnet_imagenet_is_the_paper(name, plus):
  config = nfnet_imagenet.get_config(name + plus)
  assert (
    config.model.drop_rate,
    config.data.image_size,
    config.data.eval_image_size,
    config.augment.rand_augment,
  ) == TABLE[name]
  assert config.model.name == f'nfnet_{name.lower()}{"plus" if plus else ""}'
  assert config.model.stochdepth_rate == 0.25
  assert (config.epochs, config.batch_size) == (360, 4096)
  assert config.data.name == 'imagenet2012'
  assert config.data.eval_crop == 'resize_crop_32'
  assert config.augment.mixup_alpha == 0.2
  assert config.augment.cutmix
  assert config.optimizer.to_dict() == {
    'name': 'sgd',
    'learning_rate_per_256': 0.1,
    'warmup_epochs': 5,
    'schedule': 'cosine',
    'end_learning_rate': 0.0,
    'decay_rate': 0.97,
    'decay_epochs': 2.4,
    'momentum': 0.9,
    'weight_decay': 2e-5,
    'decayed': '/w$',
    'clip': 'agc',
    'clipping': 0.01,
    'clip_eps': 1e-3,
    'unclipped': r'^[^/]+/~/linear/w$',
    'max_norm': 1.0,
    'skip_nonfinite': 0,
    'learning_rate_groups': None,
    # Of the paper's rows; for nets of its own, none.
    'sam_rho': 0.05 if name + plus in ('F5', 'F6') else None,
    'sam_fraction': 0.2,
    'sam_per_device': False,
  }
  assert config.label_smoothing == 0.1
  assert config.ema_decay == 0.99999
  assert config.compute_dtype == 'bfloat16'


@pytest.mark.parametrize(
  ('module', 'argument', 'message'),
  [
    (nfnet_imagenet, 'F9', r"no NFNet 'F9'; choose one of F0, F0\+, .*, F7\+$"),
    (nfnet_imagenet, '', "no NFNet ''; choose one of F0"),
    (ablation_imagenet, 'G1,mixup', "no NFNet 'G1'; choose one of F0"),
    (ablation_imagenet, 'F1,mix_up', r"'mix_up'; .*did you mean mixup\?"),
    (ablation_imagenet, 'F1', "there is no row ''; choose one of baseline"),
    (nf_regnet_imagenet, 'B9', "no NF-RegNet 'B9'; choose one of B0, .*, B8$"),
    (efficientnet_imagenet, 'b', "no EfficientNet 'B'; choose one of B0"),
    (
      nf_resnet_imagenet,
      '51',
      "no NF-ResNet '51'; choose one of 50, 101, .*600$",
    ),
    (resnet_imagenet, 'fixup_resnet5', r'did you mean fixup_resnet50\?'),
    (resnet_imagenet, 'nfnet_f0', "no ResNet 'nfnet_f0'; choose one of 50"),
    (finetune, 'nfnet_f9,digits', "no model 'nfnet_f9'; did you mean nfnet_f"),
    (pretrain, 'nfnet_f9,digits', "no model 'nfnet_f9'; did you mean nfnet_f"),
    (pretrain, 'nfnet_f0', "'nfnet_f0' is no 'MODEL,DATA'"),
  ],
)
def test_unknown_arguments_list_the_known(module, argument, message):
  with pytest.raises(ValueError, match=message):
    module.get_config(argument)


def test_arguments_in_other_spellings():
  for name in ('f1+', 'F1plus', 'F1+'):
    assert nfnet_imagenet.get_config(name).model.name == 'nfnet_f1plus'
  assert resnet_imagenet.get_config('resnet50').model.name == 'resnet50'


@pytest.mark.thorough
@pytest.mark.parametrize(
  'config',
  [
    digits.get_config(),
    cifar10.get_config(),
    overfit.get_config(),
    nfnet_imagenet.get_config('F6'),
    nf_resnet_imagenet.get_config('50'),
    nf_regnet_imagenet.get_config('B0'),
    resnet_imagenet.get_config('50'),
    efficientnet_imagenet.get_config('B0'),
  ],
  ids=[
    'digits',
    'cifar10',
    'overfit',
    'imagenet',
    'nf_resnet',
    'nf_regnet',
    'resnet',
    'efficientnet',
  ],
)
def test_net_is_built_from_the_config(config):
  net = build.create_net(config, num_classes=10)
  size = config.data.image_size
  images = jax.ShapeDtypeStruct((2, size, size, 3), 'float32')

  def forward(key: jax.Array, images: jax.Array):
    params, state = net.init(key, images, is_training=True)
    return net.apply(params, state, key, images, is_training=True)[0]

  mapped = jax.vmap(forward, (None, None), axis_name=parallel.AXIS, axis_size=1)
  outputs = jax.eval_shape(mapped, jax.random.key(0), images)
  assert outputs['logits'].shape == (1, 2, 10)
  # Every argument is written out: none is left for an override to miss.
  assert set(config.model) == {'name', *models.arguments(config.model.name)}


def test_another_name_alone_is_refused():
  config = nfnet_imagenet.get_config('F1')
  config.model.name = 'nfnet_f3'
  with pytest.raises(ValueError, match='called nfnet_f3, but .* of nfnet_f1'):
    build.create_net(config, num_classes=10)
  config.model.drop_rate = 0.1  # a net of one's own may have any name
  build.create_net(config, num_classes=10)


def test_every_field_off_is_none_and_can_be_switched():
  config = defaults.get_config()
  config.lock()
  config.update({'augment': {'mixup_alpha': None, 'rand_augment': '2x5'}})
  config.update({'augment': {'mixup_alpha': 0.3, 'rand_augment': None}})
  config.optimizer.clip = None
  with pytest.raises(AttributeError):
    config.optimizer.clipp = 'agc'
  with pytest.raises(TypeError):
    config.augment.mixup_alpha = 'often'
  assert isinstance(config, config_dict.ConfigDict)


@pytest.mark.slow
def test_full_size_f0_takes_two_steps_on_made_up_images(tmp_path):
  subprocess.run(
    [
      sys.executable,
      '-m',
      'nfnets_jax.main',
      '--config=experiments/nfnet_imagenet.py:F0',
      f'--workdir={tmp_path}',
      '--config.data.name=fake',
      '--config.data.train_split=train[:16]',
      '--config.data.test_split=validation[:8]',
      '--config.batch_size=8',
      '--config.eval_batch_size=8',
      '--config.epochs=1.0',
      '--config.optimizer.warmup_epochs=0.0',
    ],
    check=True,
    env={'PATH': '', 'JAX_PLATFORMS': 'cpu'},
  )
  report = json.loads((tmp_path / 'report.json').read_text())
  assert report['steps'] == 2
  assert report['num_params'] == 71_489_284
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  losses = [json.loads(line).get('loss') for line in lines]
  assert any(loss is not None and 0 < loss < 20 for loss in losses)


# Parameters in millions and multiply-accumulates at the test size in 10⁹, as
# computed from the released code.
@pytest.mark.parametrize(
  ('row', 'params', 'macs'),
  [
    ('baseline', 60.81, 7.68),
    ('modified_width', 62.77, 9.65),
    ('second_conv', 71.49, 12.38),
    ('cutmix', 71.49, 12.38),
    ('default_width', 68.64, 10.02),
  ],
)
def test_ablation_has_the_sizes_of_the_released_code(row, params, macs):
  config = ablation_imagenet.get_config(f'F0,{row}')
  net = build.create_net(config, num_classes=1000)
  image = jax.ShapeDtypeStruct((1, 256, 256, 3), 'float32')

  def init(key: jax.Array, image: jax.Array):
    return net.init(key, image, is_training=False)

  key = jax.random.key(0)
  shapes, state = jax.eval_shape(init, key, image)
  count = sum(x.size for x in jax.tree.leaves(shapes))
  assert count / 1e6 == pytest.approx(params, abs=0.006)
  assert models.count_macs(init, key, image) / 1e9 == pytest.approx(
    macs, abs=0.006
  )
  assert not state


def test_ablation_adds_one_thing_a_row():
  fields = {}
  for row in ablation_imagenet.ROWS:
    config = ablation_imagenet.get_config(f'F0,{row}')
    fields[row] = {
      'width': config.model.width[2],
      'two': config.model.use_two_convs,
      'mixup': config.augment.mixup_alpha is not None,
      'policy': config.augment.rand_augment is not None,
      'cutmix': config.augment.cutmix,
      'norm': config.model.norm,
    }
    check.check_config(config, devices=8)
  rows = ablation_imagenet.ROWS
  full = fields['cutmix']
  for before, after in itertools.pairwise(rows[: rows.index('cutmix') + 1]):
    changed = {k for k in full if fields[before][k] != fields[after][k]}
    assert len(changed) == 1, (before, after)
  for row in ('default_width', 'batch_norm'):
    assert sum(fields[row][k] != full[k] for k in full) == 1
  with pytest.raises(ValueError, match="no row 'cutmixx'; .* baseline"):
    ablation_imagenet.get_config('F0,cutmixx')


@pytest.mark.thorough
@pytest.mark.parametrize(
  ('row', 'share'),
  [('mixup', 1.0), ('rand_augment', 1.0), ('cutmix', 0.5), ('batch_norm', 0.5)],
)
def test_ablation_mixes_the_share_of_a_batch_that_it_says(row, share):
  """Of 64 black and 64 white photographs, how many come out grey."""
  augment = ablation_imagenet.get_config(f'F0,{row}').augment
  make = transforms.train_transform(
    4,
    # So that hardly one is nearly black or white.
    mixup_alpha=10.0 if augment.mixup_alpha else None,
    cutmix=augment.cutmix,
  )
  black, white = (
    [{'image': np.full((4, 4, 3), level, np.uint8), 'label': 0}] * 64
    for level in (0, 255)
  )
  uniform = np.random.default_rng(0).random((64, transforms.NUM_DRAWS))
  images = make(black, white, uniform, np.arange(64))['image']
  grey = (images > 0).all((1, 2, 3)) & (images < 255).all((1, 2, 3))
  assert float(grey.mean()) == share


def test_batch_normalised_nfnet_has_no_part_of_the_normaliser_free():
  config = ablation_imagenet.get_config('F0,batch_norm')
  net = build.create_net(config, num_classes=10)
  image = jax.ShapeDtypeStruct((2, 64, 64, 3), 'float32')
  params, state = jax.eval_shape(
    lambda key, image: net.init(key, image, is_training=True),
    jax.random.key(0),
    image,
  )
  names = {name for leaves in params.values() for name in leaves}
  assert names == {'w', 'b', 'scale', 'offset'}
  assert any('bn1b' in module for module in state)


def test_recipes_of_the_rivals_are_the_published():
  for module, argument in ((resnet_imagenet, '50'), (nf_resnet_imagenet, '50')):
    config = module.get_config(argument)
    assert (config.epochs, config.batch_size) == (90, 1024)
    assert config.optimizer.learning_rate_per_256 * 4 == pytest.approx(0.4)
    assert config.optimizer.weight_decay == 1e-4
    assert config.optimizer.clip is None
    assert config.augment.mixup_alpha is None and not config.augment.cutmix
    assert config.data.eval_crop == 'crop_resize'
    assert (config.data.image_size, config.data.eval_image_size) == (224, 224)
    assert config.ema_decay == 0 and config.compute_dtype == 'float32'
  for b, decay in enumerate((5e-5, 6e-5, 7e-5, 8e-5, 9e-5, 1e-4)):
    config = nf_regnet_imagenet.get_config(f'B{b}')
    assert config.optimizer.weight_decay == pytest.approx(decay)
    assert config.optimizer.end_learning_rate == 0.001
    assert config.data.eval_crop == 'crop_resize'
    assert (config.epochs, config.batch_size) == (360, 1024)
    assert config.augment.mixup_alpha == 0.2 and config.augment.cutmix
    assert config.augment.rand_augment is None
    assert config.model.stochdepth_rate == 0.1
  for b, decay in ((6, 1.1e-4), (7, 1.2e-4), (8, 1.3e-4)):  # the rule goes on
    config = nf_regnet_imagenet.get_config(f'B{b}')
    assert config.optimizer.weight_decay == pytest.approx(decay)
    assert config.data.eval_image_size == (528, 600, 672)[b - 6]
  for name in ('skipinit_resnet50', 'fixup_resnet50'):
    config = resnet_imagenet.get_config(name)
    assert config.model.name == name
    build.create_net(config, num_classes=10)
  config = efficientnet_imagenet.get_config('B7')
  assert config.data.image_size == config.data.eval_image_size == 600
  # A tenth of the area at least, as the original code has in effect.
  assert config.data.crop == defaults.get_config().data.crop == 'random_resized'
  assert config.optimizer.name == 'rmsprop'
  assert config.optimizer.schedule == 'exponential'
  # Micro-batches are normalized together on all devices.
  assert config.model.cross_replica_axis == parallel.AXIS
  policies = [
    efficientnet_imagenet.get_config(f'B{n}').augment.rand_augment
    for n in range(9)
  ]
  assert policies == ['2x10'] * 5 + ['2x17'] * 2 + ['2x28'] * 2


def test_efficientnet_decays_all_but_batch_normalization():
  config = efficientnet_imagenet.get_config('B0')
  config.model.cross_replica_axis = None
  config.model.depth = (1,) * 7
  net = build.create_net(config, num_classes=10)
  image = jax.ShapeDtypeStruct((2, 32, 32, 3), 'float32')
  params, _ = jax.eval_shape(
    lambda key, image: net.init(key, image, is_training=True),
    jax.random.key(0),
    image,
  )
  mask = optimizer.decay_mask(params, config.optimizer.decayed)
  names = {True: set(), False: set()}
  for leaves in mask.values():
    for name, decays in leaves.items():
      names[decays].add(name)
  assert names == {True: {'w', 'b'}, False: {'scale', 'offset'}}


@pytest.mark.parametrize(
  ('name', 'regularised', 'size'),
  [
    ('nfnet_f4plus', True, 384),
    ('nf_regnet_b0', True, 192),
    ('nf_resnet50', False, 224),
    ('resnet200', False, 224),
    ('efficientnet_b0', False, 224),
  ],
)
def test_finetune_is_the_papers_recipe(name, regularised, size):
  config = finetune.get_config(f'{name},imagenet2012')
  config.lock()
  config = defaults.derive(config, 1_281_167, devices=8)
  check.check_config(config, devices=8)
  epoch_steps = 1_281_167 / config.batch_size
  assert config.batch_size == 2048
  assert schedules.count_steps(config.epochs, epoch_steps) == 15_000
  warmup = config.optimizer.warmup_epochs * epoch_steps
  assert warmup == pytest.approx(5_000)
  peak = config.optimizer.learning_rate_per_256 * config.batch_size / 256
  assert peak == pytest.approx(0.1)
  assert config.ema_decay == 0.9999
  assert config.augment.mixup_alpha is None and not config.augment.cutmix
  assert config.data.image_size == size
  assert (
    config.optimizer.weight_decay,
    config.optimizer.sam_rho,
    config.optimizer.clip,
    config.model.drop_rate,
    config.model.stochdepth_rate,
  ) == (
    (1e-5, 0.05, 'agc', 0.25, 0.1) if regularised else (0, None, None, 0, 0)
  )


@pytest.mark.parametrize(
  ('name', 'epochs', 'batch', 'peak', 'decay', 'steps'),
  [
    ('nfnet_f4', 40, 4096, 1.6, 1e-6, 2_929_687),
    ('nfnet_f4plus', 20, 4096, 1.6, 1e-6, 1_464_843),
    ('nf_resnet50', 10, 1024, 0.4, 1e-5, 2_929_687),
    ('resnet200', 10, 1024, 0.4, 1e-5, 2_929_687),
  ],
)
def test_pretrain_is_the_papers_recipe(name, epochs, batch, peak, decay, steps):
  config = pretrain.get_config(f'{name},jft')
  config.lock()
  config = defaults.derive(config, 300_000_000, devices=128)
  check.check_config(config, devices=128)
  assert (config.epochs, config.batch_size) == (epochs, batch)
  epoch_steps = 300_000_000 / batch
  assert schedules.count_steps(config.epochs, epoch_steps) == steps
  warmup = config.optimizer.warmup_epochs * epoch_steps
  assert warmup == pytest.approx(5_000)
  rate = config.optimizer.learning_rate_per_256 * batch / 256
  assert rate == pytest.approx(peak)
  assert config.optimizer.weight_decay == decay
  assert config.optimizer.sam_rho is None
  assert config.optimizer.clip == ('agc' if 'nfnet' in name else None)
  assert (config.data.name, config.data.image_size) == ('jft', 224)
  assert (config.data.crop, config.data.flip) == ('random_resized', True)
  assert set(config.augment.to_dict().values()) == {None, False}
  assert config.ema_decay == 0
  # The same recipe on fewer images.
  config = pretrain.get_config(f'{name},folder')
  config = defaults.derive(config, 100_000, devices=8)
  assert config.optimizer.warmup_epochs == pytest.approx(epochs / 3)
  assert config.data.test_split is None


_TINY = {
  'model.width': (64,),
  'model.depth': (1,),
  'model.strides': (1,),
  'model.group_width': (16,),
  'model.stem_width': (32,),
  'model.stem_strides': (2,),
  'data.image_size': 8,
  'data.eval_image_size': 8,
  'data.num_workers': 1,
  'compute_dtype': 'float32',
  'compilation_cache': None,
}


@pytest.mark.thorough
def test_pretraining_hands_over_to_finetuning(tmp_path):
  """By a folder of three classes and the digits, each in a few steps."""
  rng = np.random.default_rng(0)
  for name, split in itertools.product('abc', ('train', 'test')):
    folder = tmp_path / 'photos' / split / name
    folder.mkdir(parents=True)
    for i in range(8):
      pixels = rng.integers(256, size=(8, 8, 3), dtype=np.uint8)
      Image.fromarray(pixels).save(folder / f'{i}.png')
  config = pretrain.get_config('nfnet_tiny,folder')
  config.lock()
  changes = {
    'data.data_dir': str(tmp_path / 'photos'),
    'epochs': 3.0,
    'batch_size': 8,
    'eval_batch_size': 8,
  }
  config.update_from_flattened_dict(_TINY | changes)
  report = train.train_and_evaluate(config, tmp_path / 'pretrained')
  assert (report['steps'], report['num_classes']) == (9, 3)
  recorded = json.loads((tmp_path / 'pretrained/config.json').read_text())
  assert recorded['optimizer']['warmup_epochs'] == 1

  config = finetune.get_config('nfnet_tiny,digits,head')
  config.lock()
  changes = {
    'init_from': str(tmp_path / 'pretrained'),
    'data.data_dir': str(tmp_path / 'data'),
    'data.crop': 'pad_1',
    'data.train_split': 'train[:64]',
    'data.test_split': 'test[:32]',
    'epochs': 1.0,
    'batch_size': 32,
    'eval_batch_size': 32,
  }
  config.update_from_flattened_dict(_TINY | changes)
  report = train.train_and_evaluate(config, tmp_path / 'tuned')
  assert (report['steps'], report['num_classes']) == (2, 10)
  before, after = (
    init_from.load_average(tmp_path / run).params
    for run in ('pretrained', 'tuned')
  )
  assert before.keys() == after.keys()
  for module, leaves in before.items():
    for leaf, x in leaves.items():
      if module == 'NFNet/~/linear':
        assert (x.shape[-1], after[module][leaf].shape[-1]) == (3, 10)
      else:  # frozen, but averaged
        np.testing.assert_allclose(x, after[module][leaf], rtol=1e-6)


def test_finetune_trains_the_head_alone():
  assert finetune.get_config().optimizer.learning_rate_groups is None
  head = finetune.get_config('nfnet_f4plus,folder,head')
  assert head.init_new_head is None
  (classifier, rate), (_, frozen) = groups.parse(
    head.optimizer.learning_rate_groups
  )
  assert (rate, frozen) == (1.0, 0.0)
  assert classifier.search('NFNet/~/linear/w')
  gate = 'NFNet/~/nf_block/~/squeeze_excite/~/linear/w'
  assert not classifier.search(gate)


@pytest.mark.parametrize('argument', ['nfnet_f0', 'nfnet_f0,', 'a,digits,b'])
def test_finetune_argument_is_checked(argument):
  with pytest.raises(ValueError, match="is no 'MODEL,DATA'"):
    finetune.get_config(argument)


@pytest.mark.slow
def test_finetuning_beats_training_from_scratch(tmp_path, monkeypatch):
  """Pre-trained on the digits 0 to 4, the same 22 steps on 5 to 9."""
  config = digits.get_config()
  config.lock()
  config.epochs, config.data.classes = 20.0, '0-4'
  config.data.data_dir = str(tmp_path / 'data')
  config.compilation_cache = None
  train.train_and_evaluate(config, tmp_path / 'pretrained')
  top_1 = {}
  for source in (str(tmp_path / 'pretrained'), None):
    config = finetune.get_config('nfnet_tiny,digits')
    config.lock()
    changes = {
      'init_from': source,
      'epochs': 2.0,
      'batch_size': 64,
      'eval_batch_size': 128,
      'data.classes': '5-9',
      'data.data_dir': str(tmp_path / 'data'),
      'optimizer.learning_rate_per_256': 0.3,
      'optimizer.warmup_epochs': 0.4,
      'optimizer.clipping': 0.1,
      'optimizer.clip_eps': 0.1,
      'compute_dtype': 'float32',
      'compilation_cache': None,
      'eval_every_epochs': 2.0,
    }
    config.update_from_flattened_dict(changes)
    report = train.train_and_evaluate(config, tmp_path / f'run-{bool(source)}')
    top_1[source is not None] = report['eval_top_1']
  assert top_1[True] > top_1[False] + 0.1
