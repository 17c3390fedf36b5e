import functools
import re
import shutil

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from nfnets_jax import models, weights
from nfnets_jax.data import datasets, decode, loader, transforms
from nfnets_jax.runtime import parallel, progress
from nfnets_jax.training import (
  build,
  eval_step,
  evaluate,
  normalize,
  train_step,
)

EXAMPLE = (np.zeros((1, 8, 8, 3), np.float32), False)


@pytest.fixture(scope='module')
def net():
  """A linear classifier of 8 × 8 pixels."""
  return hk.transform_with_state(
    lambda images, is_training, standardized=False: {
      'logits': hk.Linear(10, name='classifier')(hk.Flatten()(images))
    }
  )


@pytest.fixture(scope='module')
def state(net):
  state = train_step.init_state(net, optax.sgd(0.1), seed=0, image_size=8)
  average = jax.tree.map(lambda x: x + 0.1 * jnp.cos(x * 1e5), state.params)
  return parallel.replicate(state._replace(ema_params=average))


@pytest.fixture(scope='module')
def test_set(digits_dir):
  return datasets.load('digits', 'test', digits_dir)


def _oracle(params, test_set, prefix):
  """Evaluates one image at a time in float64."""
  weights = np.asarray(params['classifier']['w'], np.float64)
  bias = np.asarray(params['classifier']['b'], np.float64)
  loss = top_1 = top_5 = 0
  for example in (test_set.source[i] for i in range(len(test_set))):
    pixels = np.asarray(decode.decode(example['image']), np.float64)
    pixels = (pixels - normalize.IMAGENET_MEAN) / normalize.IMAGENET_STD
    logits = pixels.reshape(-1) @ weights + bias
    order = np.argsort(-logits)
    loss += np.log(np.sum(np.exp(logits))) - logits[example['label']]
    top_1 += example['label'] == order[0]
    top_5 += example['label'] in order[:5]
  return {
    f'{prefix}_loss': loss / 360,
    f'{prefix}_top_1': top_1 / 360,
    f'{prefix}_top_5': top_5 / 360,
  }


@pytest.fixture(scope='module')
def run(net, test_set):
  """Evaluates a state in batches of a size, in parts on each device."""

  def run(state, batch_size, parts=1):
    step = parallel.parallel_eval_step(
      functools.partial(
        eval_step.eval_step,
        net=net,
        axis_name=parallel.AXIS,
        micro_batches=parts,
      )
    )
    batches = loader.eval_batches(
      test_set,
      batch_size=batch_size,
      transform=transforms.eval_transform(8, 'resize'),
    )
    return evaluate.evaluate(step, state, batches)

  return run


@pytest.mark.parametrize(
  ('batch_size', 'parts'), [(56, 1), (120, 1), (120, 5), (400, 1)]
)
def test_counts_each_image_once(run, state, test_set, batch_size, parts):
  results = run(state, batch_size, parts)
  current = _oracle(state.params, test_set, 'eval')
  average = _oracle(state.ema_params, test_set, 'ema_eval')
  assert current['eval_top_1'] != average['ema_eval_top_1']
  assert results.pop('eval_count') == 360
  assert results == pytest.approx(current | average, rel=1e-5)


def test_loss_that_is_not_finite_is_named(run, state):
  broken = jax.tree.map(lambda x: x * jnp.nan, state.ema_params)
  with pytest.raises(FloatingPointError, match='^ema_eval_loss is nan'):
    run(state._replace(ema_params=broken), 120)


def test_nothing_to_evaluate(state):
  with pytest.raises(ValueError, match='nothing to evaluate'):
    evaluate.evaluate(lambda state, batch: {}, state, [])


@pytest.mark.parametrize('parts', [1, 3])
def test_images_of_some_classes_and_label_sets(net, state, parts):
  """Each image in order, among the outputs of the label map alone."""
  rng = np.random.default_rng(0)
  label_map = [7, 2, 5, 0, 1, 9]
  batch = {
    'image': rng.integers(256, size=(48, 8, 8, 3), dtype=np.uint8),
    'label': rng.integers(6, size=48, dtype=np.int32),
    'label_set': rng.integers(-1, 6, size=(48, 2), dtype=np.int32),
    'mask': (rng.uniform(size=48) < 0.7).astype(np.float32),
  }
  step = functools.partial(
    eval_step.eval_step,
    net=net,
    axis_name=parallel.AXIS,
    micro_batches=parts,
    label_map=label_map,
    average=False,
    per_image=True,
  )
  outputs = parallel.parallel_eval_step(step)(state, parallel.shard(batch))
  found = outputs['images'].pop('eval')
  assert not outputs.pop('images') and set(outputs) == {'eval'}

  kernel = np.asarray(state.params['classifier']['w'], np.float64)
  pixels = batch['image'].astype(np.float64) - normalize.IMAGENET_MEAN
  pixels = (pixels / normalize.IMAGENET_STD).reshape(48, -1)
  logits = (pixels @ kernel)[:, label_map]  # the bias is zero
  order = np.argsort(-logits, axis=1)[:, :5]
  probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  hit = (order[:, :1] == batch['label_set']).any(axis=1)
  hit_5 = (order[:, :, None] == batch['label_set'][:, None]).any(axis=(1, 2))
  counted = batch['mask'] > 0
  np.testing.assert_array_equal(found['predicted'], order)
  np.testing.assert_allclose(
    found['confidence'], probability.max(axis=1), rtol=1e-4
  )
  np.testing.assert_array_equal(found['hit'], hit)
  np.testing.assert_array_equal(found['label'], batch['label'])
  np.testing.assert_array_equal(found['mask'], counted)
  loss = -np.log(probability[np.arange(48), batch['label']])
  expected = {
    'count': counted.sum(),
    'top_1': hit[counted].sum(),
    'top_5': hit_5[counted].sum(),
    'loss': loss[counted].sum(),
  }
  assert 0 < expected['top_1'] < expected['top_5'] < expected['count']
  assert jax.tree.map(float, outputs['eval']) == pytest.approx(
    expected, rel=1e-4
  )


def _write_weights(config, names):
  """Writes random weights to `config.init_from`; returns net and parameters."""
  net = build.create_net(config, len(names))
  params, _ = jax.device_get(net.init(jax.random.key(3), *EXAMPLE))
  arguments = models.arguments('nfnet_tiny')
  overrides = {k: v for k, v in config.model.items() if k != 'name'}
  overrides = {k: v for k, v in overrides.items() if v != arguments[k]}
  loaded = weights.Weights(
    'nfnet_tiny', params, {}, overrides, class_names=names
  )
  weights.write(config.init_from, loaded)
  return net, params


@pytest.mark.thorough
def test_weights_on_a_folder_without_a_test_split(
  make_config, tmp_path, monkeypatch
):
  said = []
  monkeypatch.setattr(progress, 'say', said.append)
  photos = tmp_path / 'photos'
  changes = {'data.name': 'folder', 'data.data_dir': str(photos)}
  changes |= {'data.test_split': None, 'data.prepare': False}
  config = make_config(1, changes)
  config.init_from = str(tmp_path / 'tiny.safetensors')
  _write_weights(config, ('cat', 'dog'))

  def evaluated(*files):
    for file in files:
      (photos / file).parent.mkdir(parents=True, exist_ok=True)
      Image.new('RGB', (8, 8)).save(photos / file)
    said.clear()
    about = evaluate.evaluate_in_detail(config, tmp_path / 'none').about
    return about['split'], about['images']

  # One image of each class: none could be held out.
  assert evaluated('cat/0.png', 'dog/0.png') == ('all', 2)
  assert said[0].startswith(f'{photos} has no test split: all its images are')
  config.data.test_split = 'test'
  assert evaluated('cat/1.png', 'cat/2.png') == ('test', 1)
  assert 'held out by a hash' in said[0]
  config.data.test_split = None
  shutil.move(photos, tmp_path / 'train')
  shutil.move(tmp_path / 'train', photos / 'train')
  assert evaluated('val/dog/0.png') == ('val', 1)
  assert not said


@pytest.mark.thorough
def test_weights_without_a_run(make_config, tmp_path, monkeypatch):
  """On some of their classes, with batches that the devices do not divide."""
  said = []
  monkeypatch.setattr(progress, 'say', said.append)
  monkeypatch.setattr(evaluate, '_PROGRESS_SECONDS', 0.0)
  config = make_config(1, {'data.classes': '2-7', 'eval_batch_size': 30})
  config.batch_size = 3  # of training
  config.init_from = str(tmp_path / 'tiny.safetensors')
  names = tuple(str(k) for k in reversed(range(10)))
  net, params = _write_weights(config, names)
  evaluation = evaluate.evaluate_in_detail(config, tmp_path / 'none')
  assert not (tmp_path / 'none').exists()
  assert any('digits has 6 of the 10 classes' in line for line in said)
  progressed = [line for line in said if 'images/s' in line]
  count = evaluation.about['images']
  assert re.fullmatch(f'{count} of {count} images, .* images/s', progressed[-1])

  test_set = build.load_split(config, 'test')
  assert len(test_set) == count == evaluation.results['eval_count']
  transform = transforms.eval_transform(8, 'resize')
  examples = [transform(test_set.source[i]) for i in range(count)]
  pixels = normalize.normalize(np.stack([x['image'] for x in examples]))
  logits = jax.jit(functools.partial(net.apply, is_training=False))(
    params, {}, None, pixels
  )[0]['logits']
  # Class '2' is output 7 of the net, and so on.
  logits = np.asarray(logits)[:, 7:1:-1]
  labels = np.array([x['label'] for x in examples])
  images = evaluation.images['eval']
  np.testing.assert_array_equal(images['label'], labels)
  np.testing.assert_array_equal(images['predicted'][:, 0], logits.argmax(1))
  top_1 = np.mean(logits.argmax(axis=1) == labels)
  assert evaluation.results['eval_top_1'] == pytest.approx(top_1)
  assert evaluation.results['ema_eval_top_1'] == pytest.approx(top_1)
  assert evaluation.results['num_classes'] == 6
