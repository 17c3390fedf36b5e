import jax
import numpy as np
import optax
import pytest

from nfnets_jax import agc
from nfnets_jax.agc import paths as agc_paths
from tests.agc.common import clip, tree


@pytest.mark.parametrize(
  ('path', 'expected'),
  [
    ('NFNet/~/linear/w', True),
    ('NFNet/~/linear/b', False),
    ('linear/w', False),  # the first of several in Haiku
    ('head/w', True),
    ('mlp/~/linear_0/w', False),
    ('NFNet/~/nf_block/~/squeeze_excite/~/linear/w', False),
    ('params/head/kernel', True),
    ('params/head/bias', False),
    ('params/block/head/kernel', False),
    ('fc/weight', True),
    ('head/kernel/value', True),
    ('conv/kernel', False),
    # Layers made in `__call__`.
    ('net/head/w', True),
    ('net/linear/w', True),
    ('net/linear/b', False),
    ('net/block/linear/w', False),
    ('params/lm_head/kernel', True),
    ('transformer/lm_head/w', True),
    ('head/out_proj/weight', True),
    ('classifier/out_proj/kernel', True),
    ('head/fc/weight', True),
    ('heads/head/kernel', True),
    ('params/output_layer/kernel', True),
    ('params/out/kernel', True),
    ('params/Dense_1/kernel', False),  # no name tells the last of several
    ('NFNet/~/block/~/gate/~/linear/w', False),
    ('params/block_0/attn/head/kernel', False),
    ('params/block_0/attn/out/kernel', False),
    ('layers/0/attn/out_proj/weight', False),
    ('attn/out_proj/weight', False),
    ('params/header/kernel', False),
    ('params/head/norm/kernel', False),
  ],
)
def test_head_is_known(path, expected):
  assert agc.is_head(path, None) is expected


@pytest.mark.parametrize(
  ('paths', 'exclude'),
  [
    (('params/Dense_0/kernel', 'params/Dense_1/kernel'), agc.is_head),
    (('linear/w', 'linear_1/w'), agc.is_head),
    (('layers/0/weight', 'layers/1/weight'), agc.is_head),
    (('net/head/w',), lambda path, leaf: 'haed' in path),
    (('net/head/w',), lambda path, leaf: leaf.ndim == 1),
  ],
)
def test_what_excludes_nothing_is_refused(paths, exclude):
  params = tree(*paths)
  shown = f'matches no parameter; the paths are {", ".join(paths)}: exclude by'
  with pytest.raises(
    ValueError, match=f'{shown} path, .* {paths[-1]!r}, or drop'
  ):
    agc.adaptive_grad_clip(0.1, exclude=exclude).init(params)
  with pytest.raises(ValueError, match=shown):
    agc.summarize(params, params, exclude=exclude)
  with pytest.raises(ValueError, match=shown):
    optax.chain(
      agc.adaptive_grad_clip(0.1, exclude=exclude), optax.sgd(0.1)
    ).init(params)
  injected = optax.inject_hyperparams(agc.adaptive_grad_clip, 'exclude')
  with pytest.raises(ValueError, match=shown):
    injected(0.1, exclude=exclude).init(params)


@pytest.mark.parametrize(
  'paths',
  [
    # Which is the last?
    ('net/linear/w', 'net/linear_1/w'),
    ('NFNet/~/linear/w', 'NFNet/~/linear_1/w'),
    ('net/head/w', 'net/linear/w'),
    ('params/fc/kernel', 'params/out/kernel'),
    # A layer of an inner module, and the classifier under another name.
    ('gate/linear/w', 'linear/w'),
    ('multi_head_attention/linear/w', 'readout/w'),
  ],
)
def test_is_head_refuses_to_choose(paths):
  with pytest.raises(ValueError, match='is_head matches .* exclude by path'):
    agc.adaptive_grad_clip(0.1, exclude=agc.is_head).init(tree(*paths))
  chosen = agc.adaptive_grad_clip(0.1, exclude=lambda path, x: path == paths[0])
  assert chosen.init(tree(*paths)) == optax.EmptyState()


@pytest.mark.parametrize(
  'path',
  [
    'net/head/w',
    'net/linear/w',
    'params/lm_head/kernel',
    'head/out_proj/weight',
    'classifier/kernel',
  ],
)
def test_is_head_keeps_the_head(path):
  net = path.split('/')[0]
  params = tree(path, f'{net}/conv/w')
  grads = jax.tree.map(lambda x: 9 * x, params)
  found = dict(agc_paths.leaves(clip(grads, params, 0.1, exclude=agc.is_head)))
  np.testing.assert_array_equal(found[path], np.full((2, 2), 9))
  np.testing.assert_allclose(found[f'{net}/conv/w'], 0.1, rtol=1e-6)


def test_where_parameters_are_hidden_nothing_is_missed():
  params = tree('body/kernel', 'head/kernel')
  mask = {'body': {'kernel': True}, 'head': {'kernel': False}}
  transform = agc.adaptive_grad_clip(0.1, exclude=agc.is_head)
  grouped = agc.adaptive_grad_clip(
    0.1, group=lambda path, leaf: path.split('/')[0], statistics=True
  )
  for each in (transform, grouped, agc.adaptive_grad_clip(0.1, units='OIHW')):
    masked = optax.masked(each, mask)
    masked.update(params, masked.init(params), params)
    parts = optax.partition({True: each, False: each}, mask)
    parts.update(params, parts.init(params), params)
    each.init({})
    each.init({'frozen': None})
  assert transform.update({}, transform.init({}), {})[0] == {}
