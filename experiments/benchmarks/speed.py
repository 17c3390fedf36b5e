r"""Times a net beside the released formulation, timm, or another net, in turn.

  python -m experiments.benchmarks.speed --model=nfnet_f0 --peer released timm \
    --peer_python=PYTHON --json=f0.json

Three kinds of work on random images: `forward` is inference, `gradient` forward
and backward in training mode, and `step` the training step of the net's own
recipe as `main` runs it: AGC, decay, momentum and moving average, where it has
them, but no augmentation, which is not the net's. All float32 or all bfloat16
with float32 parameters, on one device. Every round runs all of them once, so
that a machine whose speed drifts does not decide a ratio, which is taken round
by round.

Operations are counted as two for each multiply-accumulate of convolutions and
matrix products, and three times those of the forward pass with the backward
pass. `peak` is what a large matrix product reaches in the same run.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import config_dict

from experiments.benchmarks import op_profile, peak, released, timm_peer
from nfnets_jax import devices, models, paths
from nfnets_jax.models import variants
from nfnets_jax.runtime import parallel
from nfnets_jax.training import build, host_memory
from nfnets_jax.training import config as defaults
from nfnets_jax.training import train_step as steps

KINDS = ('forward', 'gradient', 'step')
_NUM_CLASSES = 1000
_RECIPES = ('nf_resnet', 'nf_regnet', 'resnet', 'efficientnet')


@dataclasses.dataclass
class Program:
  """A compiled piece of work.

  Attributes:
    run: does it once and waits; returns what it computes, but for 'step'.
    compile_seconds: to trace, lower and compile it.
    temporaries: bytes that it takes beside its arguments and results.
    memory: bytes that it takes in all.
    hlo: gives the text of the program.
  """

  run: Callable[[], Any]
  compile_seconds: float
  temporaries: int
  memory: int
  hlo: Callable[[], str]


def recipe(model: str, precision: str) -> config_dict.ConfigDict:
  """Returns the config of a net's training, with augmentation left out."""
  family = variants.get(model).family
  if family in _RECIPES:
    config = importlib.import_module(
      f'experiments.{family}_imagenet'
    ).get_config()
  else:
    config = defaults.get_config()
  config.model = defaults.model(model)
  config.augment.mixup_alpha = None
  config.augment.cutmix = False
  config.augment.rand_augment = None
  config.compute_dtype = precision
  return config


def programs(
  config: config_dict.ConfigDict, batch: int, size: int, kinds: Sequence[str]
) -> dict[str, Program]:
  """Compiles a net's pieces of work.

  Args:
    config: of its training.
    batch: images.
    size: their side, in pixels.
    kinds: some of `KINDS`, and 'update', the part of the step that follows the
      gradient, and 'clip', AGC alone, if the config has it.

  Returns:
    A program for each of them.
  """
  net = build.create_net(config, _NUM_CLASSES)
  schedule = optax.constant_schedule(1e-6)
  optimizer = build.create_optimizer(config, schedule)
  state = _draw(steps.state_shapes(net, optimizer, size))
  params, model_state = jax.device_put(
    (state.params, state.model_state), jax.local_devices()[0]
  )
  key = jax.random.key(1)
  images = jax.random.normal(key, (batch, size, size, 3), config.compute_dtype)
  labels = jnp.arange(batch, dtype=jnp.int32) % _NUM_CLASSES

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

  def compiled(
    function: Callable, *args: Any, donated: bool = False
  ) -> tuple[Callable, Program]:
    jitted = (
      function
      if hasattr(function, 'lower')
      else jax.jit(function, donate_argnums=0 if donated else ())
    )
    began = time.perf_counter()
    program = jitted.lower(*args).compile()
    seconds = time.perf_counter() - began
    stats = program.memory_analysis()
    return program, Program(
      run=lambda: jax.block_until_ready(program(*args)),
      compile_seconds=seconds,
      temporaries=stats.temp_size_in_bytes,
      memory=stats.temp_size_in_bytes
      + stats.argument_size_in_bytes
      + stats.output_size_in_bytes
      - stats.alias_size_in_bytes,
      hlo=program.as_text,
    )

  def stepping(
    function: Callable, state: steps.TrainState, *args: Any
  ) -> Program:
    program, made = compiled(function, state, *args, donated=True)
    # What is donated is gone: each run goes on from the last one's state.
    kept = [jax.tree.map(jnp.copy, state)]

    def run() -> None:
      result = jax.block_until_ready(program(kept[0], *args))
      kept[0] = result[0] if type(result) is tuple else result

    made.run = run
    return made

  made = {}
  if 'forward' in kinds:
    _, made['forward'] = compiled(forward, images, params, model_state)
  if 'gradient' in kinds:
    _, made['gradient'] = compiled(
      jax.value_and_grad(loss), params, model_state, images
    )
  if 'step' in kinds:
    step = parallel.parallel_train_step(
      functools.partial(
        build.create_train_step(config, net, _NUM_CLASSES, lambda _: schedule),
        hyperparams={},
      )
    )
    pixels = np.random.default_rng(0).integers(
      256, size=(1, batch, size, size, 3), dtype=np.uint8
    )
    label = np.asarray(labels)[None]
    shares = {
      'image': pixels,
      'label': label,
      'mix_label': label,
      'ratio': np.ones(label.shape, np.float32),
    }
    made['step'] = stepping(step, state, shares)
  if 'update' in kinds or 'clip' in kinds:
    grads = jax.tree.map(lambda x: 1e-3 * jnp.ones_like(x), params)
  if 'update' in kinds:
    made['update'] = stepping(update, state, grads)
  if 'clip' in kinds and config.optimizer.clip:
    _, made['clip'] = compiled(clip, grads, params)
  return made


def _draw(shapes: steps.TrainState) -> steps.TrainState:
  """Parameters of about the usual size, on the host.

  To compile and run what draws a net's own takes a minute for F2, as long as to
  compile its gradient. No branch is switched off.
  """
  rng = np.random.default_rng(0)

  def parameter(x: jax.ShapeDtypeStruct) -> np.ndarray:
    fan_in = math.prod(x.shape[:-1])
    if fan_in == 1:  # gains and biases
      return np.ones(x.shape, x.dtype)
    weights = rng.standard_normal(x.shape, np.float32)
    return weights * np.float32(fan_in**-0.5)

  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  params = jax.tree.map(parameter, shapes.params)
  # Also the variances that batch normalisation keeps: there is no zero.
  model_state = jax.tree.map(
    lambda x: np.ones(x.shape, x.dtype), shapes.model_state
  )
  return zeros._replace(
    params=params,
    model_state=model_state,
    ema_params=params,
    ema_model_state=model_state,
  )


def measure(args: argparse.Namespace) -> dict[str, Any]:
  """Compiles, warms up and times everything; returns the JSON object."""
  size = args.image_size or variants.get(args.model).train_size
  config = recipe(args.model, args.precision)
  pieces = {'ours': programs(config, args.batch, size, args.what)}
  parts = programs(config, args.batch, size, ['update', 'clip'])
  about: dict[str, Any] = {}
  with contextlib.ExitStack() as stack:
    peers: dict[str, timm_peer.Peer] = {}
    for name in args.peer:
      if name == 'released':
        with released.formulation():
          pieces[name] = programs(config, args.batch, size, args.what)
      elif name == 'timm':
        peer = timm_peer.Peer(
          args.peer_python,
          args.model,
          args.what,
          batch=args.batch,
          image_size=size,
          precision=args.precision,
          agc=config.optimizer.clip == 'agc',
          ema=config.ema_decay > 0,
        )
        stack.callback(peer.close)
        peers[name] = peer
        about[name] = {**peer.about, 'layout': peer.layout}
      else:
        other = args.image_size or variants.get(name).train_size
        theirs = recipe(name, args.precision)
        pieces[name] = programs(theirs, args.batch, other, args.what)
    seconds: dict[str, dict[str, list[float]]] = {
      name: {kind: [] for kind in args.what} for name in ['ours', *args.peer]
    }
    part_seconds: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(-args.warmup, args.repeats):
      for kind in args.what:
        for name in ['ours', *args.peer]:
          if name in peers:
            took = peers[name].run(kind)
          else:
            took = _time(pieces[name][kind].run)
          if number >= 0:
            seconds[name][kind].append(took)
      for part, program in parts.items():
        took = _time(program.run)
        if number >= 0:
          part_seconds[part].append(took)
  split = None
  if 'step' in args.what:
    program = pieces['ours']['step']
    split = op_profile.split(program.hlo(), program.run)
  macs = _count_macs(config, args.batch, size)
  return {
    'model': args.model,
    'batch': args.batch,
    'image_size': size,
    'precision': args.precision,
    'command': ' '.join(['python -m experiments.benchmarks.speed', *args.argv]),
    'date': datetime.date.today().isoformat(),
    'python': platform.python_version(),
    'jax': jax.__version__,
    'backend': jax.default_backend(),
    'device': jax.local_devices()[0].device_kind,
    'cores': os.cpu_count(),
    'peers': about,
    'peak_tflops': peak.measure_tflops(args.precision),
    'flops': {
      kind: 2 * macs * (1 if kind == 'forward' else 3) for kind in args.what
    },
    'seconds': seconds,
    'parts': part_seconds,
    'split': split,
    'programs': {
      name: {
        kind: {
          'compile_seconds': made.compile_seconds,
          'temporaries': made.temporaries,
          'memory': made.memory,
        }
        for kind, made in kinds.items()
      }
      for name, kinds in pieces.items()
    },
    'ratios': {
      name: {
        kind: [
          a / b
          for a, b in zip(
            seconds['ours'][kind], seconds[name][kind], strict=True
          )
        ]
        for kind in args.what
      }
      for name in args.peer
    },
  }


def _time(run: Callable[[], Any]) -> float:
  began = time.perf_counter()
  run()
  return time.perf_counter() - began


def _count_macs(config: config_dict.ConfigDict, batch: int, size: int) -> int:
  net = build.create_net(config, _NUM_CLASSES)
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  params, state = jax.eval_shape(
    lambda key, x: net.init(key, x, is_training=False), key, images
  )

  def forward(params: Any, state: Any, images: jax.Array) -> Any:
    return net.apply(params, state, None, images, is_training=False)[0]

  return batch * models.count_macs(forward, params, state, images)


def table(found: dict[str, Any]) -> str:
  """Formats what was measured."""
  lines = [
    f'{found["model"]}, {found["image_size"]} px, batch {found["batch"]}, '
    f'{found["precision"]}, jax {found["jax"]} on {found["device"]} '
    f'({found["cores"]} cores), {found["date"]}; large matrix product '
    f'{found["peak_tflops"]:.3f} TFLOP/s',
    *(
      f'{name}: {about["name"]}, timm {about["timm"]} on torch '
      f'{about["torch"]}, {about["threads"]} threads, {about["layout"]}'
      for name, about in found['peers'].items()
    ),
    f'{"":24}{"median s":>10}{"min":>9}{"max":>9}{"images/s":>10}'
    f'{"TFLOP/s":>9}{"of peak":>9}{"compile s":>11}{"MB":>8}{"ours ÷":>8}',
  ]
  for kind, flops in found['flops'].items():
    for name, times in found['seconds'].items():
      median = statistics.median(times[kind])
      line = (
        f'{kind:10}{name:14}{median:10.4f}{min(times[kind]):9.4f}'
        f'{max(times[kind]):9.4f}{found["batch"] / median:10.2f}'
      )
      # Another net has other operations, and a larger image may be its own.
      if name in ('ours', 'released', 'timm'):
        speed = flops / median / 1e12
        line += f'{speed:9.3f}{speed / found["peak_tflops"]:9.0%}'
      else:
        line += f'{"":18}'
      if name in found['programs']:
        made = found['programs'][name][kind]
        line += f'{made["compile_seconds"]:11.1f}{made["memory"] / 1e6:8.0f}'
      else:
        line += f'{"":19}'
      if name in found['ratios']:
        ratios = found['ratios'][name][kind]
        line += (
          f'{statistics.median(ratios):8.3f} '
          f'({min(ratios):.3f} to {max(ratios):.3f})'
        )
      lines.append(line)
  for part, times in found['parts'].items():
    label = {'update': 'update, all of it', 'clip': 'clipping alone'}[part]
    lines.append(
      f'{label:24}{statistics.median(times):10.4f}{min(times):9.4f}'
      f'{max(times):9.4f}'
    )
  if found['split']:
    shares = ', '.join(f'{k} {v:.3f} s' for k, v in found['split'].items())
    lines.append(f'one step, profiled: {shares}')
  elif 'step' in found['flops']:
    lines.append('one step, profiled: this backend names no operations')
  return '\n'.join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses the command line, and checks it before anything takes time."""
  parser = argparse.ArgumentParser(description='The speed of a net.')
  parser.add_argument('--model', default='nfnet_f0', help='a variant')
  parser.add_argument('--batch', type=int, default=8, help='images in a step')
  parser.add_argument(
    '--image_size', type=int, help="pixels; the variant's training size if none"
  )
  parser.add_argument(
    '--precision', choices=['float32', 'bfloat16'], default='float32'
  )
  parser.add_argument('--what', nargs='+', choices=KINDS, default=list(KINDS))
  parser.add_argument(
    '--peer',
    nargs='*',
    default=[],
    help="'released', 'timm', or another variant",
  )
  parser.add_argument(
    '--peer_python', help='interpreter with torch and timm, for --peer timm'
  )
  parser.add_argument('--repeats', type=int, default=5, help='timed rounds')
  parser.add_argument(
    '--warmup', type=int, default=2, help='rounds before them'
  )
  parser.add_argument('--json', type=paths.argument, help='a file to write')
  args = parser.parse_args(argv)
  args.argv = argv
  try:
    for name in [args.model, *args.peer]:
      if name not in ('released', 'timm'):
        variants.get(name)
  except ValueError as error:
    parser.error(str(error))
  if 'timm' in args.peer and not args.peer_python:
    parser.error('--peer timm needs --peer_python, which has torch and timm')
  if 'timm' in args.peer and args.model not in timm_peer.NAMES:
    known = ', '.join(sorted(timm_peer.NAMES))
    parser.error(f'timm has no {args.model}; choose one of {known}')
  for name in ('batch', 'repeats'):
    if getattr(args, name) < 1:
      parser.error(f'--{name} is {getattr(args, name)}; give 1 or more')
  if args.json and args.json.exists():
    parser.error(f'{args.json} exists; choose another name or move it')
  return args


def main(argv: list[str] | None = None) -> None:
  """Measures, prints a table and writes the JSON."""
  args = parse(sys.argv[1:] if argv is None else argv)
  found = measure(args)
  print(table(found))
  if args.json:
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(f'{json.dumps(found, indent=2)}\n')


if __name__ == '__main__':
  # Before jax's backend starts, or a profile on CPU names nothing.
  os.environ['XLA_FLAGS'] = (
    f'{os.environ.get("XLA_FLAGS", "")} {op_profile.CPU_FLAG}'
  )
  devices.start_or_exit()
  if jax.default_backend() == 'cpu':  # as in `main`
    host_memory.keep_freed_memory()
  main()
