"""Compiled programs of a net: inference, gradient, training step, its parts."""

import functools
import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from ml_collections import config_dict

from experiments.benchmarks import step
from nfnets_jax import models
from nfnets_jax.models import variants
from nfnets_jax.training import build, fit
from nfnets_jax.training import config as defaults
from nfnets_jax.training import train_step as steps

KINDS = ('forward', 'gradient', 'step')
_RECIPES = ('nf_resnet', 'nf_regnet', 'resnet', 'efficientnet')


class Program(NamedTuple):
  """A compiled program.

  Attributes:
    run: runs it once, waits for the result and returns it.
    compile_seconds: time to trace, lower and compile.
    temporaries: bytes of temporaries.
    memory: bytes of arguments, results and temporaries.
  """

  run: Callable[[], Any]
  compile_seconds: float
  temporaries: int
  memory: int


def recipe(model: str, precision: str) -> config_dict.ConfigDict:
  """Returns the training config of a net, without augmentation."""
  family = variants.get(model).family
  module: Any = defaults
  if family in _RECIPES:
    module = importlib.import_module(f'experiments.{family}_imagenet')
  config = module.get_config()
  config.model = defaults.model(model)
  config.augment.mixup_alpha = None
  config.augment.cutmix = False
  config.augment.rand_augment = None
  config.compute_dtype = precision
  return config


def programs(
  config: config_dict.ConfigDict, batch: int, size: int, kinds: Sequence[str]
) -> dict[str, Program]:
  """Compiles programs of a net.

  Args:
    config: training config.
    batch: number of images.
    size: side of the images in pixels.
    kinds: some of `KINDS`, 'update' (the part of a step after the gradient) and
      'clip' (AGC alone; skipped if the config does not clip).

  Returns:
    Programs by kind.
  """
  net = build.create_net(config, step.NUM_CLASSES)
  optimizer = build.create_optimizer(config, optax.constant_schedule(1e-6))
  run, state, arrays = step.create(config, batch, size)
  params, model_state = jax.device_put(
    (state.params, state.model_state), jax.local_devices()[0]
  )
  key = jax.random.key(1)
  images = jax.random.normal(key, (batch, size, size, 3), config.compute_dtype)
  labels = jnp.asarray(arrays['label'][0])

  def forward(images: jax.Array, params: Any, model_state: Any) -> jax.Array:
    outputs, _ = net.apply(params, model_state, None, images, is_training=False)
    return outputs['logits']

  def loss(params: hk.MutableParams, model_state: Any, images: jax.Array):
    outputs, _ = net.apply(params, model_state, key, images, is_training=True)
    logits = outputs['logits'].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()

  def update(state: steps.TrainState, grads: Any) -> steps.TrainState:
    return steps.apply_gradients(state, grads, optimizer, config.ema_decay)

  def clip(grads: Any, params: Any) -> Any:
    plain = config.copy_and_resolve_references()
    plain.optimizer.update(name='sgd', momentum=0.0, weight_decay=0.0)
    only = build.create_optimizer(plain, optax.constant_schedule(-1.0))
    return only.update(grads, only.init(params), params)[0]

  def grads() -> Any:
    return jax.tree.map(lambda x: jnp.full_like(x, 1e-3), params)

  make = {
    'forward': lambda: _compile(forward, images, params, model_state),
    'gradient': lambda: _compile(
      jax.value_and_grad(loss), params, model_state, images
    ),
    'step': lambda: _compile(run, state, arrays, donate=True),
    'update': lambda: _compile(update, state, grads(), donate=True),
    'clip': lambda: _compile(clip, grads(), params),
  }
  return {
    kind: make[kind]()
    for kind in kinds
    if kind != 'clip' or config.optimizer.clip
  }


def _compile(function: Any, *args: Any, donate: bool = False) -> Program:
  """Compiles a function whose result replaces its first argument if donated."""
  if not hasattr(function, 'lower'):
    function = jax.jit(function, donate_argnums=0 if donate else ())
  began = time.perf_counter()
  program = function.lower(*args).compile()
  seconds = time.perf_counter() - began
  held = list(args)
  if donate:
    held[0] = jax.tree.map(jnp.copy, args[0])

  def run() -> Any:
    result = jax.block_until_ready(program(*held))
    if donate:
      held[0] = result[0] if type(result) is tuple else result
    return result

  need = fit.need(program)
  return Program(run, seconds, need.temporaries, need.total)


def count_macs(config: config_dict.ConfigDict, size: int) -> int:
  """Counts the multiply-accumulates of a forward pass of one image."""
  net = build.create_net(config, step.NUM_CLASSES)
  return models.count_macs(
    functools.partial(net.init, is_training=False),
    jax.eval_shape(lambda: jax.random.key(0)),
    jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),
  )
