"""Fields that follow from the number of training images."""

import json

import pytest

from nfnets_jax.runtime import workdir as workdirs
from nfnets_jax.training import check, train
from nfnets_jax.training import config as configs


@pytest.fixture
def underived():
  config = configs.get_config()
  config.lock()
  config.update_from_flattened_dict(dict.fromkeys(configs.DERIVED))
  return config


def _fields(config):
  return (
    config.batch_size,
    config.epochs,
    config.optimizer.warmup_epochs,
    config.optimizer.learning_rate_per_256,
  )


@pytest.mark.parametrize(
  ('num_images', 'devices', 'batch_size', 'steps', 'peak'),
  [
    (1_281_167, 8, 2048, 15_000, 0.1),  # the paper's
    (1_281_167, 1, 2048, 15_000, 0.1),
    (50_000, 8, 2048, 100 * 50_000 / 2048, 0.1),
    (1437, 1, 128, 100 * 1437 / 128, 0.05),
    (43, 1, 4, 100 * 43 / 4, 0.1 * 4 / 256),
    (43, 6, 6, 100 * 43 / 6, 0.1 * 6 / 256),
    (1, 1, 1, 100, 0.1 / 256),
  ],
)
def test_derived_from_the_number_of_images(
  underived, num_images, devices, batch_size, steps, peak
):
  config = configs.derive(underived, num_images, devices)
  check.check_config(config.update(eval_batch_size=24) or config, devices)
  assert config.batch_size == batch_size
  assert config.epochs * num_images / batch_size == pytest.approx(steps)
  assert config.optimizer.warmup_epochs == pytest.approx(config.epochs / 3)
  found = config.optimizer.learning_rate_per_256 * batch_size / 256
  assert found == pytest.approx(peak)
  assert underived.batch_size is None  # a copy


def test_given_fields_stay_and_the_others_follow_them(underived):
  underived.batch_size, underived.epochs = 512, 6.0
  config = configs.derive(underived, num_images=10_000, devices=1)
  assert _fields(config) == (512, 6.0, 2.0, 0.05)
  given = configs.get_config()
  assert configs.derive(given, 48, 8).to_dict() == given.to_dict()


def _kept(config, workdir):
  return configs.keep_derived(config, workdirs.read_config(workdir))


def test_a_run_keeps_what_it_derived(underived, tmp_path):
  assert _kept(underived, tmp_path).batch_size is None
  begun = configs.derive(underived, 43, 1)
  (tmp_path / 'config.json').write_text(json.dumps(begun.to_dict()))
  again = _kept(underived, tmp_path)
  assert again.to_dict() == begun.to_dict()
  underived.batch_size = 8  # an override is a change of the config
  assert _kept(underived, tmp_path).batch_size == 8


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'optimizer.name': 'sgdm'}, "optimizer.name is 'sgdm'; .* mean sgd"),
    ({'init_from': 'missing.npz'}, 'config.init_from: there is no .* missing'),
    ({'data.crop': 'pda_2'}, "'pda_2'"),
    ({'batch_size': 12}, 'batch_size 12 is not divisible by 8 devices'),
  ],
)
def test_mistakes_are_refused_before_data_are_opened(
  make_config, tmp_path, changes, message
):
  changes = {'data.data_dir': str(tmp_path / 'gone'), **changes}
  config = make_config(1, {'data.prepare': False, **changes})
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    train.train_and_evaluate(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_batch_larger_than_the_data_is_refused(make_config, tmp_path):
  config = make_config(1, {'data.train_split': 'train[:40]', 'batch_size': 64})
  with pytest.raises(ValueError, match='batch_size 64 is larger than the 40'):
    train.train_and_evaluate(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_only_a_folder_has_a_test_split_of_its_own(make_config, tmp_path):
  config = make_config(1, {'data.test_split': None})
  with pytest.raises(ValueError, match='test_split is None; name a split of d'):
    train.train_and_evaluate(config, tmp_path / 'run')
