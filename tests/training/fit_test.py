"""Real programs, of a few arrays, compiled until one fits."""

import math

import jax
import jax.numpy as jnp
import pytest

from nfnets_jax import devices
from nfnets_jax.training import build, check, fit, programs
from nfnets_jax.training import config as defaults
from nfnets_jax.training import train_step as steps

SHARE = 12
ROW = 1 << 20  # bytes of an image's activations


@pytest.fixture
def lower():
  """A step whose temporaries are those of the largest part."""
  compiled = []

  def lower(count):
    compiled.append(count)

    def step(x):
      def part(y):
        z = jnp.sort(jnp.outer(y, jnp.arange(float(ROW // 4))), axis=1)
        return jnp.sum(jnp.sort(z[:, ::-1], axis=1), axis=1)

      return jax.lax.map(part, x.reshape(count, -1)).reshape(-1)

    return jax.jit(step).lower(jax.ShapeDtypeStruct((SHARE,), jnp.float32))

  lower.compiled = compiled
  return lower


def _needs(lower):
  counts = fit.valid_micro_batches(SHARE)
  return {count: fit.need(lower(count).compile()).total for count in counts}


@pytest.mark.thorough
def test_fewest_parts_that_fit(lower):
  needs = _needs(lower)
  assert sorted(needs.values(), reverse=True) == list(needs.values())
  for count, need in needs.items():
    memory = math.ceil(need / fit.USABLE)
    found = fit.compile_fewest(lower, list(needs), memory)
    assert (found.parts, found.total) == (count, need)
    assert all(found.refused[x] == needs[x] for x in found.refused)
    assert found.compiled(jnp.ones(SHARE)).shape == (SHARE,)
    # With a byte beside it, it does not.
    if count < SHARE:
      beside = memory - need + 1
      more = fit.compile_fewest(lower, list(needs), memory, beside).parts
      assert more > count


def test_hopeless_numbers_of_parts_are_not_compiled(lower):
  needs = _needs(lower)
  lower.compiled.clear()
  memory = math.ceil(needs[SHARE] / fit.USABLE)
  assert fit.compile_fewest(lower, list(needs), memory).parts == SHARE
  assert lower.compiled[0] == 1
  assert lower.compiled[-1] == SHARE
  assert len(lower.compiled) < len(needs)


def test_processes_choose_alike(lower):
  """The other one refuses what takes half of the memory."""
  said = []

  def agree(yes):
    said.append(yes)
    return yes and len(said) > 1

  found = fit.compile_fewest(lower, [1, 2], None, agree=agree)
  # Its word on 1; whether to try 2; its word on 2.
  assert (found.parts, said) == (2, [True, True])


def test_nothing_fits(lower):
  with pytest.raises(fit.TooLargeError) as error:
    fit.compile_fewest(lower, [1, 12], 2**20)
  for text in ('in 12 part(s) needs 0.00', '90%', "remat to 'block'"):
    assert text in str(error.value)


def test_what_was_told_before_spares_compilations(lower):
  needs = _needs(lower)
  memory = math.ceil(needs[SHARE] / fit.USABLE)
  with pytest.raises(fit.TooLargeError) as told:
    fit.compile_fewest(lower, [1], memory)
  lower.compiled.clear()
  rest = [count for count in needs if count > 1]
  found = fit.compile_fewest(lower, rest, memory, before=told.value)
  assert found.parts == SHARE
  assert lower.compiled[0] > 2


def test_without_a_limit_the_first_is_taken(lower):
  assert fit.compile_fewest(lower, [2, 4], None).parts == 2
  assert lower.compiled == [2]


@pytest.mark.parametrize(
  ('message', 'expected'),
  [
    (
      'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory '
      'in memory space hbm. Used 24.50G of 15.48G hbm. Exceeded',
      round(24.5 * 2**30),
    ),
    ('Used 512.00M of 1G hbm', 2**29),
    ('RESOURCE_EXHAUSTED: Out of memory', None),
  ],
)
def test_what_a_compiler_says_when_it_refuses(message, expected):
  assert fit.refused_bytes(message) == expected


@pytest.mark.parametrize(
  ('batch_size', 'expected'), [(12, [1, 2, 3, 4, 6, 12]), (3, [1, 3]), (1, [1])]
)
def test_numbers_that_divide_a_batch(batch_size, expected):
  assert fit.valid_micro_batches(batch_size) == expected


def test_batches_that_wait_are_counted():
  batch = {'image': jax.ShapeDtypeStruct((8, 4, 16, 16, 3), jnp.uint8)}
  assert fit.bytes_beside(batch) == 2 * 4 * 16 * 16 * 3


def _config(**changes):
  config = defaults.get_config()
  config.model = defaults.model('nfnet_tiny')
  config.data.image_size = 32
  config.update_from_flattened_dict({'batch_size': 512, **changes})
  return config


@pytest.mark.parametrize(
  ('count', 'message'),
  [
    (3, 'the 64 images of each of 8 devices; use 2 or 4'),
    (65, 'use 64'),
    (0, 'use 1'),
  ],
)
def test_micro_batches_that_do_not_split_a_share(count, message):
  with pytest.raises(ValueError, match=message):
    check.check_config(_config(micro_batches=count), devices=8)


def test_micro_batches_that_split_a_share():
  for count in (None, 1, 2, 32):
    check.check_config(_config(micro_batches=count), devices=8)


@pytest.mark.thorough
def test_run_takes_the_fewest_that_fit(make_config, monkeypatch, capsys):
  """And the program that was looked at is the one that runs."""
  config = make_config(40, {'batch_size': 128})
  net = build.create_net(config, 10)
  optimizer = build.create_optimizer(config, lambda step: 0.0)
  state = steps.state_shapes(net, optimizer, config.data.image_size)
  needs = {}
  for count in (1, 2):
    config.micro_batches = count
    program = programs.compile_train_step(config, net, state, 10, 10.0)
    needs[count] = fit.need(program.compiled).total
  assert needs[2] < needs[1]
  config.micro_batches = None
  memory = math.ceil((needs[2] + 2000) / fit.USABLE) + 8000
  monkeypatch.setattr(devices, 'memory', lambda: memory)
  capsys.readouterr()
  program = programs.compile_train_step(config, net, state, 10, 10.0)
  assert fit.need(program.compiled).total == needs[2]
  said = capsys.readouterr().out
  assert said.startswith('micro-batches: 2 of 8 images on each device, 0.00 of')
  monkeypatch.setattr(devices, 'memory', lambda: 2**16)
  with pytest.raises(fit.TooLargeError, match="remat to 'block'"):
    programs.compile_train_step(config, net, state, 10, 10.0)
