import platform
import subprocess
import sys
import textwrap

import pytest

# Its temporary arrays take 64 MB in all, 16,000 pages.
_STEPS = """
  import resource
  import jax
  import jax.numpy as jnp
  from nfnets_jax.training import host_memory

  jax.devices()
  if {keep}:
    assert host_memory.keep_freed_memory()
  x = jnp.ones((2048, 2048))
  step = jax.jit(lambda x: jnp.sort(x, 0) @ jnp.sort(x, 1) + jnp.sort(x + 1))

  def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(step(x))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

  # Threads differ from step to step in what they hold at once, so that the heap
  # may still grow in some, all the more on a busy machine.
  print(min(faults() for _ in range(15)))
"""


@pytest.mark.slow
@pytest.mark.skipif(
  platform.libc_ver()[0] != 'glibc', reason='it is a matter of glibc'
)
def test_steps_take_no_new_pages():
  def faults(keep):
    code = textwrap.dedent(_STEPS).format(keep=keep)
    out = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    return float(out.stdout)

  assert faults(keep=True) < 1000 < faults(keep=False)


_HOLES = """
import psutil
from nfnets_jax.training import host_memory

def resident():
  return psutil.Process().memory_info().rss >> 20

host_memory.keep_freed_memory()
blocks = [bytearray(b'1') * (50 << 20) for _ in range(4)]
del blocks[:3]  # what lies behind keeps them on the heap
kept = resident()
host_memory.give_back_freed_memory()
print(kept - resident())
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != 'glibc', reason='it is a matter of glibc'
)
def test_what_was_kept_is_given_back_when_asked():
  out = subprocess.run(
    [sys.executable, '-c', _HOLES], capture_output=True, text=True, check=True
  )
  assert int(out.stdout) > 140
