import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfnets_jax.data import datasets, decode, loader, transforms
from nfnets_jax.runtime import parallel
from nfnets_jax.training import eval_step, evaluate, normalize, train_step


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
def test_set(data_dir):
  return datasets.load('digits', 'test', data_dir)


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
