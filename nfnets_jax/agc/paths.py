"""Parameter paths, such as 'params/Dense_0/kernel', and the paper's `exclude`.

Paths are `jax.tree_util.keystr` joined by '/', without `nnx.Param`'s `value`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

# `nnx.Param` is a node in `init` of `nnx.Optimizer`, a leaf in `update`.
_NNX_KEYS = tuple(map(jax.tree_util.GetAttrKey, ('value', 'raw_value')))

_HEAD = re.compile(
  r'\w+/(~/)?linear/w'
  r'|(params/|\w+/(~/)?(?=.*/w$))?'
  r'(head|heads/head|lm_head|classifier|classification_head|fc|logits|out'
  r'|output|output_layer|score)(/(~/)?(fc|out_proj))?'
  r'/(kernel|weight|w)(/value)?'
)


def is_head(path: str, leaf: Any) -> bool:
  """Whether a leaf is the classifier's weights, unclipped in the paper.

  Matches the weights of `NET/~/linear` and `NET/linear` in Haiku, where NET is
  the outermost module, and in any library those of an outermost `head`,
  `lm_head`, `classifier`, `classification_head`, `fc`, `logits`, `out`,
  `output`, `output_layer` or `score`, or of an `fc` or `out_proj` in it; never
  biases.

  A path does not show which layer is last. As `exclude`, it must match exactly
  one leaf, not the first of several, such as `NET/linear` next to
  `NET/linear_1`. Write your own function for other names.

  Example:
    >>> paths = ['NFNet/~/linear/w', 'NFNet/~/block/~/gate/~/linear/w']
    >>> [is_head(path, None) for path in [*paths, 'params/head/kernel']]
    [True, False, True]

  Reference:
    Brock et al. 2021, section 4.1.
  """
  del leaf
  return _HEAD.fullmatch(path) is not None


def join(keys: tuple) -> str:
  """Joins the keys of a leaf to its path."""
  if keys and keys[-1] in _NNX_KEYS:
    keys = keys[:-1]
  return jax.tree_util.keystr(keys, simple=True, separator='/')


def leaves(tree: Any, is_leaf: Any = None) -> list[tuple[str, Any]]:
  """Returns the path and value of each leaf."""
  flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
  return [(join(keys), x) for keys, x in flat]


def is_whole(params: Any) -> bool:
  """Whether no parameter is masked, as by `optax.masked`."""
  nodes = jax.tree.leaves(
    params, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
  )
  return bool(nodes) and not any(isinstance(x, optax.MaskedNode) for x in nodes)


def included(
  exclude: Callable[[str, Any], bool] | None, params: Any
) -> list[tuple[str, Any]]:
  """Returns the leaves not excluded; raises if `exclude` matches none."""
  all_leaves = leaves(params)
  if exclude is None:
    return all_leaves
  names = [path for path, _ in all_leaves]
  excluded = [path for path, x in all_leaves if exclude(path, x)]
  if excluded and exclude is is_head:
    _check_head(excluded, names)
  elif not excluded and is_whole(params):
    name = getattr(exclude, '__name__', repr(exclude))
    raise ValueError(
      f'exclude={name} matches no parameter; {_advice(names)}, or drop it to '
      'clip all'
    )
  left_out = set(excluded)
  return [(path, x) for path, x in all_leaves if path not in left_out]


def _check_head(matches: Sequence[str], names: Sequence[str]) -> None:
  """Raises if the layer that `is_head` matches may not be the last."""
  module, _, name = matches[0].rpartition('/')
  net = module.split('/')[0] + '/'
  is_inner = module.endswith('/linear') and not all(
    path.startswith(net) for path in names
  )
  if len(matches) > 1 or is_inner or f'{module}_1/{name}' in names:
    raise ValueError(
      f'is_head matches {", ".join(matches)}, which may not be the classifier; '
      f'{_advice(names)}'
    )


def _advice(names: Sequence[str]) -> str:
  """Lists the outermost paths, one of which is the classifier."""
  some = sorted(names, key=lambda path: path.count('/'))[:20]
  return (
    f'the paths are {", ".join(some)}{", …" if len(names) > 20 else ""}: '
    f'exclude by path, as with lambda path, leaf: path == {some[-1]!r}'
  )
