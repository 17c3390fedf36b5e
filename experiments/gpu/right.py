"""Part 1: correctness on the device.

  python -m experiments.gpu.right f0 float32

Golden values are compared at full float32 precision. The error at the default
precision of float32 products (TF32 on Ampere and Hopper GPUs) is recorded too.
"""

import argparse
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.gpu import common, step
from nfnets_jax import agc, models
from nfnets_jax.runtime import checkpoint
from nfnets_jax.runtime import workdir as workdirs

# The type checker does not read tests.
reference = importlib.import_module('tests.golden')

_GOLDEN = pathlib.Path(str(reference.__file__)).parent
# Relative errors; those of bfloat16 logits on a CPU are 0.01 to 0.02.
_LIMITS = {'float32': 1e-4, 'bfloat16': 0.05}
_NETS = {
  'nf_resnet50': 'NF_ResNet/ResNet50@64',
  'resnet50': 'ResNet/ResNet50@64',
  'nf_regnet_b0': 'NF_RegNet/B0@64',
}
# Relative errors of update and loss from those of the CPU.
_STEP_LIMITS = {'float32': (1e-3, 1e-5), 'bfloat16': (0.1, 0.01)}


def check_agc() -> None:
  """Compares clipped gradients with released values."""
  arrays = np.load(_GOLDEN / 'agc.npz')

  def part(prefix: str, dtype: Any) -> dict[str, jax.Array]:
    return {
      name.removeprefix(prefix): jnp.asarray(arrays[name], dtype)
      for name in arrays.files
      if name.startswith(prefix)
    }

  for dtype, limit in (('float32', 1e-6), ('bfloat16', 0.02)):
    grads, params = part('grad/', dtype), part('param/', dtype)
    for clipping in (0.01, 0.16):
      transform = agc.adaptive_grad_clip(clipping)
      clipped, _ = jax.jit(transform.update)(
        grads, transform.init(params), params
      )
      expected = part(f'clipped@{clipping}/', 'float32')
      worst = max(
        reference.relative_error(clipped[name].astype(np.float32), x)
        for name, x in expected.items()
        if np.any(x)
      )
      common.check(1, f'AGC, λ = {clipping}, {dtype}', worst, limit)


def check_f0(precision: str) -> None:
  """Compares logits and gradients of F0 with released values."""
  expected = np.load(_GOLDEN / 'logits.npz')['NFNet/F0@64']
  gradients = json.loads((_GOLDEN / 'nfnet_f0_grads.json').read_text())
  net = hk.transform(lambda x: models.create('nfnet_f0')(x, False))
  images = reference.image(2, 64)
  shapes = jax.eval_shape(net.init, jax.random.key(0), images)
  params = reference.fill_tree(shapes)

  def loss_fn(params: hk.MutableParams, images: jax.Array):
    logits = net.apply(params, None, images)['logits']
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, jnp.array([0, 7])
    )
    return losses.mean(), logits

  limit = _LIMITS[precision]
  with jax.default_matmul_precision('highest'):
    (loss, logits), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
      params, jnp.asarray(images, precision)
    )
  error = reference.relative_error(logits, expected)
  common.check(1, f'logits of nfnet_f0, {precision}', error, limit)
  error = abs(float(loss) / gradients['loss'] - 1)
  common.check(1, f'loss of nfnet_f0, {precision}', error, limit)
  ours, released = [], []
  for module, norms in gradients['grad_norm'].items():
    for name, norm in norms.items():
      ours.append(np.linalg.norm(np.asarray(grads[module][name], np.float64)))
      released.append(norm)
  error = reference.relative_error(ours, released)
  common.check(1, f'gradient norms of nfnet_f0, {precision}', error, 2 * limit)


def check_net(name: str) -> None:
  """Compares logits of another family with released values."""
  expected = np.load(_GOLDEN / 'logits.npz')[_NETS[name]]
  images = reference.image(2, 64)
  net = hk.transform_with_state(lambda x: models.create(name)(x, False))
  shapes, state = jax.eval_shape(net.init, jax.random.key(0), images)
  params = reference.fill_tree(shapes)
  # Moving means of 0 and variances of 1.
  state = {
    module: {
      leaf: np.full(x.shape, module.endswith('/var_ema'), x.dtype)
      for leaf, x in leaves.items()
    }
    for module, leaves in state.items()
  }
  forward = jax.jit(lambda *args: net.apply(*args)[0]['logits'])

  def error(precision: str) -> float:
    logits = forward(params, state, None, jnp.asarray(images, precision))
    return reference.relative_error(logits, expected)

  for precision, limit in _LIMITS.items():
    with jax.default_matmul_precision('highest'):
      value = error(precision)
    common.check(1, f'logits of {name}, {precision}', value, limit)
  common.add(
    1,
    f'logits of {name}, float32 at its default precision',
    value=error('float32'),
  )


def take_step(precision: str, path: pathlib.Path) -> None:
  """Runs a step and writes update and loss, for `check_step`."""
  size = 16 if common.dry_run() else 64
  config = step.recipe('nfnet_f0', precision)
  with jax.default_matmul_precision('highest'):
    first = step.create(config, 4, size, learning_rate=0.1)
    before = jax.device_get(first.state.params)
    state, metrics = first.run(first.state, first.batch)
  after = jax.device_get(state.params)
  updates = jax.tree.map(lambda new, old: (new - old).ravel(), after, before)
  update = np.concatenate(jax.tree.leaves(updates))
  np.savez(path, update=update, loss=np.asarray(metrics['loss']))


def check_step(precision: str) -> None:
  """Compares a step of F0 on this device with one on the CPU."""
  folder = common.scratch()
  here = folder / f'step-{precision}-here.npz'
  there = folder / f'step-{precision}-cpu.npz'
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_backend_optimization_level=0',
  }
  command = [sys.executable, '-m', 'experiments.gpu.right', 'take-step']
  command += [precision, f'--to={there}']
  with subprocess.Popen(command, env=environment) as process:
    take_step(precision, here)
    if process.wait():
      raise RuntimeError(f'the step on the CPU ended with {process.returncode}')
  ours, theirs = np.load(here), np.load(there)
  of_update, of_loss = _STEP_LIMITS[precision]
  for name, limit in (('update', of_update), ('loss', of_loss)):
    common.check(
      1,
      f"{name} of a step of nfnet_f0, {precision}, and the CPU's",
      reference.relative_error(ours[name], theirs[name]),
      limit,
    )


def check_digits() -> None:
  """Trains on digits, killed after a checkpoint and resumed."""
  folder = common.scratch() / 'digits'
  command = [
    sys.executable,
    '-m',
    'nfnets_jax.main',
    '--config=experiments/digits.py',
    f'--workdir={folder}',
    f'--config.data.data_dir={common.scratch()}/data',
    '--config.data.num_workers=4',
  ]
  limit = 0.98
  if common.dry_run():
    command += [
      '--config.epochs=2.0',
      '--config.optimizer.warmup_epochs=0.5',
      '--config.data.train_split=train[:256]',
      '--config.data.test_split=test[:64]',
      '--config.model.depth=(1,1,1)',
      '--config.eval_every_epochs=2.0',
      '--config.checkpoint_every_epochs=1.0',
    ]
    limit = 0.02
  began = time.monotonic()
  with subprocess.Popen(command) as process:
    while not (saved := checkpoint.steps(folder / 'checkpoints')):
      if process.poll() is not None:
        raise RuntimeError(f'digits ended with {process.returncode}')
      time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
  print(done.stdout, flush=True)
  if done.returncode:
    raise RuntimeError(f'digits ended with {done.returncode}')
  resumed = any(f'resumed after step {x}' in done.stdout for x in saved)
  common.add(1, 'digits: killed and resumed', ok=resumed, killed_after=saved)
  report = workdirs.read_report(folder)
  assert report is not None
  value = report['ema_eval_top_1']
  common.add(
    1,
    'digits: top-1 of the average',
    value=value,
    at_least=limit,
    ok=value >= limit,
    steps=report['steps'],
    images_per_second=report['images_per_second'],
    seconds=round(time.monotonic() - began, 1),
  )


def main(argv: list[str] | None = None) -> None:
  """Runs one job."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.gpu.right',
    description='Checks results on this device.',
  )
  jobs: dict[str, Callable[..., None]] = {
    'agc': check_agc,
    'f0': check_f0,
    'step': check_step,
    'digits': check_digits,
    'net': check_net,
  }
  parser.add_argument('job', choices=[*jobs, 'take-step'])
  parser.add_argument('of', nargs='*', help='a precision or a net')
  parser.add_argument(
    '--to', type=pathlib.Path, help='output file of take-step'
  )
  args = parser.parse_args(argv)
  if args.job == 'take-step':
    take_step(args.of[0], args.to)
  else:
    jobs[args.job](*args.of)


if __name__ == '__main__':
  main()
