import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.examples import flax_agc
from nfnets_jax import agc


class Net(nnx.Module):
  """A hidden layer and a classifier."""

  def __init__(self):
    self.hidden = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    self.head = nnx.Linear(4, 2, rngs=nnx.Rngs(1))

  def __call__(self, x):
    return self.head(nnx.relu(self.hidden(x)))


PATHS = {'hidden/kernel', 'hidden/bias', 'head/kernel', 'head/bias'}


def _grads(net):
  return nnx.grad(lambda net: jnp.mean(net(jnp.ones((4, 3))) ** 2))(net)


@pytest.mark.thorough
def test_nnx_paths_are_the_same_in_init_and_update():
  net = Net()
  seen = {'init': set(), 'update': set()}
  stage = 'init'

  def is_last(path, leaf):
    seen[stage].add(path)
    return path == 'head/kernel'

  def group(path, leaf):
    return path

  clip = agc.adaptive_grad_clip(
    0.01,
    exclude=is_last,
    group=group,
    statistics=True,
  )
  optimizer = nnx.Optimizer(net, clip, wrt=nnx.Param)
  before = set(optimizer.opt_state.statistics)
  stage = 'update'
  for _ in range(2):
    optimizer.update(net, _grads(net))
  assert seen == {'init': PATHS, 'update': PATHS}
  assert set(optimizer.opt_state.statistics) == before
  assert before == PATHS - {'head/kernel'}
  largest = optimizer.opt_state.statistics['hidden/kernel'].largest
  assert float(largest[...]) > 0
  # The table has them, too, whether a Param is a node or a leaf.
  state = nnx.state(net, nnx.Param)
  for params in (state, nnx.to_pure_dict(state)):
    rows = agc.summarize(_grads(net), params, exclude=agc.is_head).rows
    assert {row.path for row in rows} == PATHS - {'head/kernel'}


@pytest.mark.thorough
def test_nnx_units_go_by_the_same_paths():
  net = Net()
  graph, params = nnx.split(net, nnx.Param)
  grads = jax.tree.map(jnp.ones_like, params)
  units = {'hidden': {'kernel': 'OI', 'bias': 'O'}}
  units['head'] = {'kernel': 'IO', 'bias': 'I'}
  clip = agc.adaptive_grad_clip(0.01, units=units)
  found, _ = clip.update(grads, clip.init(params), params)
  norms = np.linalg.norm(params['hidden']['kernel'][...], axis=1, keepdims=True)
  np.testing.assert_allclose(
    found['hidden']['kernel'][...],
    np.broadcast_to(0.01 * norms / 2, (3, 4)),
    rtol=1e-5,
  )
  nnx.merge(graph, found)


def test_other_keys_called_value_stay():
  params = {'query': jnp.ones((2, 2)), 'value': jnp.ones((2, 2))}
  clip = agc.adaptive_grad_clip(
    0.01, group=lambda path, leaf: path, statistics=True
  )
  assert set(clip.init({'attn': params}).statistics) == {
    'attn/query',
    'attn/value',
  }


@pytest.mark.parametrize('key', ['value', 'raw_value'])
def test_the_node_of_a_parameter_is_no_part_of_its_path(key):
  """As in other versions of Flax."""

  class Param:
    def __init__(self, x):
      self.x = x

  jax.tree_util.register_pytree_with_keys(
    Param,
    lambda p: (((jax.tree_util.GetAttrKey(key), p.x),), None),
    lambda _, children: Param(*children),
  )
  params = {'head': {'kernel': Param(jnp.ones((2, 2)))}, 'b': jnp.ones(2)}
  clip = agc.adaptive_grad_clip(
    0.01, exclude=agc.is_head, group=lambda path, x: path, statistics=True
  )
  assert set(clip.init(params).statistics) == {'b'}
  found, _ = clip.update(params, clip.init(params), params)
  np.testing.assert_array_equal(found['head']['kernel'].x, np.ones((2, 2)))
  whole = optax.chain(clip, optax.sgd(0.1))
  whole.update(params, whole.init(params), params)


@pytest.mark.slow
@pytest.mark.thorough
def test_clipping_bears_a_rate_that_diverges_without():
  plain, accuracy = flax_agc.train(0.128, None, seed=0, steps=60)
  assert flax_agc.diverged(plain)
  clipped, clipped_accuracy = flax_agc.train(0.128, 0.01, seed=0, steps=60)
  assert not flax_agc.diverged(clipped)
  assert clipped[-1] < clipped[0]
  assert clipped_accuracy > accuracy


@pytest.mark.slow
def test_the_command_draws_both_curves(tmp_path: pathlib.Path, capsys):
  output = tmp_path / 'new' / 'curves.png'
  flax_agc.main(['--seeds=1', '--first_rate=0.128', f'--output={output}'])
  assert output.read_bytes().startswith(b'\x89PNG')
  out = capsys.readouterr().out
  assert 'no clipping' in out
  assert '1 of 1 diverged' in out
