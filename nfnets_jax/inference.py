"""Weights for inference: from any source, as a function of images."""

import os
from collections.abc import Callable, Sequence

import haiku as hk
import jax
import jax.numpy as jnp

from nfnets_jax import models, paths, weights
from nfnets_jax.data import imagenet
from nfnets_jax.models import variants
from nfnets_jax.training.normalize import normalize

PRECISIONS = ('float32', 'bfloat16')

Outputs = Callable[[jax.Array], dict[str, jax.Array]]
Forward = Callable[[jax.Array], jax.Array]


def create_outputs(
  net_weights: weights.Weights, precision: str = 'float32'
) -> Outputs:
  """Returns a function from pixels to logits and features.

  Args:
    net_weights: as returned by `weights.read`.
    precision: of the computation, 'float32' or 'bfloat16'.

  Returns:
    A pure function from images `[B, px, px, 3]`, 0 to 255, to a dict of float32
    `logits` `[B, K]` and `pool` `[B, C]`. Weights are standardised once, here.

  Raises:
    ValueError: if the precision is unknown.
  """
  if precision not in PRECISIONS:
    raise ValueError(
      f'precision {precision!r} is none of {", ".join(PRECISIONS)}'
    )

  def apply(images: jax.Array) -> dict[str, jax.Array]:
    net = models.create(
      net_weights.name,
      net_weights.num_classes,
      standardized=True,
      **net_weights.overrides,
    )
    return net(images, is_training=False)

  net = hk.transform_with_state(apply)
  params = jax.jit(models.fold)(net_weights.params)
  # Biases and the classifier stay float32, as in training.
  dtype = jnp.dtype(precision)
  params = {
    module: {
      leaf: x.astype(dtype) if leaf == 'w' and x.ndim == 4 else x
      for leaf, x in leaves.items()
    }
    for module, leaves in params.items()
  }

  def forward(images: jax.Array) -> dict[str, jax.Array]:
    inputs = normalize(images, dtype=dtype)
    # The default precision is bfloat16 on TPU and TF32 on GPU.
    with jax.default_matmul_precision(precision):
      outputs, _ = net.apply(params, net_weights.state, None, inputs)
    return {k: outputs[k].astype(jnp.float32) for k in ('logits', 'pool')}

  return forward


def create_forward(
  net_weights: weights.Weights, precision: str = 'float32'
) -> Forward:
  """Returns the logits of `create_outputs`, a function from pixels to `[B, K]`.

  Example:
    >>> import numpy as np
    >>> forward = jax.jit(create_forward(random_weights('nfnet_tiny', 10)))
    >>> forward(np.zeros((2, 32, 32, 3), np.uint8)).shape
    (2, 10)
  """
  outputs = create_outputs(net_weights, precision)
  return lambda images: outputs(images)['logits']


def random_weights(
  name: str, num_classes: int = 1000, seed: int = 0
) -> weights.Weights:
  """Returns untrained weights, for tests and benchmarks."""

  def apply(images: jax.Array) -> dict[str, jax.Array]:
    return models.create(name, num_classes)(images, is_training=False)

  net = hk.transform_with_state(apply)
  init = jax.jit(lambda key: net.init(key, jnp.zeros((1, 32, 32, 3))))
  params, state = jax.device_get(init(jax.random.key(seed)))
  return weights.Weights(name, dict(params), dict(state))


def class_names(
  num_classes: int,
  file: str | os.PathLike | None = None,
  recorded: Sequence[str] | None = None,
) -> list[str]:
  """Returns the K class names.

  Args:
    num_classes: K.
    file: text file with one name per line.
    recorded: names stored with the weights, used if there is no file. By
      default the names of ImageNet if K is 1000, else numbers.

  Raises:
    ValueError: if the file is not text, or has an empty line or another number
      of lines.
    OSError: if it cannot be read.

  Example:
    >>> class_names(1000)[0], class_names(3)
    ('tench, Tinca tinca', ['class 0', 'class 1', 'class 2'])
  """
  if file is not None:
    names = read_names(file)
    if len(names) != num_classes:
      raise ValueError(
        f'{file} has {len(names)} names, and the network {num_classes} classes'
      )
    return names
  if recorded is not None:
    return list(recorded)
  if num_classes == 1000:
    return list(imagenet.classes()[1])
  return [f'class {i}' for i in range(num_classes)]


def read_names(file: str | os.PathLike) -> list[str]:
  """Returns the class names in a text file; see `class_names`."""
  names = [x.strip() for x in paths.read_text_lines(file, 'classes')]
  for number, name in enumerate(names, start=1):
    if not name:
      raise ValueError(f'{file}:{number} is empty; each line names a class')
  return names


def read_weights(
  source: str, name: str | None, option: str = 'weights'
) -> weights.Weights:
  """Returns weights from a file, a run, a download or at random.

  Args:
    source: a file; the folder of a run; 'released'; 'hf-hub:OWNER/NAME'; or
      'random'.
    name: the variant; None infers it from a file or a run.
    option: the flag or argument that holds `source`, for messages.

  Returns:
    The weights; for a run, the moving average.

  Raises:
    ValueError: as in `weights.read`, or if the name is required.
    OSError: if the weights do not exist or cannot be read.
  """
  if source in ('released', 'random') and name is None:
    raise ValueError(f'{source} weights need a --model')
  if name is not None:
    variants.get(name)
  if source == 'random':
    return random_weights(name or '')
  path = weights.fetch(source, name, option)
  if path.is_dir():
    # Training needs more packages than prediction; only a run takes them.
    from nfnets_jax.training import init_from

    average = init_from.load_average(path)
    if name not in (None, average.name):
      raise ValueError(
        f'the run in {source} is of {average.name}, not of {name}'
      )
    return average
  return weights.read(path, name)
