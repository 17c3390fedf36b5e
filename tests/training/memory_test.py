import types

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import base
from nfnets_jax.training import memory, parallel, train, train_step
from nfnets_jax.training import optimizer as optimizers

GIB = memory.GIB


def _config(model, image_size, **changes):
  config = base.get_config()
  config.model = base.model(model)
  config.data.image_size = image_size
  config.compute_dtype = 'float32'
  config.update_from_flattened_dict(changes)
  return config


def _parts(config):
  net = train.create_net(config, num_classes=10)
  return net, optimizers.create_optimizer(config.optimizer, lambda step: 0.1)


def _estimate(config):
  return memory.estimate(*_parts(config), config, num_classes=10)


def _measure(config, share, micro_batches):
  """What XLA reserves for the step on one device."""
  net, optimizer = _parts(config)
  step = jax.pmap(
    train_step.create_train_step(
      net,
      optimizer,
      lambda step: 0.1,
      config,
      10,
      parallel.AXIS,
      micro_batches,
    ),
    axis_name=parallel.AXIS,
    in_axes=(None, 0),
    out_axes=(None, None),
    donate_argnums=0,
    devices=jax.devices()[:1],
  )
  count, size = share, config.data.image_size
  batch = {
    'image': jax.ShapeDtypeStruct((1, count, size, size, 3), jnp.uint8),
    'label': jax.ShapeDtypeStruct((1, count), jnp.int32),
    'mix_label': jax.ShapeDtypeStruct((1, count), jnp.int32),
    'ratio': jax.ShapeDtypeStruct((1, count), jnp.float32),
  }
  state = train_step.state_shapes(net, optimizer, size)
  found = step.lower(state, batch).compile().memory_analysis()
  return (
    found.argument_size_in_bytes
    + found.output_size_in_bytes
    - found.alias_size_in_bytes
    + found.temp_size_in_bytes
  )


def _check(config, share, micro_batches):
  need = _estimate(config)
  # The analysis knows of one batch, the estimate of those on their way too.
  others = (memory._BATCHES_IN_FLIGHT - 1) * share * need.batch
  ours = need.total(share, micro_batches) - others
  measured = _measure(config, share, micro_batches)
  assert 1.0 <= ours / measured <= 1.25


@pytest.mark.slow
@pytest.mark.parametrize(
  ('share', 'micro_batches'),
  [(16, 1), (64, 8)],
)
def test_estimate_is_a_little_above_what_xla_reserves(share, micro_batches):
  _check(_config('nfnet_tiny', 32), share, micro_batches)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('share', 'micro_batches'), [(2, 1), (4, 1), (8, 2), (8, 4)]
)
def test_estimate_of_f0_is_a_little_above_what_xla_reserves(
  share, micro_batches
):
  config = _config('nfnet_f0', 192)
  _check(config, share, micro_batches)


def test_state_is_counted_exactly():
  config = _config('nfnet_tiny', 32)
  need = _estimate(config)
  state = train_step.state_shapes(*_parts(config), image_size=32)
  for part, tree in (
    (need.params, state.params),
    (need.opt_state, state.opt_state),
    (need.ema, (state.ema_params, state.ema_model_state)),
    (need.model_state, state.model_state),
  ):
    leaves = jax.tree.leaves(tree)
    assert part == sum(x.size * x.dtype.itemsize for x in leaves)
  # Two raw images of a byte a colour, and their labels.
  assert need.batch == 2 * (32 * 32 * 3 + 4)


@pytest.mark.slow
def test_what_saves_memory_is_estimated_to():
  exact = _estimate(_config('nfnet_tiny', 32)).activations
  half, stages, blocks, small = (
    _estimate(_config('nfnet_tiny', size, **changes)).activations
    for size, changes in (
      (32, {'compute_dtype': 'bfloat16'}),
      (32, {'remat': 'stage'}),
      (32, {'remat': 'block'}),
      (16, {}),
    )
  )
  assert 0.4 < half / exact < 0.65
  assert blocks < stages < 0.7 * exact
  assert 0.2 < small / exact < 0.35


def test_total_is_the_sum_of_its_parts():
  need = memory.MemoryEstimate(1, 2, 4, 8, 16, 1000, 10**6)
  assert need.total(12, 1) == 31 + 36 * 10**6 + 12000
  # With the sum of the gradients beside the gradient.
  assert need.total(12, 3) == 31 + 1 + 36 * 10**6 + 4000


def _floats(count):
  return jnp.ones(count, jnp.float32)


@pytest.mark.parametrize(
  ('function', 'kilobytes'),
  [
    # All is computed where it is read; the result remains.
    (lambda x: (x + 1) * 2 - 3, 4),
    # A sum of something that is never there as a whole.
    (lambda x: jnp.sum(x * x), 0),
    # The first is dead when the third is made, if nobody reads it again.
    (lambda x: jnp.sort(jnp.sort(jnp.sort(x))), 8),
    (lambda x: jnp.sort(jnp.sort(y := jnp.sort(x))) + y, 12),
    # Expensive and read twice; read once.
    (lambda x: jnp.sum(jnp.sin(jnp.tanh(x)) * jnp.tanh(x)), 0),
    (lambda x: jax.jit(lambda y: jnp.sort(jnp.sort(y)))(x), 8),
    # A loop holds a value and its successor.
    (lambda x: jax.lax.fori_loop(0, 9, lambda _, y: jnp.sort(y), x), 8),
  ],
)
def test_peak_of_small_functions(function, kilobytes):
  peak = memory.peak_bytes(function, _floats(1000))
  assert peak / 1000 == pytest.approx(kilobytes, abs=0.1)


def test_peak_counts_what_the_backward_pass_needs():
  def loss(x):
    y = jnp.tanh(x)
    for _ in range(3):
      y = jnp.tanh(y)
    return jnp.sum(y)

  forward = memory.peak_bytes(loss, _floats(1000))
  backward = memory.peak_bytes(jax.grad(loss), _floats(1000))
  again = memory.peak_bytes(jax.grad(jax.checkpoint(loss)), _floats(1000))
  assert forward < backward
  assert again <= backward


NEEDS = st.builds(
  memory.MemoryEstimate, *[st.integers(0, 10**9)] * 6, st.integers(0, 10**5)
)


@settings(deadline=None)
@given(
  need=NEEDS,
  share=st.integers(1, 300),
  available=st.integers(0, 10**11),
)
def test_the_fewest_micro_batches_that_fit(need, share, available):
  counts = memory.valid_micro_batches(share)
  fitting = [
    count
    for count in counts
    if need.total(share, count) <= memory.USABLE * available
  ]
  if not fitting:
    with pytest.raises(ValueError, match='GiB'):
      memory.choose_micro_batches(share, need, available)
    return
  count = memory.choose_micro_batches(share, need, available)
  assert count == min(fitting)
  assert share % count == 0


@pytest.mark.slow
def test_global_batch_of_the_paper_fits_on_one_device():
  """4096 images for F0 on one device of 16 GiB, and on one of 80."""
  changes = {'compute_dtype': 'bfloat16'}
  need = _estimate(_config('nfnet_f0', 192, **changes))
  small, large = (
    memory.choose_micro_batches(4096, need, gib * GIB) for gib in (16, 80)
  )
  assert 1 < large < small < 4096


def test_too_large_a_step_is_refused_with_figures_and_remedies():
  need = memory.MemoryEstimate(GIB, GIB, GIB, 0, 2 * GIB, 3 * GIB, 0)
  with pytest.raises(ValueError) as error:
    memory.choose_micro_batches(64, need, 8 * GIB)
  for text in (
    'needs 9.00 GiB with a micro-batch of 1',
    '7.20 GiB (90% of 8.00)',
    '3.00 for activations',
    "remat to 'block'",
    'image_size',
    'more devices',
  ):
    assert text in str(error.value)


def _device(platform, stats):
  return types.SimpleNamespace(
    platform=platform, device_kind='Abacus', memory_stats=lambda: stats
  )


def test_accelerator_says_what_it_has(monkeypatch):
  device = _device('gpu', {'bytes_limit': 7 * GIB})
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  assert memory.device_memory() == 7 * GIB


@pytest.mark.parametrize('stats', [None, {}])
def test_accelerator_that_says_nothing(monkeypatch, stats):
  device = _device('gpu', stats)
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  with pytest.raises(ValueError, match='Abacus .* set config.micro_batches'):
    memory.device_memory()


def test_devices_of_a_host_share_its_memory():
  assert jax.local_device_count() == 8
  assert memory.device_memory() == memory._host_memory() // 8
  assert memory.device_memory() > 2**24


@pytest.mark.parametrize(
  ('files', 'expected'),
  [
    ({}, None),
    ({'memory.max': 'max\n'}, None),
    ({'memory.max': '1000000\n'}, 10**6),
    ({'memory/memory.limit_in_bytes': '2000000\n'}, 2 * 10**6),
    # No limit, as the first version writes it.
    ({'memory/memory.limit_in_bytes': '9223372036854771712\n'}, None),
  ],
)
def test_control_group_limits_the_host(tmp_path, files, expected):
  machine = memory._host_memory(tmp_path / 'missing')
  for name, text in files.items():
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
  assert memory._host_memory(tmp_path) == (expected or machine)


def test_run_takes_what_its_config_says():
  config = _config('nfnet_tiny', 32, micro_batches=4)
  assert train.count_micro_batches(config, _parts(config)[1], 10) == 4


def test_run_without_a_number_takes_what_fits(monkeypatch, capsys):
  changes = {'batch_size': 512, 'compute_dtype': 'bfloat16', 'remat': 'block'}
  config = _config('nfnet_tiny', 32, **changes)
  optimizer = _parts(config)[1]
  monkeypatch.setattr(memory, 'device_memory', lambda: 64 * 2**20)
  assert train.count_micro_batches(config, optimizer, 10) == 4
  said = capsys.readouterr().out
  assert said.startswith('micro-batches: 4 of 16 images on each device, about')
  assert said.endswith('of 0.06 GiB\n')
  # What was planned with is not what is run with.
  assert (config.compute_dtype, config.remat) == ('bfloat16', 'block')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'micro_batches': 3}, 'the 64 images of each of 8 devices .*; use 2 or 4'),
    ({'micro_batches': 65}, 'use 64'),
    ({'micro_batches': 0}, 'use 1'),
  ],
)
def test_micro_batches_that_do_not_split_a_share(changes, message):
  config = _config('nfnet_tiny', 32, batch_size=512, **changes)
  with pytest.raises(ValueError, match=message):
    train.check_config(config, devices=8)


def test_micro_batches_that_split_a_share():
  for count in (None, 1, 2, 32):
    config = _config('nfnet_tiny', 32, batch_size=512, micro_batches=count)
    train.check_config(config, devices=8)
