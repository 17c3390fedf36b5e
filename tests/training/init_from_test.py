"""Runs that start from weights: fine-tuning, and evaluation alone."""

import json
import re

import jax
import numpy as np
import pytest

from nfnets_jax import weights
from nfnets_jax.data import imagenet
from nfnets_jax.runtime import workdir
from nfnets_jax.training import build, evaluate, init_from, train, train_step

# Its runs take minutes together.
pytestmark = pytest.mark.thorough

HALF = {'data.train_split': 'train', 'batch_size': 32, 'eval_batch_size': 64}


@pytest.fixture(scope='module')
def trained(make_config, tmp_path_factory):
  """A run on the digits 0 to 4."""
  folder = tmp_path_factory.mktemp('first') / 'run'
  config = make_config(20, {**HALF, 'data.classes': '0-4', 'epochs': 1.0})
  return config, folder, train.train_and_evaluate(config, folder)


def test_average_of_a_run(trained, tmp_path):
  config, folder, report = trained
  found = init_from.load_average(folder)
  assert found.name == 'nfnet_tiny'
  assert found.num_classes == 5
  assert found.overrides['width'] == (64,)
  assert 'alpha' not in found.overrides
  # It is what was evaluated.
  file = tmp_path / 'average.safetensors'
  weights.write(file, found)
  config = config.copy_and_resolve_references()
  for source in (folder, file):
    config.init_from = str(source)
    results = evaluate.evaluate_checkpoint(config, tmp_path / 'none')
    for metric in ('top_1', 'loss'):
      assert results[f'eval_{metric}'] == pytest.approx(
        report[f'ema_eval_{metric}'], abs=1e-6
      )
  assert not (tmp_path / 'none').exists()


def test_other_classes_get_a_new_head(trained, make_config, tmp_path, said):
  _, folder, _ = trained
  changes = {**HALF, 'data.classes': '5-8', 'init_from': str(folder)}
  changes |= {'optimizer.learning_rate_groups': r'^\w+/~/linear/=1,.=0'}
  changes |= {'epochs': 0.25, 'checkpoint_every_epochs': 0.25}
  changes |= {'batch_size': None, 'optimizer.learning_rate_per_256': None}
  config = make_config(1, changes)
  # As a run leaves it that is killed before its first checkpoint is whole.
  (tmp_path / 'checkpoints' / '1.orbax-checkpoint-tmp').mkdir(parents=True)
  report = train.train_and_evaluate(config, tmp_path)
  reason = 'new classifier of 4 classes (it had 5 classes, and the data have 4)'
  assert any(line.endswith(reason) for line in said)
  assert report['batch_size'] == 64  # derived, and recorded for a resumption
  assert report['eval_count'] < 180
  before, after = (
    init_from.load_average(folder),
    init_from.load_average(tmp_path),
  )
  assert after.num_classes == 4
  for module, leaves in before.params.items():
    for leaf, x in leaves.items():
      if module != 'NFNet/~/linear':  # frozen
        # The average itself rounds.
        np.testing.assert_allclose(
          after.params[module][leaf], x, rtol=1e-5, atol=1e-7
        )
  # It is resumed without the weights.
  saved = workdir.read_report(tmp_path)
  (tmp_path / 'report.json').unlink()
  config_file = tmp_path / 'config.json'
  recorded = json.loads(config_file.read_text())
  assert recorded['optimizer']['learning_rate_per_256'] == 0.1
  config_file.write_text(json.dumps({**recorded, 'init_from': 'gone'}))
  config.init_from = 'gone'
  again = train.train_and_evaluate(config, tmp_path)
  assert again['eval_loss'] == saved['eval_loss']


def test_same_classes_keep_the_head(trained, make_config, said):
  config, folder, _ = trained
  found = init_from.load_average(folder)

  optimizer = build.create_optimizer(config, lambda step: 0.0)
  net = build.create_net(config, 5)
  state = train_step.init_state(net, optimizer, 1, 8)
  same = init_from.merge(state, found, 5)
  jax.tree.map(np.testing.assert_array_equal, same.params, found.params)
  jax.tree.map(np.testing.assert_array_equal, same.ema_params, found.params)
  head = 'NFNet/~/linear'
  assert said[-1].endswith('parameters; kept classifier of 5 classes')
  new = init_from.merge(state, found, 5, True, 'so')
  np.testing.assert_array_equal(new.params[head]['w'], state.params[head]['w'])
  assert said[-1].endswith('; new classifier of 5 classes (so)')
  wrong = {**found.params, 'other': {'w': np.zeros(3, np.float32)}}
  wrong.pop('NFNet/~/final_conv')
  with pytest.raises(ValueError, match=r'(?s)missing: .*surplus: other w'):
    init_from.merge(state, weights.Weights('nfnet_tiny', wrong), 5)


def _weights(num_classes, names=None):
  linear = {'b': np.zeros(num_classes)}
  params = {'NFNet/~/linear': linear}
  return weights.Weights('nfnet_tiny', params, class_names=names)


IDS, NAMES = imagenet.classes()
NEW, KEPT = True, False


@pytest.mark.parametrize(
  ('theirs', 'ours', 'choice', 'new', 'reason'),
  [
    (('a', 'b'), ['a', 'b'], None, KEPT, 'the 2 classes are the same; .*=True'),
    (('0', '1'), ['5', '6'], None, NEW, "the classes differ: .*0: '0' -> '5'"),
    (
      ('a', 'b'),
      ['b', 'a'],
      None,
      NEW,
      'differ: .*; init_new_head=False keeps',
    ),
    (('a', 'b'), ['b', 'a'], False, KEPT, 'init_new_head is False'),
    (('a', 'b'), ['a', 'b'], True, NEW, 'init_new_head is True'),
    (('a', 'b'), ['a', 'b', 'c'], None, NEW, 'had 2 classes, .* data have 3'),
    (2, ['a', 'b'], None, NEW, 'record no class names; init_new_head=False'),
    (2, ['a', 'b'], False, KEPT, 'init_new_head is False'),
    # Released weights have those of ImageNet, by either name.
    (1000, IDS, None, KEPT, 'the 1000 classes are the same'),
    (1000, NAMES, None, KEPT, 'the 1000 classes are the same'),
    (NAMES, IDS, None, KEPT, 'the 1000 classes are the same'),
    (1000, IDS[::-1], None, NEW, "differ: classes 0: 'n01440764' -> 'n15075"),
  ],
)
def test_the_head_is_new_unless_the_classes_agree(
  theirs, ours, choice, new, reason
):
  named = not isinstance(theirs, int)
  loaded = _weights(len(theirs), theirs) if named else _weights(theirs)
  found = init_from.choose_head(loaded, ours, choice)
  assert found[0] == new
  assert re.search(reason, found[1])


def test_a_head_of_other_size_cannot_be_kept():
  message = 'init_new_head=False keeps .* 2 classes; the data have 3'
  with pytest.raises(ValueError, match=message):
    init_from.choose_head(_weights(2), ['a', 'b', 'c'], False)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model.width': (32,)}, r'(?s)another nfnet_tiny:.*width is \(32,\)'),
    ({'model.alpha': 0.3}, r'model.alpha is 0.3, and theirs 0.2'),
    ({'model.name': 'nfnet_f0'}, 'weights of nfnet_tiny, and the config is'),
    ({'data.classes': None}, 'for 5 classes, and digits has 10; train first'),
    ({'init_from': 'gone.npz'}, 'init_from: there is no .* gone.npz'),
    ({'init_from': 'dm_nfnet_f0'}, "init_from: .*timm's name of nfnet_f0"),
    ({'init_from': ''}, 'init_from is empty'),
  ],
)
def test_other_weights_are_refused(
  trained, make_config, tmp_path, changes, message
):
  _, folder, _ = trained
  basis = {**HALF, 'data.classes': '0-4', 'init_from': str(folder)}
  config = make_config(1, {**basis, **changes})
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    evaluate.evaluate_checkpoint(config, tmp_path)


def test_regularisation_may_differ(trained, make_config, tmp_path):
  _, folder, _ = trained
  changes = {'model.drop_rate': 0.5, 'init_from': str(folder)}
  config = make_config(1, {**HALF, **changes, 'data.classes': '0-4'})
  assert evaluate.evaluate_checkpoint(config, tmp_path)['eval_count'] > 100


def test_facts_of_a_run(trained, tmp_path):
  config, folder, _ = trained
  found = init_from.load_average(folder)
  assert found.image_size == config.data.eval_image_size
  assert found.crop == config.data.eval_crop
  for name in ('config.json', 'checkpoints'):
    (tmp_path / name).symlink_to(folder / name)
  record = tmp_path / 'data.json'
  record.unlink(missing_ok=True)
  assert init_from.load_average(tmp_path).class_names is None  # an old run
  names = ['zero', 'one', 'zwölf', '3', '4']
  splits = {part: {'split': part, 'count': 7} for part in ('train', 'test')}
  record.write_text(json.dumps({'splits': splits, 'class_names': names}))
  assert init_from.load_average(tmp_path).class_names == tuple(names)
  record.write_text(json.dumps({'splits': splits, 'class_names': names[:2]}))
  with pytest.raises(ValueError, match='names 2 classes, and .* has 5'):
    init_from.load_average(tmp_path)


@pytest.mark.parametrize(
  'names', [None, 7, 'ab', ['cat', 7], {'cat': 0}], ids=repr
)
def test_damaged_record(tmp_path, make_config, names):

  splits = {part: {'split': part, 'count': 7} for part in ('train', 'test')}
  record = {'splits': splits, 'class_names': names}
  (tmp_path / 'data.json').write_text(json.dumps(record))
  with pytest.raises(ValueError, match='data.json is corrupt'):
    init_from.recorded_facts(tmp_path, make_config(1, {}), 2)
