"""What is read from the texts of real programs, and from a few lines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax import hlo
from nfnets_jax.runtime import parallel

N = 64


# The old emitters of `conftest` expand scatters to loops.
_OPTIONS = (
  {'xla_cpu_use_fusion_emitters': True}
  if jax.__version__.startswith('0.10.')
  else None
)


def _text(function, *shapes):
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  lowered = jax.jit(function).lower(*args)
  return lowered.compile(compiler_options=_OPTIONS).as_text()


def test_traffic_of_a_product_is_its_operands_and_its_result():
  found = hlo.read(_text(jnp.dot, (N, N), (N, N)))
  assert found.traffic == found.traffic_once == 3 * 4 * N * N
  assert (found.cycles, found.collectives) == (0, [])


def test_loop_counts_as_often_as_it_runs():
  def step(x, y):
    return jax.lax.scan(lambda x, _: (jnp.dot(x, y), None), x, length=7)[0]

  found = hlo.read(_text(step, (N, N), (N, N)))
  once = 3 * 4 * N * N
  assert 7 * once <= found.traffic <= 14 * once  # with copies of the carry
  assert found.traffic_once < found.traffic / 3


def test_collectives_of_devices():
  def step(state, batch):
    both = jax.lax.psum((batch, jnp.sum(batch, axis=0)), 'devices')
    return state, (both, jax.lax.all_gather(batch, 'devices'))

  lowered = parallel.lower_train_step(
    step,
    jax.ShapeDtypeStruct((), jnp.float32),
    jax.ShapeDtypeStruct((8, N, N), jnp.float32),
  )
  found = hlo.read(lowered.compile().as_text())
  size = {'all-reduce': 0, 'all-gather': 0}
  for each in found.collectives:
    assert (each.times, each.work) == (1, 0)
    size[each.opcode] += each.bytes
  assert size == {
    'all-reduce': 4 * (N * N + N),
    'all-gather': 8 * 4 * N * N,
  }


@pytest.mark.parametrize('count', [100, 20_000])
def test_large_gathers_and_scatters(count):
  index = np.arange(count)[::-1].copy()

  def step(x):
    return x[index], jnp.zeros(2 * count).at[index].add(x[:count])

  found = hlo.read(_text(step, (2 * count,)))
  large = int(count > hlo.LARGE)
  assert (found.large_gathers, found.large_scatters) == (large, large)


_ASYNCHRONOUS = """
HloModule step, is_scheduled=true

%work (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  ROOT %b = bf16[8,128]{1,0} negate(%a)
}

ENTRY %main (x: f32[1000], y: bf16[8,128]) -> (f32[1000], bf16[8,128]) {
  %x = f32[1000]{0:T(256)} parameter(0)
  %y = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %start = f32[1000]{0:T(256)} all-reduce-start(%x), to_apply=%add
  %fusion.1 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%y), kind=kLoop, \
calls=%work, backend_config={"window_config":{"estimated_cycles":"300"}}
  %free = bf16[8,128]{1,0} bitcast(%fusion.1)
  %done = f32[1000]{0:T(256)} all-reduce-done(%start)
  %fusion.2 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%free), kind=kLoop, \
calls=%work, backend_config={"window_config":{"estimated_cycles":"200"}}
  ROOT %t = (f32[1000]{0}, /*index=1*/bf16[8,128]{1,0}) tuple(%done, %fusion.2)
}
"""


def test_work_during_a_collective_and_estimated_cycles():
  found = hlo.read(_ASYNCHRONOUS)
  assert found.collectives == [
    hlo.Collective('all-reduce', 4000, 1, True, work=1, cycles=300)
  ]
  assert found.cycles == 500
  assert found.traffic == 2 * 4000 + 2 * 2 * 2 * 8 * 128


def test_copies_that_start_are_read_and_written_once():
  found = hlo.read("""
ENTRY %main (x: f32[1000]) -> f32[1000] {
  %x = f32[1000]{0} parameter(0)
  %start = (f32[1000]{0:S(1)}, f32[1000]{0}, u32[]) copy-start(%x)
  ROOT %done = f32[1000]{0:S(1)} copy-done(%start)
}
""")
  assert found.traffic == 2 * 4000 + 4  # and its context


def test_result_of_a_wrapped_collective_includes_its_operands():
  found = hlo.read("""
%wrapped (a: f32[1000]) -> f32[1000] {
  %a = f32[1000]{0} parameter(0)
  ROOT %b = f32[1000]{0} all-reduce(%a), to_apply=%add
}

ENTRY %main (x: f32[1000]) -> f32[1000] {
  %x = f32[1000]{0} parameter(0)
  %start = ((f32[1000]{0}), f32[1000]{0}) async-start(%x), calls=%wrapped
  ROOT %done = f32[1000]{0} async-done(%start)
}
""")
  assert found.collectives == [
    hlo.Collective('all-reduce', 4000, 1, True, work=0, cycles=0)
  ]
  assert found.traffic == 2 * 4000


def test_all_branches_count():
  found = hlo.read("""
%yes (a: f32[10]) -> f32[10] {
  %a = f32[10]{0} parameter(0)
  ROOT %b = f32[10]{0} negate(%a)
}

%no (c: f32[10]) -> f32[10] {
  %c = f32[10]{0} parameter(0)
  ROOT %d = f32[10]{0} exponential(%c)
}

ENTRY %main (p: pred[], x: f32[10]) -> f32[10] {
  %p = pred[] parameter(0)
  %x = f32[10]{0} parameter(1)
  ROOT %y = f32[10]{0} conditional(%p, %x, %x), true_computation=%yes, \
false_computation=%no
}
""")
  assert found.traffic == 2 * 2 * 40


def test_text_without_an_entry():
  with pytest.raises(ValueError, match='no entry computation'):
    hlo.read('HloModule nothing\n')
